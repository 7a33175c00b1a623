"""MetaStrategy: federated meta-learning as a Flower Strategy.

Every round: choose training tasks by (seed, round), send the meta-parameters to the nodes that host them, average the tasks'
meta-gradients, take one outer step. Every few rounds held-out validation tasks adapt and are scored. Held-out tasks never
contribute a gradient.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from logging import INFO, WARNING
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from quickbloom.common.algorithms import Algorithm
from quickbloom.common.config.run import RunConfig
from quickbloom.common.errors import ConfigError, OneLineError
from quickbloom.common.flower.names import log
from quickbloom.common.maths.params import Params, all_finite
from quickbloom.common.randomness import generator
from quickbloom.common.wire.messages import (
    EVALUATE,
    KEEP,
    TRAIN,
    EvaluateReply,
    EvaluateRequest,
    KeepReply,
    KeepRequest,
    TrainReply,
    TrainRequest,
    to_arrays,
)
from quickbloom.common.wire.secure.protocol import LEAST_NODES
from quickbloom.server_app.federation.aggregation import RunningMean, aggregate, too_few
from quickbloom.server_app.federation.outer import OuterOptimizer
from quickbloom.server_app.federation.privacy import TaskPrivacy
from quickbloom.server_app.federation.reply_checks import OF_CLIPPED, ROUNDING, check_scores, check_update, decoded, most_weight
from quickbloom.server_app.federation.roll_call import Population
from quickbloom.server_app.federation.scores import Scores, best_rate
from quickbloom.server_app.federation.secure_sum import SecureSum, check_totals, unfit
from quickbloom.server_app.messaging.exchange import Exchange, TooFewError

_ATTEMPTS = 5
"""How often in all a round is tried with `on-too-few = "repeat"`."""

OnRound = Callable[[dict[str, Any]], None]


class RunError(OneLineError):
    """The run cannot go on; the text says why, for the user."""


class MetaStrategy(Strategy):
    """Flower Strategy for every algorithm of `ALGORITHMS`: what differs between them is on the tasks' side.

    `on_round` gets one dictionary per round: what history.jsonl holds. `first_round` is the round that follows a checkpoint.
    `lineage` names the training, so that nodes know what their tasks keep of it. With `privacy` the tasks of a round are a
    secret sample, all weigh the same, and their mean is noisy.
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
    ) -> None:
        self.config = config
        self.population = population
        self.algorithm = algorithm
        self.outer = outer
        self.higher_is_better = population.spec.kind == "classification"
        # The algorithm's own inner rate is a candidate as well: it is what the meta-parameters were trained for.
        self.lrs = sorted({*config.lrs, algorithm.options.inner_lr})
        self.failures = 0
        self.bytes = {"up": 0, "down": 0}
        self.last_validation: Scores | None = None
        self.best: dict[str, Any] | None = None
        self._chosen: tuple[Scores, tuple[float, int]] | None = None
        self._on_round = on_round
        self._lineage = lineage
        self.privacy = privacy
        self.client_losses: list[float] = []
        """Of the training tasks of the last round, after their inner loop; none where only sums are known."""
        self._first_round = first_round
        self._messages = Exchange(config, population)
        self.nodes = self._messages.nodes
        self._grid: Grid | None = None
        self.late = 0
        if self.least_replies > self.number_of_tasks:
            raise ConfigError(
                f"`min-replies` must be at most the {self.number_of_tasks} training tasks of a round, "
                f"got {config.min_replies:g}"
            )
        self._check_rule()

    def _check_rule(self) -> None:
        """Refuse a way of aggregation that would have too few nodes in some round, or too many."""
        if self.config.aggregate == "mean" and not self.config.secure_aggregation:
            return
        rounds = self._nodes_of_rounds()
        if not rounds:  # a run is gone on with whose training is over
            return
        for nodes, number in (min(rounds), max(rounds)) if self.config.secure_aggregation else ():
            if reason := unfit(nodes):
                raise ConfigError(f"`secure-aggregation` cannot work in round {number}: {reason}")
        nodes, number = min(rounds)
        if reason := too_few(self.config.aggregate, self.config.malicious, nodes):
            raise ConfigError(
                f'`aggregate = "{self.config.aggregate}"` cannot work in round {number}: {reason}, since every node is one '
                "vote; connect more nodes, let more tasks take part, or lower `malicious`"
            )

    def _nodes_of_rounds(self) -> list[tuple[int, int]]:
        """(nodes, round) of every round, if all of them answer."""
        if self.privacy:  # which tasks take part is not known before; all nodes do
            return [(len({self.population.homes[task_id] for task_id in self.population.splits["train"]}), self._first_round)]
        rounds = range(self._first_round, self.config.rounds + 1)
        return [(len({self.population.homes[t] for t in self.choose_tasks(number)}), number) for number in rounds]

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
        for number in range(self._first_round, num_rounds + 1):
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
                    log(WARNING, "Round %s is skipped, the model stays as it is: %s", number, few)
                    self._messages.round.record = {
                        "round": number,
                        "train": {"loss": math.nan, "tasks": 0},
                        "skipped": str(few),
                    }
                    return None
                if self.config.on_too_few == "stop" or attempt == _ATTEMPTS:
                    raise RunError(f"round {number}: {few}") from None
                log(WARNING, "Round %s is repeated: %s", number, few)
        raise AssertionError("the last attempt returns or raises")

    def _ask_gradients(self, grid: Grid, number: int, config: ConfigRecord, timeout: float | None) -> Iterable[Message]:
        # By itself, so that nothing holds the messages while their replies come.
        messages = self.configure_train(number, self._encoded(), config, grid)
        return self._messages.send(grid, messages, timeout, self._enough_tasks)

    def _ask_validation(self, grid: Grid, number: int, config: ConfigRecord, timeout: float | None) -> Iterable[Message]:
        if not self._scores_are_due(number):
            return []
        return grid.send_and_receive(self.configure_evaluate(number, self._encoded(), config, grid), timeout=timeout)

    def summary(self) -> None:
        """Log what this run does."""
        splits = {name: len(ids) for name, ids in self.population.splits.items()}
        log(INFO, "\t├──> Algorithm %s: %s", self.config.algorithm, self.algorithm.options)
        log(INFO, "\t└──> Tasks: %s on %s nodes", splits, len(set(self.population.homes.values())))

    # ---- training

    @property
    def number_of_tasks(self) -> int:
        """How many training tasks a round is meant to have."""
        return self.config.tasks_in_round(len(self.population.splits["train"]))

    @property
    def _enough_tasks(self) -> int | None:
        """With `over-select`: how many tasks must be answered for, so that the others are not waited for."""
        return self.number_of_tasks if self.config.over_select > 1 else None

    @property
    def least_replies(self) -> int:
        """How many training tasks must contribute to a round."""
        least = self.config.min_replies
        return max(1, math.ceil(least * self.number_of_tasks - 1e-9) if least < 1 else math.ceil(least))

    def choose_tasks(self, server_round: int) -> list[str]:
        """The training tasks of a round without privacy: a function of (seed, round) and of the task ids alone."""
        train = self.population.splits["train"]
        number = math.ceil(self.config.over_select * self.number_of_tasks - 1e-9)
        if number >= len(train):
            return list(train)
        chosen = generator(self.config.seed, "tasks", server_round).choice(len(train), number, replace=False)
        return [train[i] for i in sorted(chosen)]

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
        """One message to each node that hosts some of this round's tasks and can be asked."""
        by_node = self._draw(grid, server_round)
        compute = self._request(server_round)
        return self._messages.address(by_node, TRAIN, server_round, lambda _, task_ids: compute(task_ids).to_records(arrays))

    def _draw(self, grid: Grid, server_round: int) -> dict[int, list[str]]:
        """This round's tasks by the node that hosts them, of nodes that can be asked."""
        tasks = self.privacy.choose(self.population.splits["train"]) if self.privacy else self.choose_tasks(server_round)
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
        least = min(len(everybody), self.least_replies if patient else 1)
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

        self._messages.receive(replies, read, opened=opened, enough=self._enough_tasks)
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
        if contributed >= self.least_replies:
            return
        few = f"{contributed} training tasks contributed, `min-replies` asks for {self.least_replies}"
        raise self._messages.too_few(few if contributed else "no node sent a usable reply")

    # ---- evaluation

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
        """Ask for the validation tasks every `evaluate-every` rounds and after the last one."""
        if not self._scores_are_due(server_round):
            return []
        return self._ask_scores(arrays, self.population.splits["validation"], self.lrs, server_round)

    def _scores_are_due(self, server_round: int) -> bool:
        every = self.config.evaluate_every
        return (every > 0 and server_round % every == 0) or server_round == self.config.rounds

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Collect the scores of validation tasks, and close the round's line of the history."""
        metrics = None
        if self._messages.sent:
            scores = self._read_scores(replies, self.lrs)
            if self._grid is not None:
                validation = self.population.splits["validation"]
                scores = self._wait_for_scores(self._grid, scores, self.outer.leaves, validation, server_round)
            self.last_validation = scores
            if scores.task_ids:
                lr, step = self.choose_rate(scores)
                curve = scores.metrics[:, self.lrs.index(lr)].mean(axis=0)
                name = "accuracy" if self.higher_is_better else "mse"
                self._messages.round.record["validation"] = {
                    "adapt_lr": lr,
                    name: curve.tolist(),
                    "loss": scores.losses[:, self.lrs.index(lr)].mean(axis=0).tolist(),
                    "tasks": len(scores.task_ids),
                }
                metrics = MetricRecord({f"{name}-before": float(curve[0]), f"{name}-after": float(curve[step])})
                self._remember_best({"round": server_round, "adapt_lr": lr, "adapt_steps": step, name: float(curve[step])})
        self._close_round()
        return metrics

    def _remember_best(self, scored: dict[str, Any]) -> None:
        """The evaluation with the best validation score so far; of equal ones the first."""
        name = "accuracy" if self.higher_is_better else "mse"
        sign = -1 if self.higher_is_better else 1
        if math.isfinite(scored[name]) and (self.best is None or sign * scored[name] < sign * self.best[name]):
            self.best = scored

    def choose_rate(self, scores: Scores) -> tuple[float, int]:
        """(learning rate, steps >= 1) with the best mean metric; ties go to the lower loss, then to fewer steps."""
        return best_rate(scores, higher_is_better=self.higher_is_better)

    def score_tasks(self, grid: Grid, meta: Params, task_ids: list[str], lrs: list[float], shots: int = 0) -> Scores:
        """Scores of held-out tasks, outside the rounds. Tasks of nodes that fail are missing and named in the log.

        `shots`: adapt on the first so many support examples of each class alone; 0: on all.
        """
        self._messages.begin()
        self.nodes.refresh(grid)
        messages = self._ask_scores(to_arrays(meta), task_ids, lrs, self.config.rounds, shots, final=True)
        scores = self._read_scores(grid.send_and_receive(messages, timeout=self.config.round_deadline), lrs)
        scores = self._wait_for_scores(grid, scores, meta, task_ids, self.config.rounds, shots)
        self._count()
        return scores

    def _wait_for_scores(
        self, grid: Grid, scores: Scores, meta: Params, wanted: list[str], number: int, shots: int = 0
    ) -> Scores:
        """With `on-too-few = "repeat"`, ask again for tasks whose nodes were away and come back within `node-deadline`.

        `number`: of the round after which they are scored.
        """
        started = time.monotonic()
        while self.config.on_too_few == "repeat":
            homes = {task_id: self.population.homes[task_id] for task_id in set(wanted) - set(scores.task_ids)}
            away = [task for task, node in homes.items() if not (self.nodes.can_be_asked(node) or self.nodes.left_out(node))]
            if not away or time.monotonic() - started > self.config.node_deadline:
                break
            time.sleep(min(0.5, self.config.node_deadline))
            self.nodes.refresh(grid)
            if back := sorted(task for task in away if self.nodes.can_be_asked(self.population.homes[task])):
                messages = self._ask_scores(to_arrays(meta), back, scores.lrs, number, shots)
                replies = grid.send_and_receive(messages, timeout=self.config.round_deadline)
                scores = scores.joined(self._read_scores(replies, scores.lrs))
        return scores

    def chosen_rate(self) -> tuple[float, int]:
        """(learning rate, steps) by the validation tasks as they were scored last; without any the inner rate, all steps."""
        scores = self.last_validation
        if scores is None or not scores.task_ids:
            return self.algorithm.options.inner_lr, self.config.adapt_steps
        if self._chosen is None or self._chosen[0] is not scores:  # every checkpoint asks, and there may be thousands of steps
            self._chosen = scores, self.choose_rate(scores)
        return self._chosen[1]

    def let_keep(self, grid: Grid, meta: Params, lr: float, steps: int, run: str) -> int:
        """Let nodes that have a place for it adapt `meta` to their own tasks and keep it there; returns how many kept.

        Nothing of these comes back. A node that fails is named in the log.
        """
        keepers = sorted(node_id for node_id in self.population.keepers if self.nodes.may_be_there(node_id))
        if not self.config.personal or not keepers:
            return 0
        self._messages.begin()
        number, kept = self.config.rounds, 0
        request, arrays = KeepRequest({}, lr, steps, number, self._lineage, run), to_arrays(meta)
        by_node: dict[int, list[str]] = {node_id: [] for node_id in keepers}
        messages = self._messages.address(by_node, KEEP, number, lambda *_: request.to_records(arrays))

        def read(_: int, records: RecordDict, __: list[str]) -> None:
            nonlocal kept
            kept += KeepReply.from_records(records).kept

        self._messages.receive(grid.send_and_receive(messages, timeout=self.config.round_deadline), read)
        self._count()
        log(INFO, "%s personal models are kept on %s nodes", kept, len(keepers))
        return kept

    # ---- messages

    def _ask_scores(
        self, arrays: ArrayRecord, task_ids: list[str], lrs: list[float], number: int, shots: int = 0, *, final: bool = False
    ) -> list[Message]:
        def request(_: int, part: list[str]) -> RecordDict:
            request = EvaluateRequest({}, lrs, self.config.adapt_steps, part, shots, number, self._lineage)
            return request.to_records(arrays)

        return self._messages.address(self._messages.hosts(task_ids, final=final), EVALUATE, number, request)

    def _read_scores(self, replies: Iterable[Message], lrs: list[float]) -> Scores:
        rows: dict[str, tuple[Any, ...]] = {}

        def read(_: int, records: RecordDict, task_ids: list[str]) -> None:
            reply = EvaluateReply.from_records(records, len(task_ids), len(lrs), self.config.adapt_steps)
            check_scores(reply, self.population.spec)
            more = [None] * len(task_ids) if reply.second is None else reply.second
            rows.update(zip(task_ids, zip(reply.losses, reply.metrics, more, strict=True), strict=True))

        self._messages.receive(replies, read)
        ids = sorted(rows)
        shape = (len(ids), len(lrs), self.config.adapt_steps + 1)
        losses, metrics = (np.array([rows[i][part] for i in ids]).reshape(shape) for part in (0, 1))
        known = bool(ids) and all(rows[i][2] is not None for i in ids)
        second = np.array([rows[i][2] for i in ids]).reshape(shape) if known else None
        return Scores(ids, lrs, losses, metrics, second)

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
        self._on_round(
            {
                **self._messages.round.record,
                "nodes": {**nodes, "late": {f"node {node_id}": number for node_id, number in sorted(late.items())}},
                "bytes": {"up": self._messages.round.bytes_up, "down": self._messages.round.bytes_down},
                "seconds": round(time.monotonic() - self._messages.round.started, 4),
                "failures": self._messages.round.failures,
            }
        )
