"""Lets nodes with a place for it, at the end of a run, adapt the model to their own tasks and keep the result."""

from collections.abc import Sequence

from flwr.app import ArrayRecord, RecordDict
from flwr.serverapp import Grid

from quickbloom.common.wire.messages import KEEP, KeepReply, KeepRequest
from quickbloom.server_app.messaging.exchange import Exchange


def keep_on_nodes(
    grid: Grid, messages: Exchange, keepers: Sequence[int], request: KeepRequest, meta: ArrayRecord, deadline: float
) -> int:
    """Send the nodes `keepers` the model `meta` to adapt and keep. Return how many personal models they keep.

    `deadline`: seconds. Only these numbers are returned. A node that fails is named.
    """
    kept = 0

    def read(_: int, records: RecordDict, __: list[str]) -> None:
        nonlocal kept
        kept += KeepReply.from_records(records).kept

    by_node: dict[int, list[str]] = {node_id: [] for node_id in keepers}
    sent = messages.address(by_node, KEEP, request.round, lambda *_: request.to_records(meta))
    messages.receive(grid.send_and_receive(sent, timeout=deadline), read)
    return kept
