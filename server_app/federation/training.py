"""A round of training: ask the nodes of its tasks, read their replies, combine them, and take one outer step."""

import math
from collections.abc import Callable, Iterable

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from quickbloom.common.algorithms import Algorithm
from quickbloom.common.config.run import RunConfig
from quickbloom.common.errors import RunError
from quickbloom.common.maths.params import Params, all_finite
from quickbloom.common.wire.messages import TRAIN, TrainReply, TrainRequest, to_arrays
from quickbloom.common.wire.secure.protocol import LEAST_NODES
from quickbloom.server_app.events.channel import Events
from quickbloom.server_app.federation.outer import OuterOptimizer
from quickbloom.server_app.federation.private.privacy import TaskPrivacy
from quickbloom.server_app.federation.private.secure_sum import SecureSum, check_totals
from quickbloom.server_app.federation.reply_checks import OF_CLIPPED, ROUNDING, check_update, decoded, most_weight
from quickbloom.server_app.federation.robust.aggregation import RunningMean, aggregate_round, remembers, too_few
from quickbloom.server_app.federation.robust.root_set import RootSet
from quickbloom.server_app.federation.sampling import Sampling
from quickbloom.server_app.messaging.clock import clock_of
from quickbloom.server_app.messaging.exchange import Exchange, TooFewError
from quickbloom.server_app.messaging.phases import AGGREGATING, ASKING
from quickbloom.server_app.messaging.population import Population

_ATTEMPTS = 5
"""How often in all a round is tried with `on-too-few = "repeat"`."""


class Training:
    """The training tasks of one run. `lineage`, `privacy`, `events` and `root`: as in the strategy.

    `sampling`: which tasks a round trains; `client_losses`: of the training tasks of the last round, after their inner loop,
    empty where only sums are known.
    """

    def __init__(
        self,
        config: RunConfig,
        population: Population,
        algorithm: Algorithm,
        outer: OuterOptimizer,
        messages: Exchange,
        events: Events,
        lineage: str = "",
        privacy: TaskPrivacy | None = None,
        root: RootSet | None = None,
    ) -> None:
        self._config = config
        self._population = population
        self._algorithm = algorithm
        self._outer = outer
        outer.beside = outer.beside or algorithm.server_state()
        self._messages = messages
        self._events = events
        self._lineage = lineage
        self._privacy = privacy
        self._root = root
        self.sampling = Sampling(config, population, privacy)
        self.client_losses: list[float] = []

    def check(self, first_round: int) -> None:
        """Raise ConfigError for settings with which some round from `first_round` on cannot work."""
        self.sampling.check(first_round)

    def objection(self, population: Population, first_round: int) -> str:
        """Return why training could not go on from `first_round` with a population that nodes joined; "" if it can."""
        return self.sampling.objection(population, first_round)

    def round(self, grid: Grid, number: int, timeout: float | None, ask: Callable[[], list[Message]]) -> MetricRecord | None:
        """Train one round, or what `on-too-few` says. `ask`: makes the requests of a round without secure aggregation."""
        self._messages.begin()
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return self._attempt(grid, number, timeout, ask)
            except TooFewError as few:
                if self._config.on_too_few == "skip":
                    self._events.warn(f"Round {number} is skipped, the model stays as it is: {few}")
                    self._messages.round.record = {
                        "round": number,
                        "train": {"loss": math.nan, "tasks": 0},
                        "skipped": str(few),
                    }
                    return None
                if self._config.on_too_few == "stop" or attempt == _ATTEMPTS:
                    raise RunError(f"round {number}: {few}") from None
                self._events.warn(f"Round {number} is repeated: {few}")
        raise AssertionError("the last attempt returns or raises")

    def _attempt(self, grid: Grid, number: int, timeout: float | None, ask: Callable[[], list[Message]]) -> MetricRecord:
        self._messages.enter(ASKING)
        if self._config.secure_aggregation:
            return self._train_securely(grid, number, timeout)
        return self.take_in(number, self._send(grid, ask, timeout))

    def _send(self, grid: Grid, ask: Callable[[], list[Message]], timeout: float | None) -> Iterable[Message]:
        # By itself, so that nothing holds the messages while their replies come.
        return self._messages.send(grid, ask(), timeout, self.sampling.enough_tasks)

    def ask(self, grid: Grid, arrays: ArrayRecord, number: int) -> list[Message]:
        """One message to each node that hosts some of this round's tasks and can be asked."""
        by_node = self._draw(grid, number)
        compute = self._request(number)
        return self._messages.address(by_node, TRAIN, number, lambda _, task_ids: compute(task_ids).to_records(arrays))

    def _draw(self, grid: Grid, number: int) -> dict[int, list[str]]:
        """This round's tasks by the node that hosts them, of nodes that can be asked."""
        return self._messages.hosts(self._tasks_with_hosts(grid, number))

    def _request(self, number: int) -> Callable[[list[str]], TrainRequest]:
        """What to ask a node for, by its tasks; the meta-parameters go along encoded."""
        clip = self._privacy.clip if self._privacy else 0.0
        return lambda task_ids: TrainRequest({}, number, self._config.seed, task_ids, self._lineage, clip)

    def _train_securely(self, grid: Grid, number: int, timeout: float | None) -> MetricRecord:
        """A round in which the nodes' sum is all that is seen of them."""
        by_node = self._draw(grid, number)
        if self._privacy:
            # All nodes take part, also those of whose tasks none was drawn: how many were drawn must not decide anything.
            everybody = self._messages.hosts(self._population.splits["train"])
            by_node = {node_id: by_node.get(node_id, []) for node_id in everybody}
        reference = self._outer.leaves
        request = self._request(number)
        steps = SecureSum(
            self._config, grid, self._messages, number, by_node, request, reference, to_arrays(self._outer.leaves), timeout
        )
        self._messages.enter(AGGREGATING)
        totals, nodes = steps.totals()
        self._messages.round.trained |= set(nodes)
        tasks = [self._population.tasks[task_id] for node_id in nodes for task_id in by_node[node_id]]
        most = most_weight(self._algorithm, tasks, [0.0] * len(tasks), alike=self._privacy is not None)
        if reason := check_totals(totals, len(tasks), most, self._privacy.clip if self._privacy else 0.0, nodes=len(nodes)):
            raise self._messages.too_few(
                f"the sum of the nodes cannot be right, and it does not tell who is to blame: {reason}"
            )
        loss = totals.losses / totals.tasks if totals.tasks else math.nan
        reply = TrainReply(totals.gradient, max(totals.weight, 0.0), [], totals.within)
        return self._step(number, self._combine(number, [reply], totals.tasks, reference), loss, totals.tasks)

    def _tasks_with_hosts(self, grid: Grid, number: int) -> list[str]:
        """Return the tasks of a round. If those who are there cannot be enough, wait for more, up to `node-deadline` s."""
        clock = clock_of(grid)
        started = clock.now()
        self._messages.nodes.refresh(grid)  # before the draw, so that tasks of nodes that join can be in it
        tasks = self.sampling.of_round(number)
        while self._lack_hosts(tasks) and clock.now() - started <= self._config.node_deadline:
            clock.sleep(min(0.5, self._config.node_deadline))
            self._messages.nodes.refresh(grid)
            if not self._privacy:  # whose sample is drawn once
                tasks = self.sampling.of_round(number)
        return tasks

    def _lack_hosts(self, task_ids: list[str]) -> bool:
        """Return whether too few of these tasks are on nodes that can be asked."""
        # A round that may be skipped is not worth waiting for, as long as there is anybody.
        patient = self._config.on_too_few != "skip"
        # With privacy, how long the round waits must tell nothing of its sample.
        everybody = self._population.splits["train"] if self._privacy else task_ids
        least = min(len(everybody), self.sampling.least_replies if patient else 1)
        least_nodes = LEAST_NODES if patient and self._config.secure_aggregation else 0
        there = sum(self._messages.nodes.can_be_asked(self._population.homes[task_id]) for task_id in everybody)
        return there < least or len(self._messages.hosts(everybody)) < least_nodes

    def take_in(self, number: int, replies: Iterable[Message]) -> MetricRecord:
        """Name and drop what is of no use, average the rest over tasks, take the outer step. Raises TooFewError."""
        self._messages.enter(AGGREGATING)
        reference = self._outer.leaves
        usable: list[TrainReply] = []
        # Where the mean is all that is wanted of the replies, none is kept beside it.
        mean = RunningMean(reference) if self._config.aggregate == "mean" and not self._privacy else None

        def read(_: int, reply: TrainReply, task_ids: list[str]) -> None:
            usable.append(mean.add(reply) if mean else reply)
            self._name_dropped(reply, task_ids)

        self._messages.receive(replies, read, opened=self._opened, enough=self.sampling.enough_tasks)
        losses = [loss for reply in usable for loss in reply.losses if math.isfinite(loss)]
        self.client_losses = losses
        loss = float(np.mean(losses)) if losses else math.nan
        return self._step(number, self._combine(number, usable, len(losses), reference, mean), loss, len(losses))

    def _opened(self, records: RecordDict, task_ids: list[str]) -> TrainReply:
        """Return the checked reply for these tasks. Raises WireError."""
        reference = self._outer.leaves
        # A mean of clipped meta-gradients is no longer than one of them: who sends more has not clipped.
        largest = self._privacy.clip if self._privacy else self._config.max_update_norm
        rounding = OF_CLIPPED if self._privacy else ROUNDING
        reply = decoded(TrainReply.from_records(records, len(task_ids), take=True), self._config.update_dtype, reference)
        announced = [self._population.tasks[task_id] for task_id in task_ids]
        most = most_weight(self._algorithm, announced, reply.losses, alike=self._privacy is not None)
        check_update(reply, reference, most, largest, rounding=rounding)
        return reply

    def _name_dropped(self, reply: TrainReply, task_ids: list[str]) -> None:
        """Name the tasks that did not contribute to a reply."""
        if dropped := [task for task, loss in zip(task_ids, reply.losses, strict=True) if not math.isfinite(loss)]:
            self._messages.fail(f"task {dropped[0]}", f"its numbers are not finite (and {len(dropped) - 1} more tasks)")

    def _step(self, number: int, gradient: Params, loss: float, tasks: int) -> MetricRecord:
        """The outer step with the meta-gradient of so many tasks, whose mean loss is `loss`."""
        if remembers(self._config.aggregate):
            self._outer.centre = gradient
        # Privacy noise is in every number, and a node may lie: what tasks must start from at 0 stays there.
        share = self._privacy.sampling if self._privacy else tasks / len(self._population.splits["train"])
        self._outer.take_in(self._algorithm, self._algorithm.with_zero_head(gradient), number, share)
        del gradient
        if not all_finite(self._outer.leaves):
            raise RunError(f"round {number}: the model is not finite any more: lower `outer-lr`")
        self._messages.round.record = {"round": number, "train": {"loss": loss, "tasks": tasks}}
        if self._privacy:
            self._messages.round.record["privacy"] = self._privacy.record()
        return MetricRecord({"loss": loss, "tasks": tasks})

    def _combine(
        self, number: int, replies: list[TrainReply], contributed: int, like: Params, mean: RunningMean | None = None
    ) -> Params:
        """One meta-gradient from the usable replies of a round to which so many tasks contributed. `mean`: it, if known."""
        if self._privacy:
            # Whom the sample met is a secret, so what nobody answers is noise alone. That nobody can be asked is no secret.
            if not replies and not self._messages.hosts(self._population.splits["train"]):
                self._check_enough(0)
            return self._privacy.mean(replies, like, number)
        self._check_enough(contributed)
        voters = sum(reply.weight > 0 for reply in replies)
        if reason := too_few(self._config.aggregate, self._config.malicious, voters, self._config.bucketing):
            raise TooFewError(reason)
        if mean:
            return mean.result()
        root = self._root.contribution(like, number, self._outer.root) if self._root else {}
        if self._root and not any(bool(value.any()) for value in root.values()):
            self._events.warn(f"Round {number}: the root set contributes nothing but zeros, so no reply counts")
        if self._config.node_momentum:
            self._outer.root = root
        return aggregate_round(self._config, replies, number, self._outer.centre, root)

    def _check_enough(self, contributed: int) -> None:
        if contributed >= self.sampling.least_replies:
            return
        few = f"{contributed} training tasks contributed, `min-replies` asks for {self.sampling.least_replies}"
        raise self._messages.too_few(few if contributed else "no node sent a usable reply")
