"""Fastest available ways of what algorithms compute: descents, gradients through them, and losses or gradients at their end.

Three ways give the same numbers up to rounding. The kernels (`common/maths/kernels`) are compiled
C++, for the models that they support, on a CPU. A perceptron with its gradient written out in torch
(`common/maths/perceptron.py`) also runs on a GPU. The definition, `inner_loop.descend`,
does everything else and all work inside torch.compile.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quickbloom.common.maths.batch import Batch, Draws, Episode, in_one_piece
from quickbloom.common.maths.inner_loop import (
    PLAIN,
    InnerOptimizer,
    descend,
    descend_at_rates,
    endpoint,
    gradient_and_hessian,
    gradient_and_value,
    last,
)
from quickbloom.common.maths.kernels.derivatives import Descent, Product, is_differentiated, outputs
from quickbloom.common.maths.kernels.network import Network
from quickbloom.common.maths.kernels.train import Kind, Round, Train, What, known, train
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params
from quickbloom.common.maths.perceptron import descend_perceptron, layer_names


def is_written_out(learner: Learner) -> bool:
    """Return whether there is a path that a compiler would not make faster."""
    names = _layers(learner)
    return (names is not None and set(names) == learner.trained.keys()) or has_kernels(learner)


def _layers(learner: Learner) -> list[str] | None:
    """Return the layers of a perceptron that is written out; None for another model, and for one in a shorter number type."""
    return layer_names(learner.module) if learner.reduced is None else None


def has_kernels(learner: Learner) -> bool:
    """Return whether the kernels do the work."""
    network = known(learner.module) if learner.device.type == "cpu" and learner.reduced is None else None
    return network is not None and network.shapes.keys() == learner.trained.keys()


def end_of_descent(
    learner: Learner, start: Params, batches: Batch | Draws, lr: float, optimizer: InnerOptimizer = PLAIN
) -> Params:
    """Return phi_k after one step on each of `batches` [steps, examples, ...]: the last element of `inner_loop.descend`.

    Works under `vmap`. Only for first-order algorithms: the fast paths have no gradient.
    """
    if not optimizer.plain:
        steps = batches.stacked() if isinstance(batches, Draws) else batches
        return endpoint(learner.mean_loss, start, steps.unbind(), lr, optimizer)
    if (network := _network(learner, start, batches)) is not None:
        return network.named(_train("descent", network, start, batches, lr))
    steps = batches.stacked() if isinstance(batches, Draws) else batches
    names = None if torch.compiler.is_compiling() else _layers(learner)
    if names is not None and set(names) == start.keys():
        return descend_perceptron(names, start, steps, lr)
    return endpoint(learner.mean_loss, start, steps.unbind(), lr)


def differentiable_end(
    learner: Learner, start: Params, support: Batch, lr: float, steps: int, rates: Params | None = None
) -> Params:
    """Return phi after `steps` steps on the whole `support`, to take one gradient through with respect to start and rates.

    Works under `vmap` and `torch.func.grad`. `rates`: a rate for each number, with the keys of `start`, by which `lr` is
    multiplied. The kernels compute the gradient step by step, from the last to the first: v <- v - lr H v, with the Hessian of
    the loss at where the step began.
    """
    batches = support.times(steps)
    usable = steps > 0 and learner.uses_kernels and not torch.compiler.is_compiling()
    # There is a gradient by start and rates alone.
    usable = usable and not any(is_differentiated(values) for values in support)
    network = _network(learner, start, batches) if usable else None
    if network is None:
        return last(_rated_path(learner, start, support, lr, steps, rates))
    each = [] if rates is None else [(lr * rates[name])[None] for name in network.names]
    shared = (batches.x[None], batches.y[None], batches.weight[None], *[start[name][None] for name in network.names])
    rate = start[network.names[0]].new_full((1,), lr)
    end = Descent.apply(network, rate, *shared, *each)  # type: ignore[no-untyped-call]
    return network.named([value[0] for value in end])


def _rated_path(
    learner: Learner, start: Params, support: Batch, lr: float | Tensor, steps: int, rates: Params | None
) -> Iterator[Params]:
    if rates is None:
        return descend(learner.mean_loss, start, iter([support] * steps), lr)
    return descend_at_rates(learner.mean_loss, start, support, lr, steps, rates)


def gradient_and_product(learner: Learner, at: Params, batch: Batch) -> tuple[Params, Callable[[Params], Params]]:
    """Return (the gradient of one batch's loss, v -> H v), with H its Hessian, through which no gradient is taken.

    Works under `vmap`.
    """
    network = _network(learner, at, batch.times(1)) if learner.uses_kernels else None
    if network is None:
        return gradient_and_hessian(lambda params: learner.loss(params, batch), at)
    *gradient, _ = _train("gradient", network, at, batch.times(1))

    def times_hessian(v: Params) -> Params:
        given = [params[name][None] for params in (at, v) for name in network.names]
        alone = [value[None] for value in batch.times(1)]
        found = Product.apply(network, *alone, *given)  # type: ignore[no-untyped-call]
        return network.named([value[0] for value in found])

    return network.named(gradient), times_hessian


def gradient_and_loss(learner: Learner, at: Params, batch: Batch) -> tuple[Params, Tensor]:
    """Return (gradient with the keys of `at`, loss) of one batch; works under `vmap`."""
    if (network := _network(learner, at, batch.times(1))) is None:
        return gradient_and_value(learner.mean_loss, at, batch)
    *gradient, loss = _train("gradient", network, at, batch.times(1))
    return network.named(gradient), loss


def loss_of(learner: Learner, at: Params, batch: Batch) -> Tensor:
    """Return the loss of one batch; works under `vmap`."""
    if (network := _network(learner, at, batch.times(1))) is None:
        return learner.loss(at, batch)
    (loss,) = _train("loss", network, at, batch.times(1))
    return loss


def scores_along(
    learner: Learner, start: Params, lrs: Tensor, support: Batch, test: Batch, steps: int
) -> tuple[Tensor, Tensor] | None:
    """Return (loss, metric) of stacked tasks after 0..steps steps on the whole support, each [tasks, rates, steps + 1].

    None if the kernels cannot do it. The metric is `Learner.score`'s; `lrs` [rates].
    """
    network = _network(learner, start, _one_step(support), stacked=1)
    if network is None or not network.takes_inputs(start, test.x, 2, size := test.x.shape[1]):
        return None
    if size > in_one_piece(test.x.shape[2:]) or test.x.shape[2:] != support.x.shape[2:]:
        return None
    tasks, batches = support.x.shape[0], _one_step(support)
    begin = [start[name].expand(tasks, *start[name].shape) for name in network.names]
    before = learner.score_of(outputs(network, test.x, [value[:1] for value in begin]), test)
    found = []
    for lr in lrs:
        params, along = begin, [before]
        for _ in range(steps):
            params = list(train("descent", network, None, lr.expand(tasks), *batches, *params))
            along.append(learner.score_of(outputs(network, test.x, params), test))
        found.append([torch.stack(values, dim=-1) for values in zip(*along, strict=True)])
    losses, metrics = (torch.stack(values, dim=1) for values in zip(*found, strict=True))
    return losses, metrics


@dataclass(frozen=True)
class Summed:
    """The summed contributions of many tasks.

    `total`, and `rates` for rates that are learned: float64. `losses` [tasks]: query losses. `norms` [tasks]: norms of the
    contributions, not finite for a task with a number that is not finite; such a task is left out of the sum.
    """

    total: Params
    losses: Tensor
    norms: Tensor
    rates: Params = field(default_factory=dict)


def sum_of_descents(
    learner: Learner,
    start: Params,
    batches: Batch | Draws,
    query: Batch,
    lr: float,
    weights: Tensor,
    clip: float,
    *,
    of: Kind = "difference",
    rates: Params | None = None,
) -> Summed | None:
    """Return the weighted sum over tasks of their contributions; None if the kernels cannot do it.

    phi is the end of a task's descent, and `of` says what counts: "difference": start - phi; "query": the gradient of the query
    loss at phi; "through": that with respect to the start, and to `rates` with the keys of `start` if they are given, which
    then take the place of `lr`. `weights` [tasks]; `batches` and `query` have a leading task axis. A task's contribution is
    scaled down to the norm `clip` if that is above 0.
    """
    round = _round(learner, start, batches, query, weights, clip)
    if round is None:
        return None
    inner = (
        (batches.rows, batches.x[:, None], batches.y[:, None], batches.weight)
        if isinstance(batches, Draws)
        else (None, *batches)
    )
    names, named = round.network.names, round.network.named
    each = [] if rates is None else [rates[name] for name in names]
    found = round.sum_up(of, lr, inner, _one_step(query), each)
    own, of_rates = found.total[: len(names)], found.total[len(names) :]
    return Summed(named(own), found.losses, found.norms, named(of_rates) if of_rates else {})


def sum_of_meta_steps(
    learner: Learner,
    start: Params,
    episode: Episode,
    steps: int,
    alpha: float,
    beta: float,
    weights: Tensor,
    clip: float,
    *,
    exact: bool,
) -> Summed | None:
    """Return the weighted sum of start - w after local meta-steps w <- w - beta (I - alpha H) v; see `sum_of_descents`.

    v is the gradient of the query loss after a step of size alpha on the support, and H the Hessian of the support's loss, left
    out unless `exact`. All are of stacked tasks.
    """
    support = _one_step(episode.support)
    round = _round(learner, start, support, episode.query, weights, clip)
    if round is None:
        return None
    found = round.sum_of_meta_steps(support, _one_step(episode.query), steps, alpha, beta, exact=exact)
    return Summed(round.network.named(found.total), found.losses, found.norms)


def _round(learner: Learner, start: Params, batches: Batch | Draws, query: Batch, weights: Tensor, clip: float) -> Round | None:
    """Return the round of stacked tasks for the kernels if they support all of it, else None."""
    network = _network(learner, start, batches, stacked=1)
    alike = query.x.shape[2:] == batches.x.shape[2 if isinstance(batches, Draws) else 3 :]
    if network is None or not alike or _network(learner, start, _one_step(query), stacked=1) is None:
        return None
    return Round(network, [start[name] for name in network.names], weights, clip)


def _one_step(batch: Batch) -> Batch:
    """Return stacked batches with an axis of one step."""
    return Batch(*(values[:, None] for values in batch))


def _network(learner: Learner, at: Params, batches: Batch | Draws, *, stacked: int = 0) -> Network | None:
    """Return the model for the kernels if they support it with these parameters and examples, else None.

    `stacked`: number of leading task axes of the examples.
    """
    # Checked first, since a module on the "meta" device does not show where the computing happens.
    away = torch.compiler.is_compiling() or learner.device.type != "cpu" or learner.reduced is not None
    network = None if away else known(learner.module)
    if network is None:
        return None
    first = stacked + (1 if isinstance(batches, Draws) else 2)  # axes before those of one example
    size = batches.weight.shape[-1]
    if size > in_one_piece(batches.x.shape[first:]):  # the kernels have the numbers of all examples in memory at once
        return None
    of_the_kind = (learner.kind == "classification") == (batches.y.dtype == torch.int64) and type(learner) is Learner
    return network if of_the_kind and network.takes(at, batches.x, batches.y, first, size) else None


def _train(what: What, network: Network, at: Params, batches: Batch | Draws, lr: float = 0.0) -> list[Tensor]:
    """Call the kernels for one task; `vmap` extends the call to many."""
    params = [at[name][None] for name in network.names]
    rate = params[0].new_full((1,), lr)
    if isinstance(batches, Draws):
        rows, x, y = batches.rows[None], batches.x[None, None], batches.y[None, None]
    else:
        rows, x, y = None, batches.x[None], batches.y[None]
    end = Train.apply(what, network, rows, rate, x, y, batches.weight[None], *params)  # type: ignore[no-untyped-call]
    return [value[0] for value in end]
