"""Plain loops: a task's contribution to a round as one would write it, with a module, autograd and nothing else.

What `benchmarks.models` and `benchmarks.gpu` compare the engine with.
"""

import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from quickbloom.common.algorithms import Algorithm
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.maths.params import Params

CLASSES, STEPS, LR, PULL = 10, 5, 0.01, 0.1
PlainTask = Callable[[Algorithm, TaskData], Params]
"""Returns a task's contribution."""


def _model(algorithm: Algorithm) -> nn.Module:
    return copy.deepcopy(algorithm.learner.module)


def _loss(module: nn.Module, weights: Params, batch: Batch) -> Tensor:
    return F.cross_entropy(functional_call(module, weights, (batch.x,)), batch.y)


def _named(module: nn.Module) -> Params:
    return {name: value.detach().clone().requires_grad_() for name, value in module.named_parameters()}


def _gradient(value: Tensor, by: Params, *, again: bool = False) -> Params:
    slopes = torch.autograd.grad(value, list(by.values()), create_graph=again)
    return dict(zip(by, slopes, strict=True))


def _descended(model: nn.Module, batches: Iterator[Batch]) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for batch in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(batch.x), batch.y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model


def plain_fomaml(algorithm: Algorithm, data: TaskData) -> Params:
    model = _descended(_model(algorithm), iter([data.support] * STEPS))
    model.zero_grad()
    F.cross_entropy(model(data.query.x), data.query.y).backward()  # type: ignore[no-untyped-call]
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def _trained(algorithm: Algorithm, data: TaskData, added: Callable[[nn.Module], Tensor | float] = lambda _: 0.0) -> Params:
    """Return by how much SGD on all examples moves the model, with the loss at its end, which a round reports as well.

    `added`: what stands beside the loss of the examples.
    """
    model, whole = _model(algorithm), _whole(data)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (F.cross_entropy(model(whole.x), whole.y) + added(model)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        F.cross_entropy(model(data.query.x), data.query.y).item()
    before = dict(algorithm.learner.module.named_parameters())
    return {name: before[name].detach() - value.detach() for name, value in model.named_parameters()}


def _whole(data: TaskData) -> Batch:
    return Batch.of(torch.cat([data.support.x, data.query.x]), torch.cat([data.support.y, data.query.y]))


def _pulled(algorithm: Algorithm, data: TaskData) -> Params:
    before = [value.detach() for value in algorithm.learner.module.parameters()]

    def distance(model: nn.Module) -> Tensor:
        pairs = zip(model.parameters(), before, strict=True)
        return PULL / 2 * torch.stack([((value - was) ** 2).sum() for value, was in pairs]).sum()

    return _trained(algorithm, data, distance)


def plain_fedavg(algorithm: Algorithm, data: TaskData) -> Params:
    return _trained(algorithm, data)


def plain_fedprox(algorithm: Algorithm, data: TaskData) -> Params:
    return _pulled(algorithm, data)


def plain_ditto(algorithm: Algorithm, data: TaskData) -> Params:
    """The personal model, which stays on its node, begins at the server's in the first round."""
    _pulled(algorithm, data)
    return _trained(algorithm, data)


def plain_pfedme(algorithm: Algorithm, data: TaskData) -> Params:
    """Every local round solves a proximal problem by proximal steps."""
    model, whole = _model(algorithm), _whole(data)
    w = [value.detach().clone() for value in model.parameters()]
    for _ in range(STEPS):
        with torch.no_grad():
            for value, near in zip(model.parameters(), w, strict=True):
                value.copy_(near)
        for _ in range(STEPS):
            slopes = torch.autograd.grad(F.cross_entropy(model(whole.x), whole.y), list(model.parameters()))
            with torch.no_grad():
                for value, slope, near in zip(model.parameters(), slopes, w, strict=True):
                    value.sub_(slope, alpha=LR).add_(near, alpha=LR * PULL).div_(1 + LR * PULL)
        with torch.no_grad():
            for near, value in zip(w, model.parameters(), strict=True):
                near.sub_(near - value, alpha=algorithm.options.local_lr * PULL)
    with torch.no_grad():
        F.cross_entropy(model(data.query.x), data.query.y).item()
    before = dict(algorithm.learner.module.named_parameters())
    return {name: before[name].detach() - near for name, near in zip(before, w, strict=True)}


def plain_maml(algorithm: Algorithm, data: TaskData) -> Params:
    module = algorithm.learner.module
    theta = phi = _named(module)
    for _ in range(STEPS):
        slopes = _gradient(_loss(module, phi, data.support), phi, again=True)
        phi = {name: value - LR * slopes[name] for name, value in phi.items()}
    return _gradient(_loss(module, phi, data.query), theta)


def plain_anil(algorithm: Algorithm, data: TaskData) -> Params:
    module = algorithm.learner.module
    theta = _named(module)
    head = {name: theta[name] for name in list(theta)[-2:]}
    for _ in range(STEPS):
        slopes = _gradient(_loss(module, {**theta, **head}, data.support), head, again=True)
        head = {name: value - LR * slopes[name] for name, value in head.items()}
    return _gradient(_loss(module, {**theta, **head}, data.query), theta)


def plain_metasgd(algorithm: Algorithm, data: TaskData) -> Params:
    module = algorithm.learner.module
    theta = phi = _named(module)
    rates = {f"rate/{name}": torch.full_like(value, LR).requires_grad_() for name, value in theta.items()}
    for _ in range(STEPS):
        slopes = _gradient(_loss(module, phi, data.support), phi, again=True)
        phi = {name: value - rates[f"rate/{name}"] * slopes[name] for name, value in phi.items()}
    return _gradient(_loss(module, phi, data.query), {**theta, **rates})


def plain_perfedavg(algorithm: Algorithm, data: TaskData) -> Params:
    module = algorithm.learner.module
    theta = w = _named(module)
    for _ in range(STEPS):
        slopes = _gradient(_loss(module, w, data.support), w, again=True)
        adapted = {name: (w[name] - LR * slopes[name]).detach().requires_grad_() for name in w}
        v = _gradient(_loss(module, adapted, data.query), adapted)
        product = torch.autograd.grad(list(slopes.values()), list(w.values()), list(v.values()))
        moves = {name: v[name] - LR * times for name, times in zip(w, product, strict=True)}
        w = {name: (value - LR * moves[name]).detach().requires_grad_() for name, value in w.items()}
    return {name: (theta[name] - value).detach() for name, value in w.items()}


def plain_protonet(algorithm: Algorithm, data: TaskData) -> Params:
    module = algorithm.learner.module
    theta = _named(module)
    embedded = functional_call(module, theta, (data.support.x,))
    prototypes = torch.stack([embedded[data.support.y == label].mean(dim=0) for label in range(CLASSES)])
    distances = torch.cdist(functional_call(module, theta, (data.query.x,)), prototypes).square()
    return _gradient(F.cross_entropy(-distances / algorithm.options.temperature, data.query.y), theta)


PLAIN: dict[str, PlainTask] = {
    "fomaml": plain_fomaml,
    "maml": plain_maml,
    "anil": plain_anil,
    "metasgd": plain_metasgd,
    "perfedavg": plain_perfedavg,
    "protonet": plain_protonet,
    "fedavg": plain_fedavg,
    "fedprox": plain_fedprox,
    "ditto": plain_ditto,
    "pfedme": plain_pfedme,
}
"""Not here: `reptile` and `local`, whose steps are those of `fedavg`, and what differs from these in what is kept or sent."""
