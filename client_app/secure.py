"""This node's part in secure sums: load its state, take one step of `common.wire.secure.protocol`, store the next state.

The state is removed before each step, so a step that fails or is refused ends the session and
cannot be repeated.
"""

import os
from typing import Any, TypeVar

from flwr.app import Message, RecordDict

from quickbloom.client_app.node import Node
from quickbloom.common.wire.secure.messages import (
    KeysReply,
    KeysRequest,
    MaskedReply,
    MaskedRequest,
    RevealReply,
    RevealRequest,
    SharesReply,
    SharesRequest,
    recall,
    remember,
)
from quickbloom.common.wire.secure.protocol import Keys, Masked, SecureError, Shared
from quickbloom.common.wire.secure.updates import Numbers

S = TypeVar("S", Keys, Shared, Masked)


def check_open(node: Node) -> None:
    """Raise SecureError if this node's meta-gradient must not be sent unmasked."""
    if node.run.secure_aggregation:
        raise SecureError("this run has `secure-aggregation`, so no meta-gradient is sent unmasked")
    if node.least_in_sum:
        raise SecureError(
            f"node setting `least-in-sum` is {node.least_in_sum}, so this node takes part only in runs with "
            "`secure-aggregation = true`"
        )


def keys(message: Message, node: Node, state: RecordDict) -> RecordDict:
    """Draw new keys, forget those of an earlier session, and reply with the public ones."""
    request = KeysRequest.from_records(message.content)
    recall(state)
    fresh = Keys.fresh(request.session, os.urandom)
    remember(state, fresh)
    return KeysReply(fresh.public).to_records()


def shares(message: Message, node: Node, state: RecordDict) -> RecordDict:
    """Reply with this node's secrets, split among all nodes of the sum."""
    request = SharesRequest.from_records(message.content)
    stage = _taken(state, request.session, Keys)
    after, made = stage.share(request.peers, request.threshold, node.least_in_sum)
    remember(state, after)
    return SharesReply(made).to_records()


def ready(request: MaskedRequest[Any], state: RecordDict) -> Shared:
    """Return this node's state for the step `masked`. Raises SecureError if there is none."""
    return _taken(state, request.session, Shared)


def masked(stage: Shared, request: MaskedRequest[Any], row: Numbers, state: RecordDict) -> RecordDict:
    """Reply with this node's numbers, masked."""
    opened = stage.mask(row, request.envelopes)
    remember(state, opened.after)
    return MaskedReply(opened.masked).to_records()


def reveal(message: Message, node: Node, state: RecordDict) -> RecordDict:
    """Reply with the shares that unmask the sum; afterwards this node knows nothing of it."""
    request = RevealRequest.from_records(message.content)
    stage = _taken(state, request.session, Masked)
    return RevealReply(stage.reveal(request.survivors, request.dropped)).to_records()


def _taken(state: RecordDict, session: bytes, wanted: type[S]) -> S:
    """Take the stage of this session out of the node's state. Raises SecureError if it is not the one that is wanted."""
    stage = recall(state)
    same = stage is not None and stage.session == session
    if same and isinstance(stage, wanted):
        return stage
    known = f"it is at the step after '{type(stage).__name__.lower()}'" if same else "it knows nothing of this session"
    raise SecureError(f"this node takes each step of a secure sum once and in order, and {known}")
