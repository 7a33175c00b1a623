"""After the roll call: what the training rows of a user's own data show together, for the scale and for the metric.

With `own.scale = "features"` that is the sum of an encoder's features alone, which works in a secure sum and under privacy.

A node tells the count, mean and squared differences of each column, and the number of rows of each class, over all its training
tasks together; no row leaves it. All tasks are standardised by the means and deviations over all nodes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from quickbloom.common.config.run import RunConfig
from quickbloom.common.datasets.own import OwnOptions, is_encoded
from quickbloom.common.datasets.own.columns import Schema
from quickbloom.common.datasets.own.encoded import FEATURES, most_norm
from quickbloom.common.datasets.own.encoded import parts as names_of
from quickbloom.common.datasets.own.scales import TARGET, Moments, scales_of, scales_to_json
from quickbloom.common.errors import ConfigError, DataError, RunError
from quickbloom.common.metric import TO_CHOOSE_BY, chosen_for, named
from quickbloom.common.wire.centring import MASKED_MEANS, MEANS, MeansReply, MeansRequest
from quickbloom.common.wire.messages import WireError
from quickbloom.common.wire.roll_call import MOMENTS, MomentsReply, MomentsRequest, tell_agreed
from quickbloom.common.wire.secure.masks import MOST_NODES
from quickbloom.common.wire.secure.protocol import LEAST_NODES
from quickbloom.server_app.events.channel import Events, Warn
from quickbloom.server_app.federation.private.privacy import TaskPrivacy
from quickbloom.server_app.federation.private.secure_sum import SecureSum
from quickbloom.server_app.messaging.answers import answers
from quickbloom.server_app.messaging.clock import clock_of
from quickbloom.server_app.messaging.exchange import Exchange, TooFewError
from quickbloom.server_app.messaging.population import Population

Array = np.ndarray[Any, Any]

_ROUNDING = 1e-3
"""Rounding in the sum of one node."""


def share_scales(grid: Grid, config: RunConfig, population: Population, warn: Warn) -> list[int]:
    """Give `population` the scales that all nodes are to use, and return the training rows of each class, [] if unknown.

    Does nothing for other data than a user's own, and with `own.scale = "task"`. A node without a usable answer is named,
    and its rows do not count. Raises RunError if there is no answer at all.
    """
    own = config.table(config.dataset)
    if not isinstance(own, OwnOptions) or own.scale != "shared":
        return []
    schema = Schema.from_json(population.spec.schema)
    answers = _ask(grid, config, population, schema, warn)
    if not answers:
        raise RunError("no node told the means of its columns: the log above names the reasons")
    if schema.has_numbers:
        _set_scales(population, schema, [answer.moments for answer in answers], own.target_deviation)
    counts = [answer.classes for answer in answers if len(answer.classes) == len(schema.classes)]
    return [sum(of_class) for of_class in zip(*counts, strict=True)]


def _set_scales(
    population: Population, schema: Schema, moments: Sequence[Mapping[str, Moments]], target_deviation: float
) -> None:
    _set(population, schema, *scales_of(moments, target_deviation))


def _set(population: Population, schema: Schema, columns: dict[str, list[float]], target: list[float]) -> None:
    """Give `population` these scales of columns, and of the target."""
    try:
        scaled = replace(schema, scales=columns, target_scale=target).checked()
    except (TypeError, ValueError) as error:  # a sum of what was finite may not be
        raise DataError(f"the columns of the nodes have no common scale ({error}): set `own.scale` to task") from None
    population.scales = scales_to_json(columns, target)
    population.spec = replace(population.spec, schema=scaled.to_json())


def share_means(
    grid: Grid, config: RunConfig, population: Population, events: Events, privacy: TaskPrivacy | None = None
) -> None:
    """Give `population` the mean of the encoder's features over the rows of all training tasks, by which they are centred.

    Does nothing unless `own.scale = "features"` and there are features. With `secure-aggregation` only the sum over all nodes
    is seen. With `privacy` each task's mean counts alike, is of bounded norm, and the mean of them gets noise, which the
    account holds. Raises RunError if no sum can be had.
    """
    if not centres(config, population):
        return
    schema = Schema.from_json(population.spec.schema)
    columns, size = sorted(name for name, kind in schema.features.items() if kind == FEATURES), int(schema.encoder["size"])
    hosts = _training_hosts(population)
    if config.secure_aggregation:
        if len(hosts) < LEAST_NODES:
            return  # the run says that it cannot train so, and ends
        if len(hosts) > MOST_NODES:
            events.warn(f"The mean of the features is over {MOST_NODES} of {len(hosts)} nodes, the most of a secure sum")
            hosts = dict(list(hosts.items())[:MOST_NODES])
    means = _Means(grid, config, population, events, len(columns), size, privacy is not None)
    total, _ = means.securely(hosts) if config.secure_aggregation else means.openly(hosts)
    if privacy:
        parts = np.split(privacy.noisy_mean(total, most_norm(len(columns))), len(columns))
    else:
        parts = [part[:size] / max(part[size], 1.0) for part in np.split(total, len(columns))]
    named = zip(columns, parts, strict=True)
    scales = {part: [float(value), 1.0] for name, mean in named for part, value in zip(names_of(name, size), mean, strict=True)}
    _set(population, schema, scales, [])


def centres(config: RunConfig, population: Population) -> bool:
    """Return whether the run centres an encoder's features by a mean of their own."""
    own = config.table(config.dataset)
    return isinstance(own, OwnOptions) and own.scale == "features" and is_encoded(population.spec)


def _training_hosts(population: Population) -> dict[int, list[str]]:
    """Return the training tasks of every node that hosts some."""
    by_node: dict[int, list[str]] = {}
    for task_id in population.splits["train"]:
        by_node.setdefault(population.homes[task_id], []).append(task_id)
    return by_node


@dataclass(frozen=True)
class _Means:
    """The question for the sum of the features. `by_task`: see `MeansRequest`."""

    grid: Grid
    config: RunConfig
    population: Population
    events: Events
    columns: int
    size: int
    by_task: bool

    @property
    def length(self) -> int:
        """Numbers of a sum."""
        return self.columns * (self.size + (not self.by_task))

    def most(self, task_ids: Sequence[str]) -> int:
        """Return the largest weight of these tasks."""
        tasks = [self.population.tasks[task_id] for task_id in task_ids]
        return len(tasks) if self.by_task else sum(task.num_support + task.num_query for task in tasks)

    def flaw(self, total: Array, weight: float, task_ids: Sequence[str], nodes: int = 1) -> str:
        """Return why honest nodes cannot have this sum; "" if they can. Features have length 1; `hypot` does not overflow."""
        most, rounding = self.most(task_ids), nodes * _ROUNDING
        if not -rounding <= weight <= most + rounding:
            return f"its weight is {weight:g}, and the tasks asked for can have at most {most}"
        parts = np.split(total, self.columns)
        if self.by_task:
            return "" if math.hypot(*total) <= most_norm(self.columns) * most + rounding else "its sum is too long"
        ends = [math.hypot(*part[:-1]) <= part[-1] + rounding and part[-1] <= most + rounding for part in parts]
        return "" if all(ends) else "its sum is longer than so many features can be"

    def openly(self, by_node: Mapping[int, list[str]]) -> tuple[Array, float]:
        """Return the sum of what the nodes tell. A node without a usable answer is named. Raises RunError if there is none."""
        messages = []
        for node_id, task_ids in by_node.items():
            records = MeansRequest(task_ids, self.by_task).to_records()
            tell_agreed(records, self.population.agreed)
            messages.append(Message(records, node_id, MEANS))

        def read(node_id: int, records: RecordDict) -> MeansReply:
            said = MeansReply.from_records(records, self.length)
            if reason := self.flaw(np.array(said.total), said.weight, by_node[node_id]):
                raise WireError(reason)
            return said

        found, reasons = answers(self.grid, messages, self.config.node_deadline, read)
        for node_id, reason in reasons.items():
            self.events.warn(f"Node {node_id} does not count in the mean of the features: {reason}")
        if not found:
            raise RunError("no node told the sum of its features: the log above names the reasons")
        said = [found[node_id] for node_id in sorted(found)]
        return np.sum([one.total for one in said], axis=0), sum(one.weight for one in said)

    def securely(self, by_node: Mapping[int, list[str]]) -> tuple[Array, float]:
        """Return the same by one secure sum. Raises RunError if too many nodes dropped out."""
        exchange = Exchange(self.config, self.population, self.events, clock_of(self.grid))
        exchange.begin()
        like = {"features": torch.zeros(self.length, dtype=torch.float64)}

        def request(task_ids: list[str]) -> MeansRequest:
            return MeansRequest(task_ids, self.by_task)

        steps = SecureSum(
            self.config, self.grid, exchange, 0, by_node, request, like, None, self.config.round_deadline, MASKED_MEANS
        )
        try:
            totals, nodes = steps.totals()
            weight = max(totals.weight, 0.0)
            total = totals.gradient["features"].numpy() * weight
            asked = [task_id for node_id in nodes for task_id in by_node[node_id]]
            if reason := self.flaw(total, weight, asked, len(nodes)):
                raise exchange.too_few(f"the sum of the nodes cannot be right: {reason}")
        except TooFewError as few:
            raise RunError(f'the features cannot be centred: {few}; with `own.scale = "task"` they are not') from None
        return total, weight


def metric_for(config: RunConfig, population: Population, counts: Sequence[int], warn: Warn) -> str:
    """Return the name of what the run is scored by. `counts`: training rows of each class.

    With `metric = "auto"` that is `common.metric.chosen_for` these counts. Raises ConfigError for a metric of other data.
    """
    kind = population.spec.kind
    if config.metric != "auto":
        if named(config.metric).kind != kind:
            fitting = ", ".join(name for name in TO_CHOOSE_BY if named(name).kind == kind)
            raise ConfigError(f"`metric` must be one of {fitting} for {kind}, got '{config.metric}'")
        return config.metric
    chosen = chosen_for(kind, counts)
    if chosen == population.spec.metric:
        return chosen.name
    warn(
        f"{100 * max(counts) / sum(counts):.0f} % of the training rows are of one class, so the balanced accuracy decides, "
        "in which every class counts alike: set `metric` to another score if you want that"
    )
    return chosen.name


def _check(said: MomentsReply, schema: Schema, rows: int) -> None:
    """Raise WireError unless a node told of its inputs, and a number to predict, alone and of no more than its `rows`."""
    known = schema.numeric_inputs | (set() if schema.classes else {TARGET})
    if foreign := sorted(said.moments.keys() - known):
        raise WireError(f"its answer is about a column '{foreign[0]}', which is no input of numbers")
    if max([one.count for one in said.moments.values()], default=0) > rows or sum(said.classes) > rows:
        raise WireError(f"its answer is about more than the {rows} rows of its training tasks")


def _ask(grid: Grid, config: RunConfig, population: Population, schema: Schema, warn: Warn) -> list[MomentsReply]:
    """Return the usable answers of nodes that host training tasks, in the order of the nodes."""
    by_node = _training_hosts(population)
    messages = []
    for node_id, task_ids in by_node.items():
        records = MomentsRequest(task_ids).to_records()
        tell_agreed(records, population.agreed)
        messages.append(Message(records, node_id, MOMENTS))

    def read(node_id: int, records: RecordDict) -> MomentsReply:
        said = MomentsReply.from_records(records)
        tasks = [population.tasks[task_id] for task_id in by_node[node_id]]
        _check(said, schema, sum(task.num_support + task.num_query for task in tasks))
        return said

    found, reasons = answers(grid, messages, config.node_deadline, read)
    for node_id, reason in reasons.items():
        warn(f"Node {node_id} does not count in the means of the columns: {reason}")
    return [found[node_id] for node_id in sorted(found)]
