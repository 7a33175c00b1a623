"""MetaStrategy: federated meta-learning as a Flower Strategy.

Every round: choose training tasks by (seed, round), send the meta-parameters to the nodes that host them, average the tasks'
meta-gradients, take one outer step. Every few rounds held-out validation tasks adapt and are scored. Held-out tasks never
contribute a gradient.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from logging import INFO
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from quickbloom.common.algorithms import Algorithm
from quickbloom.common.config.run import RunConfig
from quickbloom.common.errors import OneLineError
from quickbloom.common.flower.names import log
from quickbloom.common.maths.params import Params, all_finite
from quickbloom.common.wire.messages import (
    TRAIN,
    KeepRequest,
    TrainReply,
    TrainRequest,
    to_arrays,
)
from quickbloom.common.wire.secure.protocol import LEAST_NODES
from quickbloom.server_app.events.channel import Events
from quickbloom.server_app.events.kinds import RoundEnded
from quickbloom.server_app.federation.aggregation import RunningMean, aggregate, too_few
from quickbloom.server_app.federation.evaluation import Evaluation
from quickbloom.server_app.federation.keeping import keep_on_nodes
from quickbloom.server_app.federation.outer import OuterOptimizer
from quickbloom.server_app.federation.privacy import TaskPrivacy
from quickbloom.server_app.federation.reply_checks import OF_CLIPPED, ROUNDING, check_update, decoded, most_weight
from quickbloom.server_app.federation.sampling import Sampling
from quickbloom.server_app.federation.scores import Scores
from quickbloom.server_app.federation.secure_sum import SecureSum, check_totals
from quickbloom.server_app.messaging.exchange import Exchange, TooFewError
from quickbloom.server_app.messaging.population import Population

_ATTEMPTS = 5
"""How often in all a round is tried with `on-too-few = "repeat"`."""

OnRound = Callable[[dict[str, Any]], None]


class RunError(OneLineError):
    """The run cannot go on; the text says why, for the user."""


class MetaStrategy(Strategy):
    """Flower Strategy for every algorithm of `ALGORITHMS`: what differs between them is on the tasks' side.

    `on_round` gets one dictionary per round: what history.jsonl holds. `first_round` is the round that follows a checkpoint.
    `lineage` names the training, so that nodes know what their tasks keep of it. With `privacy` the tasks of a round are a
    secret sample, all weigh the same, and their mean is noisy. `events` is told of rounds, scores, warnings and failures.
    """

    def __init__(
        self,
        config: RunConfig,
        population: Population,
        algorithm: Algorithm,
        outer: OuterOptimizer,
        on_round: OnRound = lambda record: None,
        first_round: int = 1,
        lineage: str = "",
        privacy: TaskPrivacy | None = None,
        events: Events | None = None,
    ) -> None:
        self.config = config
        self.population = population
        self.algorithm = algorithm
        self.outer = outer
        self.failures = 0
        self.bytes = {"up": 0, "down": 0}
        self.events = events or Events()
        self._on_round = on_round
        self._lineage = lineage
        self.privacy = privacy
        self.client_losses: list[float] = []
        """Of the training tasks of the last round, after their inner loop; none where only sums are known."""
        self._first_round = first_round
        self._messages = Exchange(config, population, self.events)
        self.nodes = self._messages.nodes
        self.evaluation = Evaluation(config, population, algorithm.options.inner_lr, self._messages, lineage)
        self.sampling = Sampling(config, population, privacy)
        self._grid: Grid | None = None
        self.late = 0
        self.sampling.check(first_round)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float | None = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Train from `first_round` to `num_rounds`. As Flower's own, which can only count from 1."""
        if evaluate_fn is not None:
            raise ValueError("`evaluate_fn` is of no use here: the server has no data")
        self._grid = grid
        started, result = time.monotonic(), Result()
        # The outer optimizer has the same. A large model is encoded when it is sent, and not kept beside it.
        del initial_arrays
        train_config, evaluate_config = train_config or ConfigRecord(), evaluate_config or ConfigRecord()
        self.summary()
        self.events.round = self._first_round - 1
        for number in range(self._first_round, num_rounds + 1):
            self.events.round = number
            log(INFO, "")
            log(INFO, "[ROUND %s/%s]", number, num_rounds)
            metrics = self._train_round(grid, number, train_config, timeout)
            if metrics is not None:
                log(INFO, "\t└──> Aggregated MetricRecord: %s", metrics)
                result.train_metrics_clientapp[number] = metrics
            scored = self.aggregate_evaluate(number, self._ask_validation(grid, number, evaluate_config, timeout))
            if scored is not None:
                log(INFO, "\t└──> Aggregated MetricRecord: %s", scored)
                result.evaluate_metrics_clientapp[number] = scored
        if result.train_metrics_clientapp:
            result.arrays = self._encoded()
        log(INFO, "")
        log(INFO, "Strategy execution finished in %.2fs", time.monotonic() - started)
        return result

    def _encoded(self) -> ArrayRecord:
        """The meta-parameters now, as they are sent."""
        return to_arrays(self.outer.leaves)

    def _train_round(self, grid: Grid, number: int, config: ConfigRecord, timeout: float | None) -> MetricRecord | None:
        """Train one round, or what `on-too-few` says."""
        self._messages.begin()
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                if self.config.secure_aggregation:
                    return self._train_securely(grid, number, timeout)
                return self._take_in(number, self._ask_gradients(grid, number, config, timeout))
            except TooFewError as few:
                if self.config.on_too_few == "skip":
                    self.events.warn(f"Round {number} is skipped, the model stays as it is: {few}")
                    self._messages.round.record = {
                        "round": number,
                        "train": {"loss": math.nan, "tasks": 0},
                        "skipped": str(few),
                    }
                    return None
                if self.config.on_too_few == "stop" or attempt == _ATTEMPTS:
                    raise RunError(f"round {number}: {few}") from None
                self.events.warn(f"Round {number} is repeated: {few}")
        raise AssertionError("the last attempt returns or raises")

    def _ask_gradients(self, grid: Grid, number: int, config: ConfigRecord, timeout: float | None) -> Iterable[Message]:
        # By itself, so that nothing holds the messages while their replies come.
        messages = self.configure_train(number, self._encoded(), config, grid)
        return self._messages.send(grid, messages, timeout, self.sampling.enough_tasks)

    def _ask_validation(self, grid: Grid, number: int, config: ConfigRecord, timeout: float | None) -> Iterable[Message]:
        if not self.evaluation.due(number):
            return []
        return grid.send_and_receive(self.configure_evaluate(number, self._encoded(), config, grid), timeout=timeout)

    def summary(self) -> None:
        """Log what this run does."""
        splits = {name: len(ids) for name, ids in self.population.splits.items()}
        log(INFO, "\t├──> Algorithm %s: %s", self.config.algorithm, self.algorithm.options)
        log(INFO, "\t└──> Tasks: %s on %s nodes", splits, len(set(self.population.homes.values())))

    # ---- training

    def choose_tasks(self, server_round: int) -> list[str]:
        """The training tasks of a round without privacy, as `Sampling.choose_tasks`."""
        return self.sampling.choose_tasks(server_round)

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
        """One message to each node that hosts some of this round's tasks and can be asked."""
        by_node = self._draw(grid, server_round)
        compute = self._request(server_round)
        return self._messages.address(by_node, TRAIN, server_round, lambda _, task_ids: compute(task_ids).to_records(arrays))

    def _draw(self, grid: Grid, server_round: int) -> dict[int, list[str]]:
        """This round's tasks by the node that hosts them, of nodes that can be asked."""
        tasks = self.sampling.of_round(server_round)
        self._wait_for_hosts(grid, tasks)
        return self._messages.hosts(tasks)

    def _request(self, server_round: int) -> Callable[[list[str]], TrainRequest]:
        """What to ask a node for, by its tasks; the meta-parameters go along encoded."""
        clip = self.privacy.clip if self.privacy else 0.0
        return lambda task_ids: TrainRequest({}, server_round, self.config.seed, task_ids, self._lineage, clip)

    def _train_securely(self, grid: Grid, server_round: int, timeout: float | None) -> MetricRecord:
        """A round in which the nodes' sum is all that is seen of them."""
        by_node = self._draw(grid, server_round)
        if self.privacy:
            # All nodes take part, also those of whose tasks none was drawn: how many were drawn must not decide anything.
            everybody = self._messages.hosts(self.population.splits["train"])
            by_node = {node_id: by_node.get(node_id, []) for node_id in everybody}
        reference = self.outer.leaves
        request = self._request(server_round)
        steps = SecureSum(
            self.config, grid, self._messages, server_round, by_node, request, reference, self._encoded(), timeout
        )
        totals, nodes = steps.totals()
        self._messages.round.trained |= set(nodes)
        tasks = [self.population.tasks[task_id] for node_id in nodes for task_id in by_node[node_id]]
        most = most_weight(self.algorithm, tasks, [0.0] * len(tasks), alike=self.privacy is not None)
        if reason := check_totals(totals, len(tasks), most, self.privacy.clip if self.privacy else 0.0, nodes=len(nodes)):
            raise self._messages.too_few(
                f"the sum of the nodes cannot be right, and it does not tell who is to blame: {reason}"
            )
        loss = totals.losses / totals.tasks if totals.tasks else math.nan
        reply = TrainReply(totals.gradient, max(totals.weight, 0.0), [], 0.0, totals.within)
        return self._step(server_round, self._combine([reply], totals.tasks, reference), loss, totals.tasks)

    def _wait_for_hosts(self, grid: Grid, task_ids: list[str]) -> None:
        """See who is there; if that cannot be enough, wait for more, up to `node-deadline` seconds."""
        # A round that may be skipped is not worth waiting for, as long as there is anybody.
        patient = self.config.on_too_few != "skip"
        everybody = self.population.splits["train"] if self.privacy else task_ids  # how long it waits tells nothing of a sample
        least = min(len(everybody), self.sampling.least_replies if patient else 1)
        least_nodes = LEAST_NODES if patient and self.config.secure_aggregation else 0
        started = time.monotonic()
        self.nodes.refresh(grid)
        while (
            sum(self.nodes.can_be_asked(self.population.homes[task_id]) for task_id in everybody) < least
            or len(self._messages.hosts(everybody)) < least_nodes
        ):
            if time.monotonic() - started > self.config.node_deadline:
                return
            time.sleep(min(0.5, self.config.node_deadline))
            self.nodes.refresh(grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Name and drop what is of no use, average the rest over tasks, take the outer step. Raises if too few are left."""
        metrics = self._take_in(server_round, replies)
        return self._encoded(), metrics

    def _take_in(self, server_round: int, replies: Iterable[Message]) -> MetricRecord:
        reference = self.outer.leaves
        # A mean of clipped meta-gradients is no longer than one of them: who sends more has not clipped.
        largest = self.privacy.clip if self.privacy else self.config.max_update_norm
        rounding = OF_CLIPPED if self.privacy else ROUNDING
        usable: list[TrainReply] = []
        # Where the mean is all that is wanted of the replies, none is kept beside it.
        mean = RunningMean(reference) if self.config.aggregate == "mean" and not self.privacy else None

        def opened(records: RecordDict, task_ids: list[str]) -> TrainReply:
            reply = decoded(TrainReply.from_records(records, len(task_ids), take=True), self.config.update_dtype, reference)
            announced = [self.population.tasks[task_id] for task_id in task_ids]
            most = most_weight(self.algorithm, announced, reply.losses, alike=self.privacy is not None)
            check_update(reply, reference, most, largest, rounding=rounding)
            return reply

        def read(_: int, reply: TrainReply, task_ids: list[str]) -> None:
            usable.append(mean.add(reply) if mean else reply)
            if dropped := [task for task, loss in zip(task_ids, reply.losses, strict=True) if not math.isfinite(loss)]:
                self._messages.fail(f"task {dropped[0]}", f"its numbers are not finite (and {len(dropped) - 1} more tasks)")

        self._messages.receive(replies, read, opened=opened, enough=self.sampling.enough_tasks)
        losses = [loss for reply in usable for loss in reply.losses if math.isfinite(loss)]
        self.client_losses = losses
        loss = float(np.mean(losses)) if losses else math.nan
        return self._step(server_round, self._combine(usable, len(losses), reference, mean), loss, len(losses))

    def _step(self, server_round: int, gradient: Params, loss: float, tasks: int) -> MetricRecord:
        """The outer step with the meta-gradient of so many tasks, whose mean loss is `loss`."""
        # Privacy noise is in every number, and a node may lie: what tasks must start from at 0 stays there.
        self.outer.advance(self.algorithm.with_zero_head(gradient), server_round)
        del gradient
        if not all_finite(self.outer.leaves):
            raise RunError(f"round {server_round}: the model is not finite any more: lower `outer-lr`")
        self._messages.round.record = {"round": server_round, "train": {"loss": loss, "tasks": tasks}}
        if self.privacy:
            self._messages.round.record["privacy"] = self.privacy.record()
        return MetricRecord({"loss": loss, "tasks": tasks})

    def _combine(self, replies: list[TrainReply], contributed: int, like: Params, mean: RunningMean | None = None) -> Params:
        """One meta-gradient from the usable replies of a round to which so many tasks contributed. `mean`: it, if known."""
        if self.privacy:
            # Whom the sample met is a secret, so what nobody answers is noise alone. That nobody can be asked is no secret.
            if not replies and not self._messages.hosts(self.population.splits["train"]):
                self._check_enough(0)
            return self.privacy.mean(replies, like)
        self._check_enough(contributed)
        voters = sum(reply.weight > 0 for reply in replies)
        if reason := too_few(self.config.aggregate, self.config.malicious, voters):
            raise TooFewError(reason)
        return mean.result() if mean else aggregate(self.config.aggregate, self.config.malicious, replies)

    def _check_enough(self, contributed: int) -> None:
        if contributed >= self.sampling.least_replies:
            return
        few = f"{contributed} training tasks contributed, `min-replies` asks for {self.sampling.least_replies}"
        raise self._messages.too_few(few if contributed else "no node sent a usable reply")

    # ---- held-out tasks

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
        """Ask for the validation tasks every `evaluate-every` rounds and after the last one."""
        if not self.evaluation.due(server_round):
            return []
        return self.evaluation.ask(arrays, self.population.splits["validation"], self.evaluation.lrs, server_round)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Collect the scores of validation tasks, and close the round's line of the history."""
        metrics = None
        if self._messages.sent:
            scores = self.evaluation.read(replies, self.evaluation.lrs)
            if self._grid is not None:
                wanted = self.population.splits["validation"]
                scores = self.evaluation.wait_for(self._grid, scores, self.outer.leaves, wanted, server_round)
            if told := self.evaluation.take(server_round, scores):
                self._messages.round.record["validation"], scored = told
                self.events.tell(scored)
                metrics = MetricRecord({f"{scored.metric}-before": scored.before, f"{scored.metric}-after": scored.after})
        self._close_round()
        return metrics

    def score_tasks(self, grid: Grid, meta: Params, task_ids: list[str], lrs: list[float], shots: int = 0) -> Scores:
        """Scores of held-out tasks, outside the rounds, as `Evaluation.score`; what went wrong and what was sent is counted."""
        self._messages.begin()
        self.nodes.refresh(grid)
        scores = self.evaluation.score(grid, meta, task_ids, lrs, shots)
        self._count()
        return scores

    def chosen_rate(self) -> tuple[float, int]:
        """(learning rate, steps) by the validation tasks as they were scored last; without any the inner rate, all steps."""
        return self.evaluation.chosen_rate()

    def let_keep(self, grid: Grid, meta: Params, lr: float, steps: int, run: str) -> int:
        """Let nodes that have a place for it adapt `meta` to their own tasks and keep it there; returns how many kept.

        Nothing of these comes back. A node that fails is named in the log.
        """
        keepers = sorted(node_id for node_id in self.population.keepers if self.nodes.may_be_there(node_id))
        if not self.config.personal or not keepers:
            return 0
        self._messages.begin()
        request = KeepRequest({}, lr, steps, self.config.rounds, self._lineage, run)
        kept = keep_on_nodes(grid, self._messages, keepers, request, to_arrays(meta), self.config.round_deadline)
        self._count()
        log(INFO, "%s personal models are kept on %s nodes", kept, len(keepers))
        return kept

    def _count(self) -> None:
        self.failures += len(self._messages.round.failures)
        self.bytes["up"] += self._messages.round.bytes_up
        self.bytes["down"] += self._messages.round.bytes_down

    def _close_round(self) -> None:
        self._count()
        late, self.nodes.late = self.nodes.late, Counter()
        self.late += late.total()
        nodes = {"asked": self._messages.round.asked, "answered": self._messages.round.answered, "away": self.nodes.away}
        if not self.privacy:  # who was drawn is then a secret
            nodes["trained"] = sorted(self._messages.round.trained)
        this = self._messages.round
        record = {
            **this.record,
            "nodes": {**nodes, "late": {f"node {node_id}": number for node_id, number in sorted(late.items())}},
            "bytes": {"up": this.bytes_up, "down": this.bytes_down},
            "seconds": round(time.monotonic() - this.started, 4),
            "failures": this.failures,
        }
        self.events.tell(RoundEnded.of(record, self.config.rounds))
        self._on_round(record)
