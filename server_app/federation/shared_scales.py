"""After the roll call: the means and deviations by which all tasks of a user's own data are standardised.

They are those of the training tasks' rows. A node tells the count, mean and squared differences of each column, over all its
training tasks together; no row leaves it.
"""

from collections.abc import Mapping
from dataclasses import replace

from flwr.app import Message
from flwr.serverapp import Grid

from quickbloom.common.config.run import RunConfig
from quickbloom.common.datasets.own import OwnOptions
from quickbloom.common.datasets.own.columns import Schema
from quickbloom.common.datasets.own.scales import Moments, scales_of, scales_to_json
from quickbloom.common.errors import DataError, RunError, as_told
from quickbloom.common.wire.messages import WireError
from quickbloom.common.wire.roll_call import MOMENTS, MomentsReply, MomentsRequest, tell_agreed
from quickbloom.server_app.events.channel import Warn
from quickbloom.server_app.messaging.failures import failure
from quickbloom.server_app.messaging.population import Population


def share_scales(grid: Grid, config: RunConfig, population: Population, warn: Warn) -> None:
    """Ask for the moments of the training rows, and give `population` the scales that all nodes are to use.

    Does nothing for data without columns, and with `own.scale = "task"`. A node without a usable answer is named, and its
    rows do not count. Raises RunError if there is no answer at all.
    """
    own = config.table(config.dataset)
    if not isinstance(own, OwnOptions) or own.scale != "shared":
        return
    schema = Schema.from_json(population.spec.schema)
    if not schema.has_numbers:
        return
    moments = _ask(grid, config, population, warn)
    if not moments:
        raise RunError("no node told the means of its columns: the log above names the reasons")
    columns, target = scales_of(list(moments.values()), own.target_deviation)
    try:
        scaled = replace(schema, scales=columns, target_scale=target).checked()
    except (TypeError, ValueError) as error:  # a sum of what was finite may not be
        raise DataError(f"the columns of the nodes have no common scale ({error}): set `own.scale` to task") from None
    population.scales = scales_to_json(columns, target)
    population.spec = replace(population.spec, schema=scaled.to_json())


def _ask(grid: Grid, config: RunConfig, population: Population, warn: Warn) -> Mapping[int, Mapping[str, Moments]]:
    """Return the moments of every node that hosts training tasks and gave a usable answer."""
    by_node: dict[int, list[str]] = {}
    for task_id in population.splits["train"]:
        by_node.setdefault(population.homes[task_id], []).append(task_id)
    messages = []
    for node_id, task_ids in by_node.items():
        records = MomentsRequest(task_ids).to_records()
        tell_agreed(records, population.agreed)
        messages.append(Message(records, node_id, MOMENTS))
    replies = list(grid.send_and_receive(messages, timeout=config.node_deadline))
    sent = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
    found: dict[int, Mapping[str, Moments]] = {}
    reasons = dict.fromkeys(by_node, f"it did not answer within {config.node_deadline:g} s")
    for reply in replies:
        node_id = sent.get(reply.metadata.reply_to_message_id)
        if node_id is None:
            continue
        reason = failure(reply)
        if reason is None:
            try:
                found[node_id] = MomentsReply.from_records(reply.content).moments
                del reasons[node_id]
                continue
            except WireError as error:
                reason = as_told(str(error), 600)
        reasons[node_id] = reason
    for node_id, reason in reasons.items():
        warn(f"Node {node_id} does not count in the means of the columns: {reason}")
    return {node_id: found[node_id] for node_id in sorted(found)}
