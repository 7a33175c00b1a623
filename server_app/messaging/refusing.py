"""Tells nodes that do not take part why, so that the owners of the devices learn it there."""

from collections.abc import Iterable, Mapping
from logging import INFO

from flwr.app import Message
from flwr.serverapp import Grid

from quickbloom.common.flower.names import log
from quickbloom.common.wire.refusal import KINDS, REFUSED, Misfit, Refusal
from quickbloom.server_app.messaging.failures import SILENT, is_gone

_LAST_WORDS = 10.0
"""Most seconds that a run which cannot begin waits for its nodes to hear why: after its end nothing reaches them."""


def misfit_of(reason: str) -> str:
    """Return what does not fit, without a word of the node: it may quote its data."""
    if isinstance(reason, Misfit):
        return KINDS[reason.kind]
    return "no answer" if is_gone(reason) or reason.startswith(SILENT) else "a fault of its own"


def tell_refused(
    grid: Grid, reasons: Mapping[int, str], hearing: Iterable[int], *, last: bool = False, within: float = 0.0
) -> None:
    """Tell those nodes among `hearing` that are refused the reason. `last`: wait, at most `within` seconds, as the run ends.

    Otherwise nobody waits, and the answers are of no interest.
    """
    told = {node_id: Refusal.of(reasons[node_id]) for node_id in sorted(set(hearing) & reasons.keys())}
    if not told:
        return
    for node_id, refusal in told.items():
        log(INFO, "Node %s is told that it does not take part: %s", node_id, KINDS[refusal.kind])
    messages = [Message(refusal.to_records(), node_id, REFUSED) for node_id, refusal in told.items()]
    if last:
        list(grid.send_and_receive(messages, timeout=min(within, _LAST_WORDS)))
    else:
        grid.push_messages(messages)
