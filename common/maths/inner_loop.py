"""The inner loop: gradient descent on a task's own examples, differentiable with respect to its start."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vjp

from quickbloom.common.maths.batch import Batch
from quickbloom.common.maths.params import Params, add, dot

_MOVED_AT_ONCE = 2**20
"""Numbers of a large tensor that a step moves at once, so that its products take little memory."""
Loss = Callable[[Params, Batch], Tensor]
Data = TypeVar("Data")
"""What a loss is of: a batch, or all that a task draws for a round."""
Differentiate = Callable[[Callable[..., Tensor]], Callable[..., tuple[Params, Tensor]]]
"""Makes of a loss a function that returns (gradient by the parameters, loss), as torch.func.grad_and_value does."""


class MeanLoss:
    """A loss that is a mean over the examples of a batch: its gradient can be taken in pieces."""

    def __init__(self, plain: Loss) -> None:
        self.plain = plain

    def __call__(self, params: Params, batch: Batch) -> Tensor:
        return self.plain(params, batch)


def built_on(base: Loss, loss: Loss) -> Loss:
    """Return `loss` as a `MeanLoss` if `base` is one, of which `loss` is made by other parameters."""
    return MeanLoss(loss) if isinstance(base, MeanLoss) else loss


@dataclass(frozen=True)
class Pull:
    """strength / 2 * ||phi - anchor||^2."""

    anchor: Params
    strength: float

    def value(self, phi: Params) -> Tensor:
        return self.strength / 2 * torch.stack([((value - self.anchor[name]) ** 2).sum() for name, value in phi.items()]).sum()

    def added_to(self, gradient: Tensor, name: str, value: Tensor) -> Tensor:
        """Return the gradient of a loss by the parameter `name`, which is `value`, and that of this term."""
        return torch.add(gradient, value, alpha=self.strength).sub_(self.anchor[name], alpha=self.strength)

    def arranged(self) -> "Pull":
        return Pull({name: _arranged(value) for name, value in self.anchor.items()}, self.strength)


@dataclass(frozen=True)
class Slope:
    """<direction, phi>."""

    direction: Params

    def value(self, phi: Params) -> Tensor:
        return dot(self.direction, phi)

    def added_to(self, gradient: Tensor, name: str, value: Tensor) -> Tensor:
        """Return the gradient of a loss by the parameter `name`, which is `value`, and that of this term."""
        return gradient + self.direction[name]

    def arranged(self) -> "Slope":
        return Slope({name: _arranged(value) for name, value in self.direction.items()})


@dataclass(frozen=True)
class Penalised:
    """A loss and terms without examples."""

    loss: Loss
    terms: tuple[Pull | Slope, ...]

    def __call__(self, params: Params, batch: Batch) -> Tensor:
        value = self.loss(params, batch)
        for term in self.terms:
            value = value + term.value(params)
        return value


def _parts(loss: Loss) -> tuple[Loss, tuple[Pull | Slope, ...]]:
    """Return the loss of examples and the terms without any."""
    return (loss.loss, loss.terms) if isinstance(loss, Penalised) else (loss, ())


def slope(loss: Loss, at: Params, batch: Batch) -> Params:
    """Return grad loss(at, batch). That of a `MeanLoss` over many examples is summed over pieces, which bounds the memory.

    A gradient taken through this one is exact, and needs the memory of all pieces.
    """
    return _over_pieces(grad_and_value if is_transformed() else _through_autograd, loss, at, batch)[0]


def _over_pieces(
    differentiate: Differentiate, loss: Callable[[Params, Data], Tensor], at: Params, data: Data
) -> tuple[Params, Tensor]:
    """Return (gradient, loss) at `at`, each summed over the pieces that the loss allows."""
    if not isinstance(loss.loss if isinstance(loss, Penalised) else loss, MeanLoss):
        return differentiate(loss)(at, data)
    assert isinstance(data, Batch)
    pieces = data.pieces()
    if len(pieces) == 1:
        return differentiate(loss)(at, data)
    total, mean = {name: torch.zeros_like(value) for name, value in at.items()}, data.weight.new_zeros(())
    for piece, share in _with_shares(pieces):
        gradient, value = differentiate(loss)(at, piece)
        total, mean = add(total, gradient, share), mean + share * value
    return total, mean


def _with_shares(pieces: list[Batch]) -> list[tuple[Batch, Tensor]]:
    """Return the pieces of a batch with their shares: the sum of their mean losses by these shares is that of the batch."""
    weights = [piece.weight.sum() for piece in pieces]
    whole = torch.stack(weights).sum()
    # Nothing but padding has no mean: its copies of an example are taken as examples, and then count as nothing.
    known = [piece._replace(weight=torch.where(own > 0, piece.weight, 1.0)) for piece, own in zip(pieces, weights, strict=True)]
    return [(piece, own / whole) for piece, own in zip(known, weights, strict=True)]


@dataclass(frozen=True)
class InnerOptimizer:
    """How a step follows from a gradient. `kind`: sgd, momentum or adam; `momentum`: beta of the second, beta1 of the third.

    As torch.optim has them (SGD without dampening; Adam of Kingma, Ba 2015, with beta2 = 0.999 and epsilon = 1e-8). The state
    starts anew in every descent, since tasks keep none.
    """

    kind: str = "sgd"
    momentum: float = 0.9

    @property
    def plain(self) -> bool:
        return self.kind == "sgd"

    def path(self, loss: Loss, start: Params, batches: Iterator[Batch], lr: float | Tensor) -> Iterator[Params]:
        """Yield the points of the descent, `start` first."""
        phi = start
        yield phi
        mean = square = {name: torch.zeros_like(value) for name, value in start.items()}
        for step, batch in enumerate(batches, 1):
            gradient = slope(loss, phi, batch)
            if self.kind == "momentum":
                mean = add(gradient, mean, self.momentum)
                phi = add(phi, mean, -lr)
            else:
                mean = {name: self.momentum * mean[name] + (1 - self.momentum) * value for name, value in gradient.items()}
                square = {name: 0.999 * square[name] + 0.001 * value.square() for name, value in gradient.items()}
                first, second = 1 - self.momentum**step, 1 - 0.999**step
                moves = {name: mean[name] / first / ((square[name] / second).sqrt() + 1e-8) for name in phi}
                phi = add(phi, moves, -lr)
            yield phi


PLAIN = InnerOptimizer()


def descend(
    loss: Loss,
    start: Params,
    batches: Iterator[Batch],
    lr: float | Tensor,
    *,
    passing: bool = False,
    optimizer: InnerOptimizer = PLAIN,
) -> Iterator[Params]:
    """Yield phi_0 = start, then phi_{i+1} = phi_i - lr * grad loss(phi_i, batch_i) for every batch.

    A gradient taken through it is exact to any order inside `torch.func`; outside of it, where one task is computed by itself,
    plain autograd can take one. By itself this is plain SGD; the state of another `optimizer` starts anew here.

    `passing`: every phi but the first may be overwritten by the next, and no gradient is taken
    through them.
    """
    if not optimizer.plain:
        yield from optimizer.path(loss, start, batches, lr)
        return
    phi = start
    yield phi
    for batch in batches:
        if passing and isinstance(lr, Tensor):
            phi = _moved(phi, slope(loss, phi, batch), -lr, in_place=phi is not start)
        else:
            phi = add(phi, slope(loss, phi, batch), -lr)
        yield phi


def descend_at_rates(
    loss: Loss, start: Params, batch: Batch, scale: float | Tensor, steps: int, rates: Params
) -> Iterator[Params]:
    """Yield phi_0 = start, then phi_{i+1} = phi_i - scale * rates * grad loss(phi_i), with a rate for each number."""
    phi = start
    yield phi
    for _ in range(steps):
        gradient = slope(loss, phi, batch)
        phi = {name: value - scale * rates[name] * gradient[name] for name, value in phi.items()}
        yield phi


def endpoint(loss: Loss, start: Params, batches: Iterator[Batch], lr: float, optimizer: InnerOptimizer = PLAIN) -> Params:
    """Return the last element of `descend`, through which no gradient is taken.

    Equal to it up to rounding. Outside `vmap`, `grad` and the compiler the parameters are moved in place, with plain autograd:
    a step of a large model took 30 % less time, since nothing is allocated for them.
    """
    if not optimizer.plain or is_transformed():
        return last(descend(loss, start, batches, lr, optimizer=optimizer))
    loss, terms = _parts(loss)
    terms = tuple(term.arranged() for term in terms)

    def move(name: str, value: Tensor, gradient: Tensor) -> None:
        for term in terms:
            gradient = term.added_to(gradient, name, value)
        value.sub_(gradient, alpha=lr)

    return _moved_in_place(loss, start, batches, move)


def endpoint_towards(loss: Loss, start: Params, anchor: Params, batches: Iterator[Batch], lr: float, strength: float) -> Params:
    """Return the last element of `descend_towards`, as `endpoint` does that of `descend`."""
    if is_transformed():
        return last(descend_towards(loss, start, anchor, batches, lr, strength))
    near = {name: _arranged(value) for name, value in anchor.items()}

    def move(name: str, value: Tensor, gradient: Tensor) -> None:
        value.sub_(gradient, alpha=lr)
        value.lerp_(near[name], lr * strength / (1 + lr * strength))

    return _moved_in_place(loss, start, batches, move)


def _moved_in_place(loss: Loss, start: Params, batches: Iterator[Batch], move: Callable[[str, Tensor, Tensor], None]) -> Params:
    """Return what `start` becomes by `move`, called for every batch with a parameter's name, its value and its gradient."""
    phi = {name: _leaf(value) for name, value in start.items()}
    for batch in batches:
        gradient, _ = _over_pieces(_by_autograd, loss, phi, batch)
        with torch.no_grad():
            for name, value in phi.items():
                move(name, value, gradient[name])
    return {name: value.detach().contiguous() for name, value in phi.items()}


def gradient_and_value(loss: Callable[[Params, Data], Tensor], at: Params, data: Data) -> tuple[Params, Tensor]:
    """Return (gradient of the loss with the keys of `at`, the loss), through which no gradient is taken. See `endpoint`."""
    if is_transformed():
        return _over_pieces(grad_and_value, loss, at, data)
    with _set(_whole):
        gradient, value = _over_pieces(_by_autograd, loss, {name: _leaf(value) for name, value in at.items()}, data)
    return {name: slopes.contiguous() for name, slopes in gradient.items()}, value


def _by_autograd(loss: Callable[[Params, Data], Tensor]) -> Callable[[Params, Data], tuple[Params, Tensor]]:
    """`grad_and_value` of plain autograd, for parameters that are `_leaf`s."""

    def differentiated(leaves: Params, data: Data) -> tuple[Params, Tensor]:
        with torch.enable_grad():
            value = loss(leaves, data)
            slopes = _slopes(value, leaves)
        return slopes, value.detach()

    return differentiated


def _through_autograd(loss: Callable[[Params, Data], Tensor]) -> Callable[[Params, Data], tuple[Params, Tensor]]:
    """`grad_and_value` of plain autograd, which can be differentiated again where that is asked for."""

    def differentiated(at: Params, data: Data) -> tuple[Params, Tensor]:
        again = torch.is_grad_enabled() and (_whole.get() or any(value.requires_grad for value in at.values()))
        points = {name: value if value.requires_grad else value.detach().requires_grad_() for name, value in at.items()}
        with torch.enable_grad(), _set(_twice, to=again):
            value = loss(points, data)
            slopes = _slopes(value, points, again=again)
        return slopes, value if again else value.detach()

    return differentiated


def _slopes(value: Tensor, by: Params, *, again: bool = False) -> Params:
    """Return the gradient of a scalar, zero where it depends on nothing; with `again`, to be differentiated once more."""
    if not value.requires_grad:
        return {name: torch.zeros_like(point) for name, point in by.items()}
    slopes = torch.autograd.grad(value, list(by.values()), create_graph=again, materialize_grads=True)
    return dict(zip(by, slopes, strict=True))


_whole: ContextVar[bool] = ContextVar("_whole", default=False)
"""Whether a loss is computed of which the gradient is taken by plain autograd: gradients in it are then differentiated too."""
_twice: ContextVar[bool] = ContextVar("_twice", default=False)
"""Whether a loss is computed by plain autograd whose gradient will be differentiated."""


@contextmanager
def _set(variable: ContextVar[bool], *, to: bool = True) -> Iterator[None]:
    token = variable.set(to)
    try:
        yield
    finally:
        variable.reset(token)


def is_differentiated_twice() -> bool:
    """Return whether the derivative of what is computed now may be differentiated again, which fused attention cannot."""
    return _twice.get() or is_transformed()


def is_transformed() -> bool:
    """Return whether `vmap`, `grad`, their like or the compiler is at work."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def _leaf(value: Tensor) -> Tensor:
    """Return a copy that autograd starts from."""
    return value.detach().clone(memory_format=_layout(value)).requires_grad_()


def _arranged(value: Tensor) -> Tensor:
    """Return the values in the order that a `_leaf` has in memory."""
    return value.contiguous(memory_format=_layout(value))


def _layout(value: Tensor) -> torch.memory_format:
    """Return the order of a parameter's numbers in memory: convolutions on a CPU are faster with the channels last."""
    return torch.channels_last if value.dim() == 4 and value.device.type == "cpu" else torch.contiguous_format


def _moved(phi: Params, gradient: Params, scale: Tensor, *, in_place: bool) -> Params:
    """Return phi + scale * gradient, bit for bit as `add` does.

    With `in_place` large tensors are overwritten. Empties `gradient`.
    """
    moved = {}
    for name, value in phi.items():
        slopes = gradient.pop(name)
        if value.numel() <= _MOVED_AT_ONCE:
            moved[name] = value + scale * slopes
            continue
        if in_place:
            # A few rows at a time, since all products together would take as much memory again.
            size = max(1, len(value) * _MOVED_AT_ONCE // value.numel())
            for rows, some in zip(torch.split(value, size), torch.split(slopes, size), strict=True):
                rows.add_(scale * some)
            moved[name] = value
        else:
            moved[name] = scale * slopes
            del slopes
            moved[name].add_(value)
    return moved


def descend_towards(
    loss: Loss, start: Params, anchor: Params, batches: Iterator[Batch], lr: float | Tensor, strength: float
) -> Iterator[Params]:
    """Yield the steps of proximal gradient descent on loss(phi) + strength / 2 * ||phi - anchor||^2, from phi_0 = start.

    phi_{i+1} = (phi_i - lr * grad loss(phi_i) + lr * strength * anchor) / (1 + lr * strength). The
    quadratic part is solved exactly in every step, so a large `strength` needs no small `lr`. The
    minimum is that of plain gradient steps.
    """
    phi = start
    yield phi
    for batch in batches:
        moved = add(add(phi, slope(loss, phi, batch), -lr), anchor, lr * strength)
        phi = {name: value / (1 + lr * strength) for name, value in moved.items()}
        yield phi


def with_pull(loss: Loss, anchor: Params, strength: float) -> Loss:
    """Return loss(phi) + strength / 2 * ||phi - anchor||^2, as a loss of phi."""
    base, terms = _parts(loss)
    return Penalised(base, (*terms, Pull(anchor, strength)))


def with_slope(loss: Loss, added: Params) -> Loss:
    """Return loss(phi) + <added, phi>, as a loss of phi: `added` is added to its gradient."""
    base, terms = _parts(loss)
    return Penalised(base, (*terms, Slope(added)))


def gradient_and_hessian(loss: Callable[[Params], Tensor], at: Params) -> tuple[Params, Callable[[Params], Params]]:
    """Return (grad loss(at), v -> H v), where H is the Hessian of `loss` at `at`.

    H is never formed. The product is exact, by reverse mode twice.
    """
    if not (is_transformed() or _whole.get()):
        return _hessian_by_autograd(loss, at)
    pulled: tuple[Params, Callable[[Params], tuple[Params]]] = vjp(grad(loss), at)  # type: ignore[assignment]
    gradient, times = pulled

    def times_hessian(v: Params) -> Params:
        # Reverse mode gives v^T H, which is H v, since a Hessian is symmetric.
        return times(v)[0]

    return gradient, times_hessian


def _hessian_by_autograd(loss: Callable[[Params], Tensor], at: Params) -> tuple[Params, Callable[[Params], Params]]:
    """`gradient_and_hessian` by plain autograd, for a task that is computed by itself."""
    leaves = {name: value.detach().requires_grad_() for name, value in at.items()}
    with torch.enable_grad(), _set(_twice):
        slopes = _slopes(loss(leaves), leaves, again=True)
    curved = [name for name, value in slopes.items() if value.requires_grad]  # where a loss is linear, its gradient is constant

    def times_hessian(v: Params) -> Params:
        if not curved:
            return {name: torch.zeros_like(value) for name, value in at.items()}
        outputs, along = [slopes[name] for name in curved], [v[name] for name in curved]
        found = torch.autograd.grad(outputs, list(leaves.values()), along, retain_graph=True, materialize_grads=True)
        return dict(zip(leaves, found, strict=True))

    return {name: value.detach() for name, value in slopes.items()}, times_hessian


def last(path: Iterator[Params]) -> Params:
    """Return the last element of a path of parameters."""
    phi = next(path)
    for phi in path:  # noqa: B007 - the last one is the result
        pass
    return phi
