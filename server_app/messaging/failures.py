"""Reasons in words why a node gave no result."""

from flwr.app import Message

from quickbloom.common.errors import as_told
from quickbloom.common.flower import names
from quickbloom.common.wire.messages import error_reason

UNFINISHED = "it announced a reply, but had not uploaded all of it in time"
"""Reason for a node that died while it sent a reply, or whose link is slow."""


def failure(reply: Message) -> str | None:
    """Return why a reply carries no result; None if it may carry one."""
    if reply.has_error() and reply.error.code == names.MESSAGE_UNAVAILABLE:
        return UNFINISHED
    if reply.has_error():
        lines = [line.strip() for line in (reply.error.reason or "").splitlines() if line.strip()]
        return f"error {reply.error.code}: {as_told(lines[-1]) if lines else 'no reason given'}"
    return error_reason(reply.content)
