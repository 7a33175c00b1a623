"""This node's part in secure sums: load its state, take one step of `common.wire.secure.protocol`, store the next state.

The state is removed before each step, so a step that fails or is refused ends the session and
cannot be repeated. The sum of an encoder's features is here as well, which is told plainly where nothing is to be hidden.
"""

import os
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import ConfigRecord, Message, RecordDict

from quickbloom.client_app.node import Node
from quickbloom.common.datasets.own import Own
from quickbloom.common.datasets.own.text import Array
from quickbloom.common.wire.centring import MeansReply, MeansRequest
from quickbloom.common.wire.messages import WireError
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
from quickbloom.common.wire.secure.updates import Numbers, to_row

S = TypeVar("S", Keys, Shared, Masked)
_MEANS = "means"


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


# ---- the mean of an encoder's features


def means(message: Message, node: Node, state: RecordDict) -> RecordDict:
    """Reply with the sum of the features of the requested tasks."""
    request = MeansRequest.from_records(message.content)
    check_open(node)
    total, weight = _sum_of_features(node, request)
    return MeansReply(total.tolist(), weight).to_records()


def masked_means(message: Message, node: Node, state: RecordDict) -> RecordDict:
    """Reply with the same, masked for a secure sum; once in a run, since two sums over other nodes tell the difference."""
    request = MaskedRequest.from_records(message.content, MeansRequest)
    stage = ready(request, state)
    if _MEANS in state:
        raise WireError("this node has told the sum of its features in this run already")
    total, weight = _sum_of_features(node, request.of)
    row = to_row({"features": torch.from_numpy(total / max(weight, 1e-300))}, weight, [], 0.0)
    state[_MEANS] = ConfigRecord({"told": True})
    return masked(stage, request, row, state)


def _sum_of_features(node: Node, request: MeansRequest) -> tuple[Array, float]:
    task_ids = node.check_hosted(request.task_ids)
    if not isinstance(node.dataset, Own):
        raise WireError("only the data set `own` has columns")
    if node.dataset.options.scale != "features":
        raise WireError("this run does not centre features by their mean (`own.scale`), so no sum is told")
    if node.run.privacy.on and not request.by_task:
        raise WireError("this run has `privacy`, so every task counts alike in the mean of the features")
    total, weight = node.dataset.feature_sum(task_ids, by_task=request.by_task)
    return np.asarray(total, dtype=np.float64), weight
