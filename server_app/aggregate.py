"""From the nodes' replies to one meta-gradient."""

from collections.abc import Sequence

from common.params import Params, weighted_mean
from common.wire import TrainReply


def mean_over_tasks(replies: Sequence[TrainReply]) -> Params:
    """The weighted mean over all tasks, however they are spread over nodes: a node's mean counts with its sum of weights."""
    return weighted_mean((reply.gradient, reply.weight) for reply in replies if reply.weight > 0)
