"""Objectives of what a model makes of examples: their embeddings, computed once, and the gradient through them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import vmap

from quickbloom.common.maths.batch import Batch, Episode, in_one_piece
from quickbloom.common.maths.fast_paths import Summed
from quickbloom.common.maths.kernels.derivatives import is_differentiated, outputs, sum_of_pulls
from quickbloom.common.maths.kernels.network import Network
from quickbloom.common.maths.kernels.train import Round, known_in_part
from quickbloom.common.maths.kernels.train import Summed as SummedPulls
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params

_ROWS = 256
"""Most rows of tasks that are embedded as one batch."""


@dataclass(frozen=True)
class Embedding:
    """A model, or all of it but its last layer.

    `module`, with the parameters `names`, gives the embeddings, beside which `ones` has a column of ones. `apply` is the same
    as a function of parameters and inputs.
    """

    learner: Learner
    module: nn.Module
    names: list[str]
    apply: Callable[[Params, Tensor], Tensor]
    ones: bool = False

    def embedded(self, params: Params, episode: Episode) -> Episode:
        """Return the episode with embeddings in place of inputs."""
        return Episode(*(batch._replace(x=self.apply(params, batch.x)) for batch in episode))


def sum_of_embedded(
    embedding: Embedding,
    objective: Callable[[Params, Episode], Tensor],
    meta: Params,
    episode: Episode,
    weights: Tensor,
    clip: float,
) -> Summed | None:
    """Return the weighted sum over stacked tasks of the gradient of an objective; None if the kernels cannot do it.

    `objective(rest, embedded)`: one task's loss by the parameters that are not the embedding's, and embeddings. `weights`
    [tasks]. A task's gradient is scaled down to the norm `clip` if that is above 0.
    """
    theta = {name: meta[name] for name in embedding.names}
    network = _network(embedding, theta, episode)
    if network is None:
        return None
    rest = {name: value for name, value in meta.items() if name not in theta}
    shared = [theta[name] for name in network.names]
    together = _tasks_together(network, episode)
    found = [_in_blocks(batch.x, together) for batch in episode]
    found = [outputs(network, x, [value[None] for value in shared]) for x in found]
    found = [values.reshape(*batch.weight.shape, -1) for values, batch in zip(found, episode, strict=True)]
    losses, slopes, of_rest = _slopes(objective, rest, found, episode, ones=embedding.ones)
    inputs = [batch.x for batch in episode]
    squares = [value.double().flatten(1).square().sum(dim=1) for value in of_rest.values()]
    beside = torch.stack([torch.zeros_like(weights), *squares]).sum(dim=0)
    most = torch.finfo(losses.dtype).max
    # A single task whose numbers are too large is found by the sum of each.
    simple = not clip and bool((beside <= most).all())
    if simple and (total := _sum_in_blocks(Round(network, shared, weights, 0.0), inputs, slopes, losses, together)):
        summed, factors = total
    else:
        summed, factors = sum_of_pulls(Round(network, shared, weights, clip), inputs, slopes, losses, beside)
    gradient = network.named(summed.total)
    for name, value in of_rest.items():
        # where(), because 0 * NaN is NaN.
        counted = factors.reshape(-1, *[1] * (value.dim() - 1))
        gradient[name] = torch.where(counted != 0, value.double() * counted, 0.0).sum(dim=0)
    return Summed({name: gradient[name] for name in meta}, losses, summed.norms)


def _tasks_together(network: Network, episode: Episode) -> int:
    """Return how many tasks a perceptron embeds as one batch: a few rows alone do not fill a core's registers."""
    if network.blocks[0].is_convolution:
        return 1
    tasks, rows = episode.support.x.shape[0], max(batch.x.shape[1] for batch in episode)
    return max(k for k in range(1, tasks + 1) if tasks % k == 0 and (k == 1 or k * rows <= _ROWS))


def _in_blocks(values: Tensor, together: int) -> Tensor:
    """Return [tasks / together, together * n, ...] of values [tasks, n, ...]."""
    return values.reshape(-1, together * values.shape[1], *values.shape[2:])


def _sum_in_blocks(
    round: Round, inputs: list[Tensor], slopes: list[Tensor], losses: Tensor, together: int
) -> tuple[SummedPulls, Tensor] | None:
    """Return `sum_of_pulls` without norms, whose blocks are tasks together; None if a number of the sum is not finite."""
    finite = losses.isfinite()
    weights = torch.where(finite, round.weights, 0.0)
    scaled = [torch.where(finite[:, None, None], d * weights[:, None, None].to(d.dtype), 0.0) for d in slopes]
    blocks = len(weights) // together
    ones = torch.ones(blocks, dtype=torch.float64)
    whole = replace(round, weights=ones)
    x, d = ([_in_blocks(values, together) for values in some] for some in (inputs, scaled))
    found, _ = sum_of_pulls(whole, x, d, losses.new_zeros(blocks), torch.zeros_like(ones))
    if not found.norms.isfinite().all():
        return None
    norms = torch.where(finite, 0.0, torch.nan).double()
    return found._replace(norms=norms), weights


def _slopes(
    objective: Callable[[Params, Episode], Tensor], rest: Params, found: list[Tensor], episode: Episode, *, ones: bool
) -> tuple[Tensor, list[Tensor], Params]:
    """Return the losses of stacked tasks, and their gradients by the embeddings `found` of support and query, and by `rest`."""

    def loss(rest: Params, support_x: Tensor, query_x: Tensor, support: Batch, query: Batch) -> Tensor:
        if ones:
            support_x, query_x = (torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1) for x in (support_x, query_x))
        return objective(rest, Episode(support._replace(x=support_x), query._replace(x=query_x)))

    # Without the inputs, which are no part of it.
    support, query = (batch._replace(x=batch.weight) for batch in episode)
    # Plain autograd of the sum over tasks, which do not depend on each other: it takes less time than `grad` in `vmap`.
    points = [value.requires_grad_() for value in found]
    leaves = {name: value.expand(points[0].shape[0], *value.shape).detach().requires_grad_() for name, value in rest.items()}
    with torch.enable_grad():
        losses: Tensor = vmap(loss)(leaves, points[0], points[1], support, query)
        slopes = torch.autograd.grad(losses.sum(), [*points, *leaves.values()], materialize_grads=True)
    return losses.detach(), list(slopes[:2]), dict(zip(leaves, slopes[2:], strict=True))


def _network(embedding: Embedding, theta: Params, episode: Episode) -> Network | None:
    """Return the embedding for the kernels if they support it with these parameters and examples, else None."""
    learner = embedding.learner
    away = learner.reduced is not None or learner.device.type != "cpu" or torch.compiler.is_compiling()
    away = away or torch.is_inference_mode_enabled()  # where plain autograd cannot be
    if away or not learner.uses_kernels or type(learner) is not Learner:
        return None
    network = known_in_part(embedding.module)
    if network is None or any(is_differentiated(values) for batch in episode for values in batch):
        return None
    sizes = [(batch.x, batch.x.shape[1]) for batch in episode]
    fit = all(size <= in_one_piece(x.shape[2:]) and network.takes_inputs(theta, x, 2, size) for x, size in sizes)
    return network if fit else None
