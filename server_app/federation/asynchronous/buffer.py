"""The replies that make one outer step: their mean, or one vote of each node for a rule that resists some malicious nodes."""

import math
from collections import Counter
from dataclasses import replace

from quickbloom.common.config.run import RunConfig
from quickbloom.common.maths.params import Params, weighted_mean
from quickbloom.common.wire.messages import TrainReply
from quickbloom.server_app.federation.robust.aggregation import RunningMean, aggregate_round, too_few


class Buffer:
    """What has come in for one outer step. `like`: tensors of the shapes and types of the meta-gradients.

    `losses`: of the tasks that have contributed; `staleness`: how many of them by their staleness; `dropped`: tasks that were
    too stale; `useless`: tasks that were answered for nothing.
    """

    def __init__(self, like: Params, config: RunConfig) -> None:
        self._mean = RunningMean(like) if config.aggregate == "mean" else None
        self._config = config
        self._by_node: dict[int, list[TrainReply]] = {}
        self.losses: list[float] = []
        self.staleness: Counter[int] = Counter()
        self.dropped = self.useless = 0

    @property
    def tasks(self) -> int:
        """Tasks that have contributed."""
        return len(self.losses)

    def is_full(self, tasks: int) -> bool:
        """Return whether so many tasks have contributed, of enough nodes for a rule that compares nodes."""
        return self.tasks >= tasks and self.too_few is None

    @property
    def too_few(self) -> str | None:
        """Return why a rule that compares nodes cannot work with those that have contributed; None if it can."""
        return too_few(self._config.aggregate, self._config.malicious, len(self._by_node), self._config.bucketing)

    def add(self, node_id: int, reply: TrainReply, staleness: int, exponent: float) -> None:
        """Add the reply of a node; its meta-gradient is scaled by its staleness."""
        finite = [loss for loss in reply.losses if math.isfinite(loss)]
        self.losses += finite
        if not finite:
            return
        self.staleness[staleness] += len(finite)
        if staleness and exponent:
            factor = float((1 + staleness) ** -exponent)
            reply = replace(reply, gradient={name: value * factor for name, value in reply.gradient.items()})
        if self._mean:
            self._mean.add(reply)
        else:
            self._by_node.setdefault(node_id, []).append(reply)

    def result(self, number: int, centre: Params) -> Params:
        """Return the meta-gradient of step `number`. A node is one vote, however often it has answered.

        `centre`: as of `aggregate_round`.
        """
        if self._mean:
            return self._mean.result()
        votes = []
        # By node, so that buckets do not depend on who was faster.
        for _, replies in sorted(self._by_node.items(), key=lambda one: one[0]):
            weight = sum(reply.weight for reply in replies)
            losses = [loss for reply in replies for loss in reply.losses]
            votes.append(TrainReply(weighted_mean((one.gradient, one.weight) for one in replies), weight, losses))
        return aggregate_round(self._config, votes, number, centre)
