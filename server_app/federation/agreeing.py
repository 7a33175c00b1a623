"""After the roll call: what the training rows of a user's own data show together, for the scale and for the metric.

A node tells the count, mean and squared differences of each column, and the number of rows of each class, over all its training
tasks together; no row leaves it. All tasks are standardised by the means and deviations over all nodes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from quickbloom.common.config.run import RunConfig
from quickbloom.common.datasets.own import OwnOptions
from quickbloom.common.datasets.own.columns import Schema
from quickbloom.common.datasets.own.scales import TARGET, Moments, scales_of, scales_to_json
from quickbloom.common.errors import ConfigError, DataError, RunError
from quickbloom.common.metric import TO_CHOOSE_BY, chosen_for, named
from quickbloom.common.wire.messages import WireError
from quickbloom.common.wire.roll_call import MOMENTS, MomentsReply, MomentsRequest, tell_agreed
from quickbloom.server_app.events.channel import Warn
from quickbloom.server_app.messaging.answers import answers
from quickbloom.server_app.messaging.population import Population


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
    columns, target = scales_of(moments, target_deviation)
    try:
        scaled = replace(schema, scales=columns, target_scale=target).checked()
    except (TypeError, ValueError) as error:  # a sum of what was finite may not be
        raise DataError(f"the columns of the nodes have no common scale ({error}): set `own.scale` to task") from None
    population.scales = scales_to_json(columns, target)
    population.spec = replace(population.spec, schema=scaled.to_json())


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
    by_node: dict[int, list[str]] = {}
    for task_id in population.splits["train"]:
        by_node.setdefault(population.homes[task_id], []).append(task_id)
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
