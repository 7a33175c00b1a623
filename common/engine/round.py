"""One node's computation in a round, without Flower: stack the tasks, map the algorithm over them, average.

Tasks of different sizes are padded with examples of weight 0. `torch.func.vmap` maps over them in
chunks that bound the memory (`common.engine.mapping`). A model that mixes the examples of a batch (batch norm) would see the
padding, so its tasks are grouped by exact size instead.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from quickbloom.common.algorithms.base import Algorithm
from quickbloom.common.engine.chunking import AutoChunks, at_once, chunks, is_alone, pieces, rows_at_once
from quickbloom.common.engine.compiling import Auto, Contribute, compiled, mapped
from quickbloom.common.engine.mapping import over_tasks
from quickbloom.common.maths.batch import Batch, Episode, Minibatches, TaskData
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params, add_weighted, weighted_quotient, zeros

_SQUARED_AT_ONCE = 2**20
"""Numbers of a task that are squared at once."""


@dataclass(frozen=True)
class TaskWork:
    """One task's draw in this round, and the generator of (seed, round, task) for the algorithm's own draws.

    `kept`: the task's state on its node since an earlier round; None for a new task.
    """

    data: TaskData
    rng: np.random.Generator
    kept: Params | None = None

    @property
    def num_examples(self) -> int:
        # By `shape`, here and below: len() of a tensor takes 50 times as long, which matters with a hundred small tasks.
        return self.data.support.x.shape[0] + self.data.query.x.shape[0]


@dataclass(frozen=True)
class RoundResult:
    """The result of a node's tasks in a round.

    `gradient`: weighted mean of the tasks' meta-gradients; zero if no task contributed. `weight`:
    sum of the weights in that mean. `losses`: every task's query loss after adaptation, in the
    order asked for; NaN for a task without examples or with numbers that are not finite. Such a
    task contributes nothing else. `kept`: every task's new state on its node; a task with numbers
    that are not finite keeps its old state. `within`: number of tasks that did not need clipping; 0
    without `clip`.
    """

    gradient: Params
    weight: float
    losses: list[float]
    kept: list[Params]
    within: float = 0.0


def run_round(
    algorithm: Algorithm,
    meta: Params,
    work: Sequence[TaskWork],
    chunk_size: int | AutoChunks,
    *,
    compile: bool | Auto = False,
    clip: float = 0.0,
) -> RoundResult:
    """Return the mean meta-gradient over the tasks in `work`, mapping at most `chunk_size` tasks at once.

    `compile`: True compiles with torch.compile, `Auto` decides by itself; the numbers are equal up
    to rounding. True raises ConfigError if compiling fails. `clip`: a task's meta-gradient with a
    larger norm is scaled down to it, and all tasks weigh 1; 0: neither.
    """
    total: Params = {}
    first: tuple[Params, Tensor] | None = None  # a single chunk with all tasks needs no sum beside it
    total_weight, within = 0.0, 0.0
    losses = [float("nan")] * len(work)
    kept = [algorithm.fresh() if w.kept is None else w.kept for w in work]
    for some in _stacks(algorithm, work, chunk_size, compile):
        numbers = [1.0 if clip else algorithm.weight(work[i].num_examples) for i in some.positions]
        weights = torch.tensor(numbers, dtype=torch.float64, device=algorithm.learner.device)
        plain = not some.kept and some.seed is None
        summed = algorithm.sum_up(meta, some.episode, some.minibatches, weights, clip) if plain else None
        if summed is not None:
            finite, norms, of_part = summed.norms.isfinite(), summed.norms, summed.losses
            weights = weights * finite
            total = total or zeros(meta)
            for name, value in algorithm.with_zero_head(summed.total).items():
                total[name] += value
        else:
            part = _contributed(algorithm, meta, some, compile)
            finite, norms, of_part = part.finite, task_norms(part.gradients) if clip else weights, part.losses
            weights = weights * finite
            scaled = weights * (clip / norms.clamp(min=clip)) if clip else weights
            if len(some.positions) == len(work):
                first = part.gradients, scaled
            else:
                total = total or zeros(meta)
                for name, value in part.gradients.items():
                    add_weighted(total[name], value, scaled)
            for t in finite.nonzero().flatten().tolist() if part.kept else ():
                kept[some.positions[t]] = {name: value[t] for name, value in part.kept.items()}
            del part  # free its memory before the next chunk
        total_weight += float(weights.sum())
        within += float((weights * (norms <= clip)).sum()) if clip else 0.0
        # As lists: reading one element of a tensor takes as long as a step of a small task.
        for position, is_finite, loss in zip(some.positions, finite.tolist(), of_part.tolist(), strict=True):
            losses[position] = loss if is_finite else losses[position]
    divisor = max(total_weight, 1e-300)
    if first is not None:
        values, weights = first
        gradient = {name: weighted_quotient(values[name], weights, divisor, like.dtype) for name, like in meta.items()}
    else:
        gradient = {name: value.div_(divisor).to(meta[name].dtype) for name, value in (total or zeros(meta)).items()}
    return RoundResult(gradient, total_weight, losses, kept, within)


@dataclass(frozen=True)
class _Stack:
    """Some of a round's tasks with a leading task axis: their `positions` in the round, and their state `kept` so far.

    `seed`: of the random numbers of the only task, where the model has any in training.
    """

    positions: list[int]
    episode: Episode
    minibatches: Minibatches
    kept: Params
    seed: int | None = None


def _stacks(
    algorithm: Algorithm, work: Sequence[TaskWork], chunk_size: int | AutoChunks, compile: bool | Auto = False
) -> Iterator[_Stack]:
    """Yield all tasks in stacks of `chunk_size`, without those that have no support or query and contribute nothing."""
    device = algorithm.learner.device
    whole = [i for i, w in enumerate(work) if all(_sizes(w.data))]
    # State comes from a record or a file, hence on the CPU; a fresh state is already on the model's device.
    kept = [algorithm.fresh() if w.kept is None else {name: value.to(device) for name, value in w.kept.items()} for w in work]
    drawn = {i: algorithm.minibatch_indices(work[i].num_examples, work[i].rng) for i in whole}
    # Random numbers of several tasks would depend on which are computed together, and on their padding.
    random = algorithm.learner.dropout
    most = 1 if random else at_once(algorithm.learner, chunk_size)
    room = rows_at_once(work[whole[0]].data.support.x) if whole else 0
    in_place = algorithm.descends_in_place and not compile
    alone = {i: in_place and _is_alone(algorithm.learner, work[i], drawn[i]) for i in whole}
    for alike in _alike(whole, drawn, alone):
        few = 1 if alone[alike[0]] else most
        every = chunks([_sizes(work[i].data) for i in alike], few, exact=algorithm.learner.mixes_examples)
        rows = [work[i].num_examples for i in alike]
        for found in (piece for chunk in every for piece in pieces(chunk, rows, room)):
            positions = [alike[i] for i in found]
            chosen = [work[i] for i in positions]
            episode = Episode(stack([w.data.support for w in chosen], device), stack([w.data.query for w in chosen], device))
            num_support = [w.data.support.x.shape[0] for w in chosen]
            minibatches = _stack_minibatches([drawn[i] for i in positions], num_support, episode, device)
            before = {name: torch.stack([kept[i][name] for i in positions]) for name in kept[positions[0]]}
            seed = int(work[positions[0]].rng.integers(2**63)) if random else None
            yield _Stack(positions, episode, minibatches, before, seed)


def _is_alone(learner: Learner, work: TaskWork, drawn: np.ndarray[Any, Any] | None) -> bool:
    x = work.data.support.x
    return is_alone(learner, x, x.shape[0] if drawn is None else drawn.shape[1])


def _alike(
    whole: Sequence[int], drawn: Mapping[int, np.ndarray[Any, Any] | None], alone: Mapping[int, bool]
) -> list[list[int]]:
    """Return the tasks in groups that may be computed together, or are all computed one by one.

    Those of a group take equally many inner steps: with epochs, who has more examples takes more of them.
    """
    groups: dict[tuple[int, bool], list[int]] = {}
    for i in whole:
        index = drawn[i]
        groups.setdefault((0 if index is None else len(index), alone[i]), []).append(i)
    return list(groups.values())


@dataclass(frozen=True)
class Part:
    """The contributions of some of a round's tasks, with a leading task axis; `positions` are the tasks' places in the round.

    `finite`: False for a task with numbers that are not finite; its gradients are zero here.
    """

    positions: list[int]
    gradients: Params
    losses: Tensor
    kept: Params
    finite: Tensor


def contributions(
    algorithm: Algorithm, meta: Params, work: Sequence[TaskWork], chunk_size: int | AutoChunks, *, compile: bool | Auto = False
) -> Iterator[Part]:
    """Yield every task's meta-gradient by itself, before weighting, clipping and averaging; `chunk_size` tasks at once."""
    for some in _stacks(algorithm, work, chunk_size, compile):
        yield _contributed(algorithm, meta, some, compile)


def _contributed(algorithm: Algorithm, meta: Params, some: _Stack, compile: bool | Auto) -> Part:
    if some.seed is None:
        return _part(some.positions, *_contribute(algorithm, compile)(meta, some.kept, some.episode, some.minibatches))
    with algorithm.learner.training(some.seed):
        return _part(some.positions, *mapped(algorithm)(meta, some.kept, some.episode, some.minibatches))


def _part(positions: list[int], gradients: Params, loss: Tensor, after: Params) -> Part:
    # Contiguous once, instead of in every operation below.
    gradients = {name: value.contiguous() for name, value in gradients.items()}
    finite = _finite_tasks(gradients, after, loss)
    if not finite.all():
        # where(), because 0 * NaN is NaN.
        gradients = {name: torch.where(_over(finite, value), value, 0.0) for name, value in gradients.items()}
    return Part(positions, gradients, loss, after, finite)


def _contribute(algorithm: Algorithm, compile: bool | Auto) -> Contribute:
    if isinstance(compile, Auto):
        return compile.mapped(algorithm)
    return compiled(algorithm) if compile else mapped(algorithm)


def task_norms(gradients: Params) -> Tensor:
    """Return the Euclidean norm of every task's gradient over all tensors: [tasks], float64.

    Each tensor has a leading task axis. Without tensors the result is a single zero.
    """
    squares = [value.double().reshape(len(value), -1).square().sum(dim=1) for value in gradients.values()]
    return torch.stack(squares).sum(dim=0).sqrt() if squares else torch.zeros(1, dtype=torch.float64)


def _over(mask: Tensor, values: Tensor) -> Tensor:
    return mask.view(*mask.shape, *[1] * (values.ndim - mask.ndim))


def evaluate(
    algorithm: Algorithm,
    meta: Params,
    tasks: Sequence[Sequence[TaskData]],
    lrs: Sequence[float],
    steps: int,
    chunk_size: int | AutoChunks,
    kept: Sequence[Params] | None = None,
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Adapt on the support part and score on the test part: (loss, metric), each [tasks, learning rates, steps + 1].

    The metric is accuracy in 0..1, or the mean squared error for regression. Position 0 of the last
    axis is before adaptation. A task with several draws gets their mean. `kept`: the state of every
    task on its node, from which its path starts; None: the tasks are new, and have none.
    """
    draws = [draw for task in tasks for draw in task]
    owner = np.repeat(np.arange(len(tasks)), [len(task) for task in tasks])
    device, chunk_size = algorithm.learner.device, at_once(algorithm.learner, chunk_size)

    def scores(theta: Params, own: Params | None, lr: Tensor, support: Batch, test: Batch) -> tuple[Tensor, Tensor]:
        before, results = None, []
        for phi in path_of(algorithm, theta, own, support, lr, steps):
            # A path that repeats its last element (prototypes) is scored once.
            results.append(results[-1] if phi is before else algorithm.score(phi, test))
            before = phi
        del phi, before  # frees the path's last parameters before the next task's are made
        losses, metrics = zip(*results, strict=True)
        return torch.stack(losses), torch.stack(metrics)

    over_rates = over_tasks(algorithm.learner, scores, (None, None, 0, None, None))
    of_all = over_tasks(algorithm.learner, over_rates, (None, None if kept is None else 0, None, 0, 0))
    rates = torch.tensor(list(lrs), dtype=algorithm.learner.dtype, device=device)
    result = np.full((2, len(draws), len(lrs), steps + 1), np.nan)
    sizes = [(len(d.support.x), len(d.test.x)) for d in draws]
    # Each pair of task and rate has its own parameters; `chunk_size` bounds the number of pairs.
    rates_at_once = min(len(lrs), chunk_size) if isinstance(chunk_size, int) else len(lrs)
    per_chunk = chunk_size // rates_at_once if isinstance(chunk_size, int) else chunk_size
    rows = [sum(size) for size in sizes]
    most = rows_at_once(draws[0].support.x) if draws else 0
    found = chunks(sizes, per_chunk, exact=algorithm.learner.mixes_examples, each=rates_at_once)
    with torch.no_grad():
        for positions in (piece for chunk in found for piece in pieces(chunk, rows, most // rates_at_once)):
            support = stack([draws[i].support for i in positions], device)
            test = stack([draws[i].test for i in positions], device)
            own = None if kept is None else stack_params([kept[owner[i]] for i in positions], device)
            few = max(1, min(rates_at_once, most // max(1, *(rows[i] for i in positions))))  # a task alone may be too large
            for i in range(0, len(lrs), few):
                some = slice(i, i + few)
                quickly = algorithm.scores_along(meta, rates[some], support, test, steps) if own is None else None
                for part, values in enumerate(quickly or of_all(meta, own, rates[some], support, test)):
                    result[part, positions, some] = values.double().cpu().numpy()
    means = np.stack([result[:, owner == task].mean(axis=1) for task in range(len(tasks))], axis=1)
    return means[0], means[1]


def path_of(
    algorithm: Algorithm, meta: Params, kept: Params | None, support: Batch, lr: float | Tensor, steps: int
) -> Iterator[Params]:
    """Yield a task's parameters after 0..steps steps: from what it has `kept`, or as a new task's if that is None.

    Each result may be valid only until the next is requested. It predicts examples by the statistics of the support, unless
    the model is `transductive`.
    """
    if kept is None:
        path = algorithm.passing_path(meta, support, lr, steps)
    else:
        path = algorithm.personal_path(meta, kept, support, lr, steps)
    return algorithm.settled_path(path, support)


def stack_params(states: Sequence[Params], device: torch.device) -> Params:
    """Stack the states of several tasks along a leading task axis."""
    return {name: torch.stack([state[name].to(device) for state in states]) for name in states[0]}


def stack(batches: Sequence[Batch], device: torch.device) -> Batch:
    """Stack batches of several tasks along a leading task axis, padded to the largest with weight 0."""
    if len({batch.x.shape[0] for batch in batches}) == 1:  # there is nothing to pad
        return Batch(*(torch.stack(list(values)).to(device) for values in zip(*batches, strict=True)))
    x, y, weight = (pad_sequence(list(values), batch_first=True) for values in zip(*batches, strict=True))
    # Padding repeats an example, since zeros could make a model overflow where the task itself does not.
    x, y = (torch.where(_over(weight > 0, values), values, values[:, :1]) for values in (x, y))
    return Batch(x.to(device), y.to(device), weight.to(device))


def _stack_minibatches(
    indices: Sequence[np.ndarray[Any, Any] | None], num_support: Sequence[int], episode: Episode, device: torch.device
) -> Minibatches:
    present = [index for index in indices if index is not None]
    if not present:
        empty = torch.zeros(len(indices), 0, 0, device=device)
        return Minibatches(empty.long(), empty)
    sizes, starts = np.array([index.shape[1] for index in present]), np.array(num_support)[:, None, None]
    steps, size = len(present[0]), sizes.max()
    same = all(index.shape[1] == size for index in present)
    index = np.stack(present if same else [np.pad(index, ((0, 0), (0, size - index.shape[1]))) for index in present])
    padding = episode.support.x.shape[1] - starts
    if padding.any():  # query examples follow the padding of the support part
        index = index + padding * (index >= starts)
    weight = torch.from_numpy(np.arange(size) < sizes[:, None]).to(device, episode.support.weight.dtype)
    return Minibatches(torch.from_numpy(index).to(device), weight[:, None].expand(-1, steps, -1))


def _sizes(data: TaskData) -> tuple[int, int]:
    return data.support.x.shape[0], data.query.x.shape[0]


def _finite_tasks(gradients: Params, kept: Params, loss: Tensor) -> Tensor:
    finite = torch.isfinite(loss)
    for value in [*gradients.values(), *kept.values()]:
        # Squares, because a gradient of 1e26 would overflow Adam's second moment and stop its weights for good.
        finite &= torch.isfinite(_squares(value.reshape(value.shape[0], -1)))
    return finite


def _squares(rows: Tensor) -> Tensor:
    """Return the sum of squares of every row."""
    if rows.shape[1] <= _SQUARED_AT_ONCE:
        return rows.square().sum(dim=1)
    # In pieces, since all squares together would take as much memory again.
    return torch.stack([piece.square().sum(dim=1) for piece in torch.split(rows, _SQUARED_AT_ONCE, dim=1)]).sum(dim=0)
