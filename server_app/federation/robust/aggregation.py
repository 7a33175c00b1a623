"""Aggregates the nodes' replies to one meta-gradient: the mean over tasks, or a rule that resists some malicious nodes.

Symbols of the papers: n replies, f of them malicious, d numbers in each. The mean weighs tasks, so
their distribution over nodes does not matter. For the other rules the reply of a node is the unit.
A node that lies about a gradient also lies about its weight, so every reply with any weight counts
the same, and the result does depend on which tasks share a node.

With `bucketing` s the votes of a rule are the means of random groups of s replies (Karimireddy, He,
Jaggi 2022, "Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing").
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quickbloom.common.config.run import RunConfig
from quickbloom.common.maths.params import Params, add_weighted, weighted_mean, zeros
from quickbloom.common.randomness import generator
from quickbloom.common.wire.messages import TrainReply

_WEISZFELD_STEPS = 200


def mean_over_tasks(replies: Sequence[TrainReply]) -> Params:
    """Return the weighted mean over all tasks of all nodes: a node's mean counts with its sum of weights."""
    return weighted_mean((reply.gradient, reply.weight) for reply in replies if reply.weight > 0)


class RunningMean:
    """The same mean of replies that arrive one after the other; only the sum is kept.

    `like`: tensors of the shapes and types of the meta-gradients.
    """

    def __init__(self, like: Params) -> None:
        self._like = like
        self._total: Params | None = None
        self._weight = 0.0

    def add(self, reply: TrainReply) -> TrainReply:
        """Add a reply, which must fit `like`. Returns it without its gradient."""
        if reply.weight > 0:
            self._total = self._total or zeros(self._like)
            weight = torch.tensor([reply.weight], dtype=torch.float64)
            for name, total in self._total.items():
                add_weighted(total, reply.gradient[name].unsqueeze(0), weight)
            self._weight += reply.weight
        reply.gradient.clear()
        return reply

    def result(self) -> Params:
        """Return the mean of at least one added reply with weight. The sum is used up."""
        if self._total is None:
            raise ValueError("a weighted mean needs at least one reply with a positive weight")
        total, self._total = self._total, None
        return {name: total.pop(name).div_(self._weight).to(value.dtype) for name, value in self._like.items()}


# ---- rules on updates [n, d], which return d numbers


def median(updates: Tensor, f: int) -> Tensor:
    """Return the coordinate-wise median.

    Yin, Chen, Ramchandran, Bartlett 2018, "Byzantine-Robust Distributed Learning", option I.
    """
    ordered, n = updates.sort(dim=0).values, len(updates)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def trimmed_mean(updates: Tensor, f: int) -> Tensor:
    """Return the mean of every coordinate without its f largest and f smallest numbers (Yin et al. 2018, option II)."""
    return updates.sort(dim=0).values[f : len(updates) - f].mean(dim=0)


def krum(updates: Tensor, f: int) -> Tensor:
    """Return the update that is closest to its neighbours.

    Blanchard, El Mhamdi, Guerraoui, Stainer 2017, "Machine Learning with Adversaries", s. 3.
    """
    return updates[_krum_scores(updates, f).argmin()]


def multi_krum(updates: Tensor, f: int) -> Tensor:
    """Return the mean of the m = n - f - 2 updates with the best scores of Krum (the same paper, s. 4)."""
    best = _krum_scores(updates, f).argsort(stable=True)[: len(updates) - f - 2]
    return updates[best].mean(dim=0)


def _krum_scores(updates: Tensor, f: int) -> Tensor:
    """Return s(i): the sum of squared distances to the n - f - 2 nearest others."""
    distances = torch.cdist(updates, updates, compute_mode="donot_use_mm_for_euclid_dist").square().fill_diagonal_(torch.inf)
    return distances.sort(dim=1).values[:, : len(updates) - f - 2].sum(dim=1)


def geometric_median(updates: Tensor, f: int) -> Tensor:
    """Return the point with the least sum of distances, by the smoothed Weiszfeld algorithm.

    Pillutla, Kakade, Harchaoui 2022, "Robust Aggregation for Federated Learning", Algorithm 2, with
    all weights equal: z <- sum_i beta_i x_i / sum_i beta_i, beta_i = 1 / max(nu, |z - x_i|).

    Every z is a mean of the x_i, so distances come from their inner products, and a step costs n^2
    instead of n d. The updates are shifted by their median, because large malicious ones would cost
    digits.
    """
    start = median(updates, f)
    x = updates - start
    products = x @ x.T
    squares = products.diagonal()
    nu = float(1e-6 * squares.sqrt().median())
    distances, share = squares.sqrt(), torch.zeros_like(squares)
    for _ in range(_WEISZFELD_STEPS):
        before = share
        beta = 1 / distances.clamp(min=max(nu, 1e-300))
        share = beta / beta.sum()
        if (share - before).abs().sum() < 1e-9:
            break
        distances = (squares - 2 * products @ share + share @ products @ share).clamp(min=0).sqrt()
    return start + share @ x


@dataclass(frozen=True)
class Beside:
    """What some rules have beside the updates.

    `centre`: d numbers, the result of the round before, None in the first one. `radius`: tau, 0 for
    the median distance of the updates to the centre, at every step. `steps`: how often the centre moves.
    `root`: d numbers, what the server computed of its root set, None without one.
    """

    centre: Tensor | None = None
    radius: float = 0.0
    steps: int = 3
    root: Tensor | None = None


def centered_clip(updates: Tensor, f: int, beside: Beside) -> Tensor:
    """Return the centre v after its steps v <- v + mean_i clip(x_i - v, tau), clip(y, tau) = min(1, tau / |y|) y.

    Karimireddy, He, Jaggi 2021, "Learning from History for Byzantine Robust Optimization", where tau
    is a constant. Fewer than half of the updates lie, so a median distance is never above all honest
    ones. The first round has no history, and starts at the coordinate-wise median: at zero, honest
    updates that agree would be clipped as much as lies.
    """
    v = median(updates, f) if beside.centre is None else beside.centre.clone()
    for _ in range(beside.steps):
        apart = updates - v
        distances = torch.linalg.vector_norm(apart, dim=1)
        tau = torch.tensor(beside.radius, dtype=v.dtype) if beside.radius else distances.median()
        # An update at the centre has nothing to clip.
        shares = torch.where(distances > tau, tau / distances, 1.0)
        v += shares @ apart / len(updates)
    return v


def fltrust(updates: Tensor, f: int, beside: Beside) -> Tensor:
    """Return sum_i t_i |g_0| / |g_i| g_i / sum_i t_i, with the trust scores t_i = max(0, cos(g_i, g_0)).

    Cao, Fang, Liu, Gong 2021, "FLTrust", Algorithm 2; g_0 is the server's own update. If no update has a positive score, which
    the paper leaves open, the result is g_0: the only one that is trusted.
    """
    if beside.root is None:
        raise ValueError("`fltrust` needs the update of a root set")
    # Every update at length 1, and 0 if it has none.
    directions = updates / torch.linalg.vector_norm(updates, dim=1, keepdim=True).clamp(min=1e-300)
    length = torch.linalg.vector_norm(beside.root)
    trust = (directions @ beside.root / length.clamp(min=1e-300)).clamp(min=0)
    if trust.sum() == 0:
        return beside.root
    found: Tensor = length * (trust @ directions) / trust.sum()
    return found


def in_buckets(updates: Tensor, size: int, rng: np.random.Generator) -> Tensor:
    """Return the means of random groups of `size` updates, [n / size rounded up, d]; the last group may be smaller."""
    order = torch.from_numpy(rng.permutation(len(updates)))
    return torch.stack([updates[group].mean(dim=0) for group in torch.split(order, size)])


@dataclass(frozen=True)
class Rule:
    """A rule. `combine(updates, f, beside)`: from [n, d] to d numbers. `least(f)`: smallest meaningful number of votes.

    `remembers`: a round starts from the result of the one before.
    """

    combine: Callable[[Tensor, int, Beside], Tensor]
    least: Callable[[int], int]
    remembers: bool = False


def _of_one_round(combine: Callable[[Tensor, int], Tensor], least: Callable[[int], int]) -> Rule:
    return Rule(lambda updates, f, _: combine(updates, f), least)


RULES: dict[str, Rule] = {
    "median": _of_one_round(median, lambda f: 2 * f + 1),
    "trimmed-mean": _of_one_round(trimmed_mean, lambda f: 2 * f + 1),
    "krum": _of_one_round(krum, lambda f: 2 * f + 3),
    "multi-krum": _of_one_round(multi_krum, lambda f: 2 * f + 3),
    "geometric-median": _of_one_round(geometric_median, lambda f: 2 * f + 1),
    "centered-clip": Rule(centered_clip, lambda f: 2 * f + 1, remembers=True),
    "fltrust": Rule(fltrust, lambda f: 1),
}
"""Values of `aggregate` besides "mean"."""


def remembers(rule: str) -> bool:
    """Return whether a round of `rule` starts from the result of the one before."""
    return rule != "mean" and RULES[rule].remembers


def too_few(rule: str, malicious: float, replies: int, bucketing: int = 1) -> str | None:
    """Return why `rule` cannot work with so many replies, `bucketing` of them in a bucket, in words; None if it can."""
    if rule == "mean":
        return None
    f, votes = _liars(malicious, replies), -(-replies // bucketing)
    least = RULES[rule].least(f)
    if votes >= least:
        return None
    counted, unit = f"{replies} node{'s' * (replies != 1)}", "nodes"
    if bucketing > 1:
        counted, unit = f"{counted} in {votes} bucket{'s' * (votes != 1)} (`bucketing = {bucketing}`)", "buckets"
    return f"with {counted} `malicious = {malicious:g}` means {f}, and `{rule}` then needs at least {least} {unit}"


def aggregate(
    rule: str,
    malicious: float,
    replies: Sequence[TrainReply],
    *,
    bucketing: int = 1,
    rng: np.random.Generator | None = None,
    centre: Params | None = None,
    radius: float = 0.0,
    steps: int = 3,
    root: Params | None = None,
) -> Params:
    """Return one meta-gradient from at least one reply with weight; `malicious`: share of replies that may lie, rounded up.

    `bucketing`: replies in a bucket, drawn by `rng`. `centre`, `radius`, `steps`, `root`: as of `Beside`, {} for no centre.
    """
    if rule == "mean":
        return mean_over_tasks(replies)
    gradients = [reply.gradient for reply in replies if reply.weight > 0]
    like = gradients[0]
    if not like:  # an algorithm that sends nothing
        return {}
    updates = torch.stack([_in_a_row(gradient, like) for gradient in gradients])
    # A liar spoils one bucket at most, so f stays as it is.
    f = _liars(malicious, len(updates))
    if bucketing > 1:
        if rng is None:
            raise ValueError("buckets need a random generator")
        updates = in_buckets(updates, bucketing, rng)
    beside = Beside(_in_a_row(centre, like) if centre else None, radius, steps, _in_a_row(root, like) if root else None)
    parts = torch.split(RULES[rule].combine(updates, f, beside), [value.numel() for value in like.values()])
    return {name: part.view(like[name].shape).to(like[name].dtype) for name, part in zip(like, parts, strict=True)}


def aggregate_round(
    config: RunConfig, replies: Sequence[TrainReply], number: int, centre: Params, root: Params | None = None
) -> Params:
    """Return the meta-gradient of round `number` by the settings of a run; `centre`: of the round before, {} if none.

    `root`: what the server computed of its root set, where the rule needs it.

    The buckets are a function of (seed, round) and of the order of the replies.
    """
    return aggregate(
        config.aggregate,
        config.malicious,
        replies,
        bucketing=config.bucketing,
        rng=generator(config.seed, "buckets", number),
        centre=centre,
        radius=config.clip_radius,
        steps=config.clip_steps,
        root=root,
    )


def _in_a_row(gradient: Params, like: Params) -> Tensor:
    """Return all numbers in float64, in the order of `like`: by name, since every node orders its tensors differently."""
    return torch.cat([gradient[name].double().flatten() for name in like])


def _liars(malicious: float, replies: int) -> int:
    return math.ceil(malicious * replies - 1e-9)
