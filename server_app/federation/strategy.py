"""MetaStrategy: federated meta-learning as a Flower Strategy.

Every round: choose training tasks by (seed, round), send the meta-parameters to the nodes that host them, average the tasks'
meta-gradients, take one outer step. Every few rounds held-out validation tasks adapt and are scored. Held-out tasks never
contribute a gradient.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from logging import INFO
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from quickbloom.common.algorithms import Algorithm
from quickbloom.common.config.run import RunConfig
from quickbloom.common.flower.names import log
from quickbloom.common.maths.params import Params
from quickbloom.common.system import memory
from quickbloom.common.wire.messages import KeepRequest, to_arrays
from quickbloom.server_app.events.channel import Events
from quickbloom.server_app.events.kinds import RoundEnded
from quickbloom.server_app.federation.asynchronous.training import AsynchronousTraining
from quickbloom.server_app.federation.asynchronous.turns import contributions
from quickbloom.server_app.federation.baselines import Final, TaskScores, score_baselines
from quickbloom.server_app.federation.best import is_better, score_of
from quickbloom.server_app.federation.evaluation import Evaluation
from quickbloom.server_app.federation.keeping import keep_on_nodes
from quickbloom.server_app.federation.outer import OuterOptimizer
from quickbloom.server_app.federation.private.privacy import TaskPrivacy
from quickbloom.server_app.federation.robust.root_set import RootSet
from quickbloom.server_app.federation.scores import Scores
from quickbloom.server_app.federation.training import Training
from quickbloom.server_app.messaging.clock import REAL, Clock
from quickbloom.server_app.messaging.exchange import Exchange
from quickbloom.server_app.messaging.phases import SCORING
from quickbloom.server_app.messaging.population import Population

OnRound = Callable[[dict[str, Any]], None]
_RAREST = 3
"""Tasks that hardly ever contribute, as an event names them: enough to look into the matter."""


class MetaStrategy(Strategy):
    """Flower Strategy for every algorithm of `ALGORITHMS`: what differs between them is on the tasks' side.

    `on_round` gets one dictionary per round: what history.jsonl holds. `first_round` is the round that follows a checkpoint.
    `lineage` names the training, so that nodes know what their tasks keep of it. With `privacy` the tasks of a round are a
    secret sample, all weigh the same, and their mean is noisy. `events` is told of rounds, scores, warnings and failures.
    `clock`: the time by which it waits, see `clock_of`. `root`: the root set, for the rule that compares replies with it.
    `joining`: lets nodes join that come during the run. `decided`: it is known which model the run ends with; `last_score`:
    then that of the last round, None if it is not known.
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
        clock: Clock = REAL,
        root: RootSet | None = None,
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
        self._first_round = first_round
        self._messages = Exchange(config, population, self.events, clock)
        self._clock = clock
        self.nodes = self._messages.nodes
        self.evaluation = Evaluation(config, population, algorithm.options.inner_lr, self._messages, lineage)
        self.asynchronous: AsynchronousTraining | None = None
        if config.mode == "async":
            self.asynchronous = AsynchronousTraining(
                config, population, algorithm, outer, self._messages, self.events, self.evaluation, lineage
            )
        self.training = self.asynchronous or Training(
            config, population, algorithm, outer, self._messages, self.events, lineage, privacy, root
        )
        self.scored: tuple[int, Params] = first_round - 1, {}
        self._grid: Grid | None = None
        self.late = 0
        self._saving = 0.0
        self.decided = False
        self.last_score: float | None = None
        self._kept: Params | None = None
        self.joining = self._messages.joining
        self.joining.objection = lambda trial: self.training.objection(trial, max(first_round, self.events.round))
        self.training.check(first_round)

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
            ask = partial(self._ask_training, grid, number, train_config)
            metrics = self.training.round(grid, number, timeout, ask)
            if metrics is not None:
                log(INFO, "\t└──> Aggregated MetricRecord: %s", metrics)
                result.train_metrics_clientapp[number] = metrics
            self._messages.enter(SCORING)
            if self.asynchronous and number < num_rounds:
                scored = self._take_scores(self.asynchronous)
            else:
                scored = self.aggregate_evaluate(number, self._ask_validation(grid, number, evaluate_config, timeout))
            if scored is not None:
                log(INFO, "\t└──> Aggregated MetricRecord: %s", scored)
                result.evaluate_metrics_clientapp[number] = scored
        self.joining.close("the training is over")
        if result.train_metrics_clientapp:
            result.arrays = self._encoded()
        log(INFO, "")
        log(INFO, "Strategy execution finished in %.2fs", time.monotonic() - started)
        return result

    @property
    def meta(self) -> Params:
        """The meta-parameters that the run ends with, read-only: those of the last round, unless an earlier model is kept."""
        return self.outer.leaves if self._kept is None else self._kept

    def keep(self, meta: Params, number: int, last_score: float | None) -> None:
        """End with `meta`, the model after round `number`. `last_score`: of the validation tasks after the last round."""
        self.decided, self.last_score = True, last_score
        if number != self.config.rounds:
            self._kept, self.evaluation.of_round = meta, number

    def _encoded(self) -> ArrayRecord:
        """The meta-parameters now, as they are sent."""
        return to_arrays(self.outer.leaves)

    def _ask_training(self, grid: Grid, number: int, config: ConfigRecord) -> list[Message]:
        return self.configure_train(number, self._encoded(), config, grid)

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
        return self.training.sampling.choose_tasks(server_round)

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
        """One message to each node that hosts some of this round's tasks and can be asked."""
        return self.training.ask(grid, arrays, server_round)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Name and drop what is of no use, average the rest over tasks, take the outer step. Raises if too few are left."""
        metrics = self.training.take_in(server_round, replies)
        return self._encoded(), metrics

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
                if server_round == self.config.rounds:
                    scores = self.evaluation.grown(self._grid, scores, self.outer.leaves, server_round)
            metrics = self._take_in_scores(server_round, scores, self.outer.leaves)
        self._close_round()
        return metrics

    def _take_in_scores(self, number: int, scores: Scores, model: Params) -> MetricRecord | None:
        """Take in the scores of the validation tasks by `model`, that of round `number`."""
        if (told := self.evaluation.take(number, scores)) is None:
            return None
        self._messages.round.record["validation"], scored = told
        self.scored = number, model
        self.events.tell(scored)
        return MetricRecord({f"{scored.metric}-before": scored.before, f"{scored.metric}-after": scored.after})

    def _take_scores(self, training: AsynchronousTraining) -> MetricRecord | None:
        """Take in scores that came in while training went on, and close the round's line of the history."""
        metrics = None
        if (found := training.scored()) is not None:
            number, model, scores = found
            metrics = self._take_in_scores(number, scores, model)
            if metrics is not None and number != self._messages.round.record["round"]:
                self._messages.round.record["validation"]["round"] = number
        self._close_round()
        return metrics

    def score_tasks(self, grid: Grid, meta: Params, task_ids: list[str], lrs: list[float], shots: int = 0) -> Scores:
        """Scores of held-out tasks, outside the rounds, as `Evaluation.score`; what went wrong and what was sent is counted."""
        self._messages.begin()
        self.nodes.refresh(grid)
        scores = self.evaluation.score(grid, meta, task_ids, lrs, shots)
        self._count()
        return scores

    def score_seen(self, grid: Grid, task_ids: list[str], lr: float) -> Scores:
        """Scores of training tasks by the model that the run ends with, as seen users; no task is asked twice."""
        self._messages.begin()
        self.nodes.refresh(grid)
        scores = self.evaluation.score(grid, self.meta, task_ids, [lr], seen=True)
        self._count()
        return scores

    def score_again(self, grid: Grid) -> bool:
        """Score the validation tasks if a finished training goes on with other rates or steps; return whether it was so."""
        evaluation, tasks, meta = self.evaluation, self.population.splits["validation"], self.meta
        if evaluation.is_current:
            return False
        self._messages.begin()
        self.nodes.refresh(grid)
        scores = evaluation.score(grid, meta, tasks, evaluation.lrs)
        evaluation.last = evaluation.grown(grid, scores, meta, evaluation.of_round)
        self._count()
        return True

    def score_initial(self, grid: Grid) -> Scores | None:
        """Score the validation tasks by the model before the first round; None if no task could be scored."""
        evaluation = self.evaluation
        evaluation.of_round = 0
        scores = self.score_tasks(grid, self.outer.leaves, self.population.splits["validation"], evaluation.lrs)
        evaluation.of_round = self.config.rounds
        if (told := evaluation.take(0, scores)) is None:
            return None
        self.events.tell(told[1])
        return evaluation.last

    def keep_if_better(self, grid: Grid, number: int, meta: Params, scores: Scores) -> None:
        """End with `meta`, the best model before the last round, unless that of the last round is better.

        `scores`: of the validation tasks after round `number`, when the model was `meta`. Where `adapt-steps` may grow, it
        grows for both before they are compared.
        """
        evaluation, last, steps = self.evaluation, self.evaluation.last, self.evaluation.steps
        self._messages.begin()
        self.nodes.refresh(grid)
        evaluation.of_round, evaluation.steps = number, self.config.first_steps
        if (scores.lrs, scores.steps) != (evaluation.lrs, evaluation.steps):  # a continued run may ask for others
            scores = evaluation.score(grid, meta, self.population.splits["validation"], evaluation.lrs)
        early = evaluation.grown(grid, scores, meta, number).known(evaluation.metric)
        self._count()
        last_score = score_of(last, evaluation.metric) if last is not None else math.nan
        known = last_score if math.isfinite(last_score) else None
        if last is not None and is_better(last, early, evaluation.metric):
            evaluation.of_round, evaluation.steps = self.config.rounds, steps
            self.keep(self.outer.leaves, self.config.rounds, known)
        else:
            evaluation.last = early
            self.keep(meta, number, known)

    def score_baselines(self, grid: Grid, lr: float, steps: int, seen: Sequence[str] = ()) -> TaskScores:
        """Scores of the held-out tasks, and of `seen` users, by the model and the baselines: `baselines.score_baselines`."""
        self._messages.begin()
        self.nodes.refresh(grid)
        model = Final(self.meta, lr, steps, self.evaluation.of_round, self._lineage)
        found = score_baselines(grid, self.config, self.population, self._messages, model, self.events.warn, seen)
        self._count()
        return found

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

    def _rarely(self) -> list[str]:
        """Return some training tasks that hardly ever contribute in mode async."""
        if self.asynchronous is None:
            return []
        found = contributions(self.asynchronous.contributed, self.population.splits["train"])
        return list(found["rarely"][:_RAREST])

    def _close_round(self) -> None:
        self._count()
        late, self.nodes.late = self.nodes.late, Counter()
        self.late += late.total()
        nodes = {"asked": self._messages.round.asked, "answered": self._messages.round.answered, "away": self.nodes.away}
        nodes["connected"] = self.nodes.connected
        if not self.privacy:  # who was drawn is then a secret
            nodes["trained"] = sorted(self._messages.round.trained)
        this = self._messages.round
        seconds, phases = this.phases.read()
        record = {
            **this.record,
            "nodes": {**nodes, "late": {f"node {node_id}": number for node_id, number in sorted(late.items())}},
            "bytes": {"up": this.bytes_up, "down": this.bytes_down},
            "seconds": seconds,
            "phases": {**phases, "saving": self._saving},
            **({"memory": held} if (held := memory.held()) else {}),
            **({"virtual_hours": round(self._clock.now() / 3600, 6)} if self._clock.virtual else {}),
            "failures": this.failures,
        }
        if joined := self.joining.news():
            record["joined"] = joined
        self.events.tell(RoundEnded.of(record, self.config.rounds, self._rarely()))
        begun = time.monotonic()
        self._on_round(record)
        self._saving = round(time.monotonic() - begun, 4)
