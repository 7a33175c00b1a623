"""Differential privacy at the level of a task: what the outer optimizer sees hides whether any one task took part.

McMahan, Ramage, Talwar, Zhang 2018, "Learning Differentially Private Recurrent Language Models" (Algorithm 1, with a fixed
denominator); the clipping norm may adapt as in Andrew, Thakkar, McMahan, Ramaswamy 2021, "Differentially Private Learning with
Adaptive Clipping" (Algorithm 1). A round is one Gaussian mechanism on a Poisson sample of the training tasks:

    every training task takes part with probability q, by itself (the draw is secret, unlike every other in this program)
    its node scales its meta-gradient down to norm C; all tasks weigh 1
    g = (sum of what came + N(0, (z C)^2) in every number) / (q * number of training tasks)

The neighbouring relation is adding or removing one task. The denominator is fixed, so tasks that fail only make g smaller.
With `noise = "tree"` nobody is drawn, and the noise of the rounds is correlated: see `tree_noise`.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quickbloom.common.config.privacy import LEAST_CLIP, MOST_CLIP, PrivacyOptions
from quickbloom.common.maths.params import Params
from quickbloom.common.randomness import generator
from quickbloom.common.system.extras import needs
from quickbloom.common.wire.messages import TrainReply
from quickbloom.server_app.federation.private.tree_noise import Epochs
from quickbloom.server_app.federation.private.tree_noise import epsilon as tree_epsilon

Bytes = Callable[[int], bytes]
Array = np.ndarray[Any, Any]

_SUMMANDS = 4
"""Number of normal numbers that are summed for one: their known last bits then do not reveal the sum (Holohan, Braghin 2021,
"Secure Random Sampling in Differential Privacy")."""


class TaskPrivacy:
    """Sampling, noise, clipping norm and account of one run. `train`: training tasks; `per_round`: expected number in a round.

    `released`: noisy steps so far, including any that a crash made the server forget; `ledger` gets
    a line before each. Raises ConfigError if the package that keeps the account is missing.
    """

    def __init__(
        self,
        options: PrivacyOptions,
        train: int,
        per_round: int,
        ledger: "Ledger | None" = None,
        *,
        centres: bool = False,
        task_seed: int = 0,
    ) -> None:
        """`centres`: the run centres an encoder's features before its first round, which the account holds from the start.

        `task_seed`: with `noise = "tree"` it decides on the rounds of every task.
        """
        require_accountant()
        self.options = options
        self.train = train
        self.centre = options.centre_noise if centres else 0.0
        self.clip = options.clip
        self.released = ledger.released() if ledger else 0
        self.epochs: Epochs | None = None
        if options.noise == "tree":
            self.epochs = Epochs(task_seed, max(1, round(train / per_round)), ledger.levels() if ledger else 0)
        self.per_round = train / self.epochs.length if self.epochs else per_round
        self.sampling = self.per_round / train
        self._ledger = ledger
        seed = options.noise_seed
        self._bytes: Bytes = os.urandom if seed < 0 else generator(seed, "privacy", self.released).bytes
        # Noise on the sum of bits (within the clipping norm or not): the paper's m / 20, limited so that it costs not all.
        self.count_noise = max(per_round / 20, options.noise_multiplier)

    @property
    def noise_multiplier(self) -> float:
        """z of the meta-gradient. If the norm adapts, it and the bits together cost `noise-multiplier`.

        See Theorem 1.
        """
        z = self.options.noise_multiplier
        return (z**-2 - (2 * self.count_noise) ** -2) ** -0.5 if self.options.clip_quantile else z

    def choose(self, task_ids: Sequence[str], server_round: int = 1) -> list[str]:
        """Return a Poisson sample of these tasks, or with a tree those whose turn it is in this round (from 1)."""
        if self.epochs:
            return [name for name in task_ids if self.epochs.turn(name, server_round)]
        return [name for name, u in zip(task_ids, uniform(len(task_ids), self._bytes), strict=True) if u < self.sampling]

    def mean(self, replies: Sequence[TrainReply], like: Params, server_round: int = 1) -> Params:
        """Return the noisy mean meta-gradient of the tasks chosen for this round.

        This counts as released, and the clipping norm adapts.
        """
        levels = self.epochs.begin(server_round) if self.epochs else None
        self.released += 1
        if self._ledger:
            self._ledger.add(self.epsilon(self.released), levels)
        deviation = self.noise_multiplier * self.clip
        result = {}
        for name, value in like.items():
            noise = torch.from_numpy(self._noise(name, value.numel())).view(value.shape)
            total = sum((reply.gradient[name].double() * reply.weight for reply in replies), torch.zeros_like(noise))
            result[name] = ((total + deviation * noise) / self.per_round).to(value.dtype)
        if self.options.clip_quantile:
            self._adapt(replies)
        return result

    def _noise(self, name: str, count: int) -> Array:
        """Return the noise of this round for a tensor of so many numbers, in units of its deviation."""

        def draw() -> Array:
            return normal(count, self._bytes)

        return self.epochs.noise(name, draw) if self.epochs else draw()

    def noisy_mean(self, total: Array, most: float) -> Array:
        """Return the mean over all training tasks of one vector from each, float64. `total`: their sum, [n].

        One Gaussian mechanism without sampling: a vector has norm `most` or less, so noise N(0, (centre-noise * most)^2) in
        every number. The denominator is the number of training tasks, also if some are missing in the sum.
        """
        if not self.centre:
            raise ValueError("the account of this run does not hold a mean")
        if self._ledger:
            self._ledger.add_centre(self.centre, self.epsilon(self.released))
        seed = self.options.noise_seed
        source: Bytes = os.urandom if seed < 0 else generator(seed, "centre").bytes
        found: Array = (total + self.centre * most * normal(len(total), source)) / self.train
        return found

    def _adapt(self, replies: Sequence[TrainReply]) -> None:
        """Set C <- C exp(-rate (b - quantile)); b: noisy share of tasks within C. A task moves the sum of bits by +-1/2."""
        centred = sum(reply.within - reply.weight / 2 for reply in replies)
        noise = float(normal(1, self._bytes)[0])
        share = (centred + self.count_noise * noise) / self.per_round + 0.5
        power = -self.options.clip_rate * (share - self.options.clip_quantile)
        self.clip = min(max(self.clip * math.exp(min(max(power, -100.0), 100.0)), LEAST_CLIP), MOST_CLIP)

    def epsilon(self, steps: int) -> float:
        """Return epsilon after so many noisy steps, for the `delta` of the settings. With a tree: no fewer than `released`."""
        if self.epochs:
            levels = self.epochs.levels_after(steps - self.released)
            return tree_epsilon(self.options.noise_multiplier, levels, self.options.delta, self.centre)
        return epsilon(self.options.noise_multiplier, self.sampling, steps, self.options.delta, self.centre)

    def steps_within_budget(self, most: int) -> int:
        """Return how many of `most` more noisy steps the budget allows."""
        if not self.options.epsilon:
            return most

        def allowed(steps: int) -> bool:
            return self.epsilon(self.released + steps) <= self.options.epsilon

        low, high = 0, most + 1  # `low` steps are allowed, `high` are not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if allowed(middle) else (low, middle)
        return low

    def record(self) -> dict[str, Any]:
        """Return the entry in the history and the summary: the account so far, and its parameters."""
        return {
            "epsilon": self.epsilon(self.released),
            "delta": self.options.delta,
            "steps": self.released,
            "sampling": self.sampling,
            "noise_multiplier": self.options.noise_multiplier,
            "clip": self.clip,
            **({"centre_noise": self.centre} if self.centre else {}),
            **({"epoch": self.epochs.length, "levels": self.epochs.levels} if self.epochs else {}),
        }


class Ledger:
    """The file privacy.jsonl of a run: a line for every noisy step, on the disk before the step's result is used.

    A checkpoint alone is not enough: a step that a crash made the server forget may have reached
    the nodes. Nor is the ledger: a checkpoint may be copied without it. The larger of the two
    counts.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def released(self) -> int:
        """Return the steps so far. An unfinished line counts, and a line may record steps that stand nowhere else."""
        steps = 0
        for line in self._path.read_bytes().splitlines() if self._path.exists() else ():
            if _is_centre(line):
                continue
            steps = max(steps + 1, _count_in(line, "step", 0))
        return steps

    def levels(self) -> int:
        """Return the levels of all trees so far. A line that does not say what it adds, or is unfinished, adds at most one."""
        lines = self._path.read_bytes().splitlines() if self._path.exists() else ()
        return sum(_count_in(line, "levels", 1) for line in lines if not _is_centre(line))

    def add(self, spent: float, levels: int | None = None) -> None:
        """Count a step. `levels`: that it adds to those of the trees, where there are any."""
        self._append({"step": self.released() + 1, "epsilon": spent, **({} if levels is None else {"levels": levels})})

    def add_centre(self, noise: float, spent: float) -> None:
        """Count the mean of the features, before it is made."""
        self._append({"centre": noise, "epsilon": spent})

    def at_least(self, steps: int, levels: int | None = None) -> None:
        """Count at least so many steps, known from a checkpoint, which may have been copied without its ledger, or be newer.

        `levels`: at least so many of them as well; None: there are no trees.
        """
        more = max((levels or 0) - self.levels(), 0)
        if steps > self.released() or (levels is not None and more):
            entry = {"step": max(steps, self.released()), "from": "checkpoint"}
            self._append(entry if levels is None else {**entry, "levels": more})

    def take_over(self, other: "Ledger") -> None:
        """Begin with the steps of another run, from whose checkpoint this one continues, if they are more."""
        if other._path.exists() and other.released() > self.released():
            self._path.write_bytes(other._path.read_bytes())

    def _append(self, entry: dict[str, Any]) -> None:
        # On a new line, also after an unfinished one.
        torn = self._path.exists() and not self._path.read_bytes().endswith(b"\n") and self._path.stat().st_size > 0
        with self._path.open("a", encoding="utf-8") as file:
            file.write("\n" * torn + json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _count_in(line: bytes, key: str, otherwise: int) -> int:
    """Return a count of a line of the ledger; `otherwise` for a line that is unfinished, or has none."""
    try:
        count = json.loads(line)[key]
    except (ValueError, KeyError, TypeError):
        return otherwise
    return count if type(count) is int and count >= 0 else otherwise


def _is_centre(line: bytes) -> bool:
    """Return whether a line is about the mean of the features, and no step."""
    try:
        entry = json.loads(line)
    except ValueError:
        return False
    return isinstance(entry, dict) and set(entry) == {"centre", "epsilon"}


def require_accountant() -> None:
    """Raise ConfigError unless `dp_accounting` can be imported."""
    needs("privacy", "dp_accounting.rdp", "`privacy.noise-multiplier` above 0")


@cache
def epsilon(noise_multiplier: float, sampling: float, steps: int, delta: float, centre: float = 0.0) -> float:
    """Return epsilon of `steps` Gaussian mechanisms on Poisson samples, by Renyi divergences (Mironov, Talwar, Zhang 2019).

    `centre`: the noise multiplier of one more mechanism, on all tasks; 0: there is none.
    """
    import dp_accounting
    from absl import logging
    from dp_accounting.rdp import RdpAccountant

    # It warns of every order that it omits because a series does not converge: epsilon is the least of the others.
    logging.set_verbosity(logging.ERROR)
    if steps == 0 and not centre:
        return 0.0
    accountant = RdpAccountant()
    if centre:
        accountant.compose(dp_accounting.GaussianDpEvent(centre))
    if steps:
        event = dp_accounting.PoissonSampledDpEvent(sampling, dp_accounting.GaussianDpEvent(noise_multiplier))
        accountant.compose(event, steps)
    return float(accountant.get_epsilon(delta))


def uniform(count: int, source: Bytes) -> np.ndarray[Any, Any]:
    """Return numbers strictly between 0 and 1, of 52 bits each: with one more, half a step below 1 would be rounded to 1."""
    bits = np.frombuffer(source(8 * count), dtype=np.uint64) >> np.uint64(12)
    return (bits + 0.5) * 2.0**-52


def normal(count: int, source: Bytes) -> np.ndarray[Any, Any]:
    """Return standard normal numbers, by Box and Muller, as random as the bytes that they are made of."""
    total = np.zeros(count)
    for _ in range(_SUMMANDS):
        u, v = uniform(2 * count, source).reshape(2, count)
        total += np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * v)
    return total / math.sqrt(_SUMMANDS)
