"""The baselines of a run: one linear model of all tasks from sums, and the scores by model and baselines of every task that
is scored, held out or a seen user.

They cost up to three messages to each node after the last round, and need no training.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from flwr.app import RecordDict
from flwr.serverapp import Grid

from quickbloom.common import scores
from quickbloom.common.baselines.global_ridge import MOST_FEATURES, GlobalModel, Sums, fit
from quickbloom.common.config.run import RunConfig
from quickbloom.common.maths.params import Params
from quickbloom.common.metric import Metric, named
from quickbloom.common.wire.arrays import to_arrays
from quickbloom.common.wire.baselines import SCORES, SUMS, ScoresReply, ScoresRequest, SumsReply, SumsRequest
from quickbloom.common.wire.checks import WireError
from quickbloom.server_app.events.channel import Warn
from quickbloom.server_app.federation.reply_checks import ROUNDING
from quickbloom.server_app.messaging.exchange import Exchange
from quickbloom.server_app.messaging.population import Population


@dataclass(frozen=True)
class TaskScores:
    """Scores [tasks, contenders, scores] of tasks, sorted by id; contenders and scores as in `ScoresReply`."""

    task_ids: list[str]
    values: np.ndarray[Any, Any]

    def of(self, task_ids: Collection[str]) -> "TaskScores":
        """Return those of some tasks, as far as they are there."""
        wanted = set(task_ids)
        places = [place for place, task_id in enumerate(self.task_ids) if task_id in wanted]
        return TaskScores([self.task_ids[place] for place in places], self.values[places])


@dataclass(frozen=True)
class Final:
    """What is scored: the model `meta` after `round`, adapted in `steps` steps with rate `lr`. `lineage` names the training."""

    meta: Params
    lr: float
    steps: int
    round: int
    lineage: str = ""


def score_baselines(
    grid: Grid,
    config: RunConfig,
    population: Population,
    messages: Exchange,
    final: Final,
    warn: Warn,
    seen: Sequence[str] = (),
) -> TaskScores:
    """Return the scores of tasks by the trained model, before and after adaptation, and by the baselines.

    These are the held-out tasks, and the training tasks in `seen`, which have been scored as seen users. Tasks of nodes that
    fail are missing, and are named.
    """
    spec = population.spec
    shared = _shared(grid, config, population, messages, warn)
    encoded, names = to_arrays(final.meta), scores.names(spec.kind)

    def request(_: int, task_ids: list[str]) -> RecordDict:
        of_seen = not held_out.issuperset(task_ids)
        asked = ScoresRequest({}, final.lr, final.steps, task_ids, shared, final.round, final.lineage, of_seen)
        return asked.to_records(encoded)

    found: dict[str, np.ndarray[Any, Any]] = {}

    def read(_: int, records: RecordDict, task_ids: list[str]) -> None:
        told = ScoresReply.from_records(records, len(task_ids), len(names)).scores
        for column, name in enumerate(names):
            check_range(told[..., column], named(name))
        found.update(zip(task_ids, told, strict=True))

    held_out = {*population.splits["validation"], *population.splits["test"]}
    for tasks in (population.splits["validation"] + population.splits["test"], list(seen)):
        if tasks:
            _ask(grid, config, messages, messages.hosts(tasks, final=True), SCORES, request, read)
    ids = sorted(found)
    return TaskScores(ids, np.stack([found[one] for one in ids]) if ids else np.empty((0, 0, len(names))))


def _shared(grid: Grid, config: RunConfig, population: Population, messages: Exchange, warn: Warn) -> GlobalModel | None:
    """Return the linear model of all training tasks.

    None where sums must not be sent, where there are too many inputs, or where the sums are none of rows.
    """
    spec = population.spec
    inputs = prod(spec.input_shape)
    if not config.shows_sums_of_nodes or spec.tokens or inputs > MOST_FEATURES:
        return None
    parts: list[Sums] = []

    def read(_: int, records: RecordDict, __: list[str]) -> None:
        parts.append(SumsReply.from_records(records, inputs, spec.outputs).sums)

    by_node = messages.hosts(population.splits["train"], final=True)
    _ask(grid, config, messages, by_node, SUMS, lambda _, task_ids: SumsRequest(task_ids).to_records(), read)
    if not parts:
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        found = fit(Sums.joined(parts), classes=spec.kind == "classification")
    if found is None:
        warn("The sums of the nodes give no linear model for all tasks, so there is no such baseline")
    return found


def check_range(values: np.ndarray[Any, Any], metric: Metric) -> None:
    """Raise WireError unless a score lies where it can: NaN is unknown, only R2 can be negative, and shares are at most 1."""
    most = 1 + ROUNDING if metric.bounded or metric.share else np.inf
    if (values > most).any() or (metric.name != "r2" and (values < -ROUNDING).any()):
        raise WireError(f"`scores` hold what is no {metric.title}")


def _ask(
    grid: Grid, config: RunConfig, messages: Exchange, by_node: Mapping[int, list[str]], kind: str, request: Any, read: Any
) -> None:
    sent = messages.address(by_node, kind, config.rounds, request)
    messages.receive(grid.send_and_receive(sent, timeout=config.round_deadline), read)
