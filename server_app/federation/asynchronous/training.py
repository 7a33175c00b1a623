"""Asynchronous training: an outer step whenever enough tasks have contributed, and new work for every node that comes free.

FedBuff: Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba 2022, "Federated Learning with Buffered Asynchronous
Aggregation", Algorithm 1. A node computes its meta-gradient at the newest model theta_t when it comes free. When its
reply arrives, the model may be theta_(t + s): s is its staleness, and the reply counts (1 + s) ** -a times, so that one
outer step is along

    1 / W * sum_i (1 + s_i) ** -a * w_i * g_i,   W = sum_i w_i over the replies of a buffer.

The staleness shortens the step, and is not divided out, as in the paper.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp import Grid

from quickbloom.common.algorithms import Algorithm
from quickbloom.common.config.run import RunConfig
from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.params import Params
from quickbloom.common.wire.messages import EVALUATE, TRAIN, TrainReply, from_arrays, payload_bytes, to_arrays
from quickbloom.server_app.events.channel import Events
from quickbloom.server_app.federation.asynchronous.buffer import Buffer
from quickbloom.server_app.federation.asynchronous.turns import Turn, Turns
from quickbloom.server_app.federation.evaluation import Evaluation, Rows
from quickbloom.server_app.federation.outer import OuterOptimizer
from quickbloom.server_app.federation.robust.aggregation import too_few
from quickbloom.server_app.federation.scores import Scores
from quickbloom.server_app.federation.training import Training
from quickbloom.server_app.messaging.clock import clock_of
from quickbloom.server_app.messaging.exchange import Exchange
from quickbloom.server_app.messaging.failures import failure
from quickbloom.server_app.messaging.in_flight import InFlight, Sent
from quickbloom.server_app.messaging.phases import AGGREGATING, ASKING, SCORING, WAITING
from quickbloom.server_app.messaging.population import Population

_USELESS = 5
"""Buffers of tasks, or all that are at work, that may be answered without any use before a step is given up."""


class AsynchronousTraining(Training):
    """The training tasks of one run in mode "async": a round of it is one outer step.

    `contributed`: how often each task has contributed to a step.
    """

    def __init__(
        self,
        config: RunConfig,
        population: Population,
        algorithm: Algorithm,
        outer: OuterOptimizer,
        messages: Exchange,
        events: Events,
        evaluation: Evaluation,
        lineage: str = "",
    ) -> None:
        super().__init__(config, population, algorithm, outer, messages, events, lineage)
        self._evaluation = evaluation
        self.turns = Turns(self.sampling, config.async_fairness)
        self.contributed: Counter[str] = Counter()
        self.dropped = 0
        self.steps_by_staleness: Counter[int] = Counter()
        self._flight: InFlight | None = None
        self._buffer: Buffer | None = None
        self._version = 0  # steps that were taken by this process
        self._looked = -math.inf
        self._scoring: _Scoring | None = None
        self._scored: _Scoring | None = None

    @property
    def concurrency(self) -> int:
        """Tasks that are kept at work."""
        return self._config.async_concurrency or self.sampling.number_of_tasks

    @property
    def buffer(self) -> int:
        """Tasks that contribute to one step."""
        return self._config.async_buffer or self.sampling.number_of_tasks

    def check(self, first_round: int) -> None:
        """Raise ConfigError for a buffer that cannot be filled."""
        if reason := self.objection(self._population, first_round):
            raise ConfigError(reason)

    def objection(self, population: Population, first_round: int) -> str:
        """Return why the buffer cannot be filled with these participants; "" if it can."""
        nodes = len({population.homes[task] for task in population.splits["train"]})
        votes = min(nodes, self.buffer)
        reason = too_few(self._config.aggregate, self._config.malicious, votes, self._config.bucketing)
        if reason is None:
            return ""
        return (
            f'`aggregate = "{self._config.aggregate}"` cannot work with `async-buffer` {self.buffer} and the '
            f"{nodes} nodes that train, since every node is one vote: {reason}"
        )

    # ---- one outer step

    def _attempt(self, grid: Grid, number: int, timeout: float | None, ask: Callable[[], list[Message]]) -> MetricRecord:
        flight = self._flight = self._flight or InFlight(grid, self._config.round_deadline)
        # A step that is repeated, or that was skipped, keeps what has come in.
        buffer = self._buffer = self._buffer or Buffer(self._outer.leaves, self._config)
        buffer.useless = 0
        quiet_since: float | None = None
        clock = clock_of(grid)
        while not buffer.is_full(self.buffer):
            if (arrived := flight.next()) is not None:
                quiet_since = None
                self._messages.enter(AGGREGATING)
                self._take(*arrived, buffer)
                continue
            self._messages.enter(ASKING)
            self._expire(flight)
            self._give_work(grid, flight)
            if flight.sent:
                quiet_since = None
            elif quiet_since is None:
                quiet_since = clock.now()
            elif clock.now() - quiet_since > self._config.node_deadline:
                raise self._messages.too_few("no node with a training task can be asked")
            if reason := self._why_in_vain(buffer):
                raise self._messages.too_few(reason)
            self._messages.enter(WAITING)
            flight.wait(_VIRTUAL_LOOK if clock.virtual else _LOOK)
        self._messages.enter(AGGREGATING)
        self._messages.round.record = {}
        gradient = buffer.result(number, self._outer.centre)
        loss = float(np.mean(buffer.losses)) if buffer.losses else math.nan
        self.client_losses, self._buffer = buffer.losses, None
        self._version += 1
        metrics = self._step(number, gradient, loss, len(buffer.losses))
        self._record(flight, buffer)
        self._messages.enter(SCORING)
        self._begin_scoring(number)
        return metrics

    def _why_in_vain(self, buffer: Buffer) -> str:
        """Return why this step is given up: nearly all that came was of no use, or its rule waits for nodes that are gone."""
        # All that are at work may be lost at once, whatever a buffer holds.
        most = _USELESS * max(self.buffer, self.concurrency)
        if buffer.useless > most:
            return "no node sent a usable reply"
        if buffer.tasks > self.buffer + most:  # without a limit the replies of those who are there would pile up
            return buffer.too_few or ""
        return ""

    def _take(self, sent: Sent, reply: Message, buffer: Buffer) -> None:
        """Read one reply that has arrived."""
        if sent.metadata.message_type == EVALUATE:
            self._messages.enter(SCORING)
            if self._scoring is not None and sent.version == self._scoring.version:
                self._messages.receive_one(sent.metadata, sent.task_ids, reply, self._scoring.rows.read)
                self._scoring.waiting.pop(sent.node_id, None)
            return
        staleness = self._version - sent.version
        if staleness > self._config.async_max_staleness and failure(reply) is None:
            # Not even read: nothing of it counts.
            self.dropped += len(sent.task_ids)
            buffer.dropped += len(sent.task_ids)
            self._messages.round.answered += 1
            self._messages.round.bytes_up += payload_bytes(reply.content)
            return
        before = buffer.tasks

        def read(node_id: int, answer: TrainReply, task_ids: list[str]) -> None:
            self.contributed.update(t for t, loss in zip(task_ids, answer.losses, strict=True) if math.isfinite(loss))
            buffer.add(node_id, answer, staleness, self._config.async_staleness)
            self._name_dropped(answer, task_ids)

        self._messages.receive_one(sent.metadata, sent.task_ids, reply, read, opened=self._opened)
        buffer.useless += len(sent.task_ids) - (buffer.tasks - before)

    def _expire(self, flight: InFlight) -> None:
        for sent in flight.expired():
            self._messages.miss(sent.metadata)
            if self._scoring is not None and sent.metadata.message_type == EVALUATE:
                self._scoring.waiting.pop(sent.node_id, None)

    # ---- who works

    def _give_work(self, grid: Grid, flight: InFlight) -> None:
        """Give every node that is free and whose turn it is the newest model."""
        clock, nodes = clock_of(grid), self._messages.nodes
        if clock.virtual or clock.now() - self._looked >= _LOOK:
            self._looked = clock.now()
            nodes.refresh(grid)
        self._score_on_free_nodes(flight)
        busy, homes = flight.nodes, self._population.homes
        working = [sent for sent in flight.sent if sent.metadata.message_type == TRAIN]
        slots = self.concurrency - sum(len(sent.task_ids) for sent in working if nodes.may_be_there(sent.node_id))
        if slots <= 0:
            return
        # A task whose node came back under another id does not wait for what the lost one was asked.
        at_work = {task for sent in working for task in sent.task_ids if homes[task] == sent.node_id}
        # A node that hangs is connected, and would make the share of all look small.
        there = {
            home for home in set(homes.values()) if nodes.can_be_asked(home) or (home in busy and nodes.may_be_there(home))
        }
        present = [task for task in self._population.splits["train"] if homes[task] in there]
        chosen = self.turns.take(
            slots, present, at_work, lambda task: nodes.can_be_asked(homes[task]) and homes[task] not in busy
        )
        if chosen:
            self._send_work(flight, chosen)

    def _send_work(self, flight: InFlight, chosen: list[Turn]) -> None:
        """Send the tasks of these turns to their nodes, one message to each."""
        by_node: dict[int, list[Turn]] = {}
        for turn in chosen:
            by_node.setdefault(self._population.homes[turn[1]], []).append(turn)
        arrays = to_arrays(self._outer.leaves)
        messages, sent = [], {}
        for node_id, turns in by_node.items():
            # Later than all turns that these tasks had before, so that no draw of theirs comes twice.
            number, task_ids = max(turn for turn, _ in turns), [task for _, task in turns]
            records = self._request(number)(task_ids).to_records(arrays)
            message = self._messages.message(node_id, task_ids, TRAIN, number, lambda *_, records=records: records)
            messages.append(message)
            sent[node_id] = Sent(message.metadata, task_ids, self._version, turns)
        self._messages.enter(WAITING)  # where nodes are in this process, they compute when they are asked
        flight.send(messages, sent)
        self._messages.enter(ASKING)

    # ---- scores, while training goes on

    def _begin_scoring(self, number: int) -> None:
        """Let the validation tasks be scored by the model of step `number` where that is due, by nodes as they come free."""
        self._finish_scoring()
        if number == self._config.rounds or not self._evaluation.due(number) or self._scoring is not None:
            return
        hosts = self._messages.hosts(self._population.splits["validation"])
        if hosts:
            evaluation = self._evaluation
            rows = Rows(self._population.spec, evaluation.metric, evaluation.lrs, evaluation.steps)
            self._scoring = _Scoring(number, to_arrays(self._outer.leaves), rows, dict(hosts))

    def _score_on_free_nodes(self, flight: InFlight) -> None:
        scoring = self._scoring
        if scoring is None:
            return
        self._messages.enter(SCORING)
        busy = flight.nodes
        request = self._evaluation.request(scoring.arrays, self._evaluation.lrs, scoring.version)
        messages, sent = [], {}
        for node_id, task_ids in scoring.waiting.items():
            if node_id in scoring.asked or node_id in busy or not self._messages.nodes.can_be_asked(node_id):
                continue
            message = self._messages.message(node_id, task_ids, EVALUATE, scoring.version, request)
            messages.append(message)
            sent[node_id] = Sent(message.metadata, task_ids, scoring.version)
        if messages:
            # Who cannot be reached is asked again as long as it seems to be there.
            scoring.asked |= flight.send(messages, sent)
            flight.wait(0.0)  # where nodes answer at once, they are free for the work that they would have without this
        self._messages.enter(ASKING)

    def _finish_scoring(self) -> None:
        """Close the scoring that is under way if every node has answered, or is away."""
        scoring = self._scoring
        if scoring is None:
            return
        nodes = self._messages.nodes
        if any(node_id in scoring.asked or nodes.can_be_asked(node_id) for node_id in scoring.waiting):
            return
        self._scored, self._scoring = scoring, None

    def scored(self) -> tuple[int, Params, Scores] | None:
        """Return (step, the model after it, its scores of the validation tasks) if they have become known, once."""
        done, self._scored = self._scored, None
        return (done.version, from_arrays(done.arrays), done.rows.scores()) if done else None

    # ---- what is told and kept

    def _record(self, flight: InFlight, buffer: Buffer) -> None:
        self.steps_by_staleness.update(buffer.staleness)
        self._messages.round.record["async"] = {
            "staleness": {str(s): number for s, number in sorted(buffer.staleness.items())},
            "dropped": buffer.dropped,
            "turn": self.turns.last,
            "at-work": sum(len(sent.task_ids) for sent in flight.sent if sent.metadata.message_type == TRAIN),
        }

    def state(self) -> dict[str, Any]:
        """Return what a continued run needs, as JSON: what is under way is asked for again then."""
        under_way = [turn for sent in (self._flight.sent if self._flight else []) for turn in sent.turns]
        staleness = {str(s): number for s, number in self.steps_by_staleness.items()}
        counts = {"contributed": dict(self.contributed), "dropped": self.dropped, "staleness": staleness}
        return {**self.turns.state(under_way), **counts}

    def restore(self, state: Any) -> None:
        """Go on from a `state`. Raises ConfigError if it is none."""
        self.turns.restore(state)
        try:
            self.contributed = Counter({str(task): int(number) for task, number in state["contributed"].items()})
            self.dropped = int(state["dropped"])
            self.steps_by_staleness = Counter({int(s): int(number) for s, number in state["staleness"].items()})
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ConfigError(
                "`resume-from` names a checkpoint of asynchronous training without its counts: start anew"
            ) from None


_LOOK, _VIRTUAL_LOOK = 1.0, 60.0
"""Seconds between two looks at who is there, by a real clock and by a virtual one."""


@dataclass
class _Scoring:
    """Scores of the validation tasks by the model of one step, while training goes on.

    `waiting`: the tasks of the nodes that have not answered; `asked`: nodes that were asked.
    """

    version: int
    arrays: ArrayRecord
    rows: Rows
    waiting: dict[int, list[str]]
    asked: set[int] = field(default_factory=set)
