"""Reasons in words why a node gave no result."""

from flwr.app import Message

from quickbloom.common.errors import as_told
from quickbloom.common.flower import names
from quickbloom.common.wire.messages import error_reason

UNFINISHED = "it announced a reply, but had not uploaded all of it in time"
"""Reason for a node that died while it sent a reply, or whose link is slow."""

SILENT = "it did not answer"
"""Beginning of the reason for a node from which nothing came in time."""
_GONE = f"error {names.NODE_UNAVAILABLE}:"
"""Beginning of the reason for a node that Flower does not reach."""


def is_gone(reason: str) -> bool:
    """Return whether a node without an answer for this reason was not reached, so that it may answer the next time."""
    return reason.startswith(_GONE) or reason == UNFINISHED


def failure(reply: Message) -> str | None:
    """Return why a reply carries no result; None if it may carry one."""
    if reply.has_error() and reply.error.code == names.MESSAGE_UNAVAILABLE:
        return UNFINISHED
    if reply.has_error():
        lines = [line.strip() for line in (reply.error.reason or "").splitlines() if line.strip()]
        return f"error {reply.error.code}: {as_told(lines[-1]) if lines else 'no reason given'}"
    return error_reason(reply.content)
