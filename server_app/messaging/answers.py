"""One question to each node, outside the rounds: every node has an answer or a reason."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from quickbloom.common.errors import as_told
from quickbloom.common.wire.checks import WireError
from quickbloom.server_app.messaging.failures import SILENT, failure

_Read = TypeVar("_Read")


def answers(
    grid: Grid, messages: Sequence[Message], deadline: float, read: Callable[[int, RecordDict], _Read], question: str = ""
) -> tuple[dict[int, _Read], dict[int, str]]:
    """Send the messages, one to each node, and return (answers, reasons of nodes without a valid one), both by node id.

    `read`: makes something of a node's answer, or raises WireError, whose words are then the reason. `deadline`: in
    seconds. `question`: names it in the reason of a node that is silent, such as "the roll call".
    """
    replies = list(grid.send_and_receive(messages, timeout=deadline))
    sent = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
    found: dict[int, _Read] = {}
    silent = " ".join(filter(None, [SILENT, question, f"within {deadline:g} s"]))
    reasons = dict.fromkeys(sent.values(), silent)
    for reply in replies:
        node_id = sent.get(reply.metadata.reply_to_message_id)
        if node_id is None:
            continue
        if (reason := failure(reply)) is not None:
            reasons[node_id] = reason
            continue
        try:
            found[node_id] = read(node_id, reply.content)
        except WireError as error:
            reasons[node_id] = as_told(str(error), 600)
        else:
            del reasons[node_id]
    return found, reasons
