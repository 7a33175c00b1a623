"""This node's part in the mean of an encoder's features: the sum over its training rows, plain or masked, and no row."""

import numpy as np
import torch
from flwr.app import ConfigRecord, Message, RecordDict

from quickbloom.client_app import secure
from quickbloom.client_app.node import Node
from quickbloom.common.datasets.own import Own
from quickbloom.common.datasets.own.text import Array
from quickbloom.common.wire.centring import MeansReply, MeansRequest
from quickbloom.common.wire.messages import WireError
from quickbloom.common.wire.secure.messages import MaskedRequest
from quickbloom.common.wire.secure.updates import to_row

_KEPT = "means"


def means(message: Message, node: Node, state: RecordDict) -> RecordDict:
    """Reply with the sum of the features of the requested tasks."""
    request = MeansRequest.from_records(message.content)
    secure.check_open(node)
    total, weight = _sum(node, request)
    return MeansReply(total.tolist(), weight).to_records()


def masked_means(message: Message, node: Node, state: RecordDict) -> RecordDict:
    """Reply with the same, masked for a secure sum; once in a run, since two sums over other nodes tell the difference."""
    request = MaskedRequest.from_records(message.content, MeansRequest)
    stage = secure.ready(request, state)
    if _KEPT in state:
        raise WireError("this node has told the sum of its features in this run already")
    total, weight = _sum(node, request.of)
    row = to_row({"features": torch.from_numpy(total / max(weight, 1e-300))}, weight, [], 0.0)
    state[_KEPT] = ConfigRecord({"told": True})
    return secure.masked(stage, request, row, state)


def _sum(node: Node, request: MeansRequest) -> tuple[Array, float]:
    task_ids = node.check_hosted(request.task_ids)
    if not isinstance(node.dataset, Own):
        raise WireError("only the data set `own` has columns")
    if node.dataset.options.scale != "features":
        raise WireError("this run does not centre features by their mean (`own.scale`), so no sum is told")
    if node.run.privacy.on and not request.by_task:
        raise WireError("this run has `privacy`, so every task counts alike in the mean of the features")
    total, weight = node.dataset.feature_sum(task_ids, by_task=request.by_task)
    return np.asarray(total, dtype=np.float64), weight
