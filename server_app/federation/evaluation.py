"""Scores of tasks: ask their nodes, read the replies, and choose the rate and the steps of adaptation.

Tasks adapt on their nodes; only their scores come back. Validation tasks are scored every few rounds, test tasks once. Training
tasks (seen users) are scored once too, after the last round, and choose nothing.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid

from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.config.run import RunConfig
from quickbloom.common.datasets.base import DataSpec
from quickbloom.common.maths.params import Params
from quickbloom.common.metric import Metric, named
from quickbloom.common.wire.messages import EVALUATE, EvaluateReply, EvaluateRequest, to_arrays
from quickbloom.server_app.events.kinds import Scored
from quickbloom.server_app.federation.reply_checks import check_scores
from quickbloom.server_app.federation.scores import Scores, best_rate, gains_at_the_end
from quickbloom.server_app.messaging.clock import clock_of
from quickbloom.server_app.messaging.exchange import Exchange, Request
from quickbloom.server_app.messaging.population import Population


class Rows:
    """Scores of tasks as they come in from their nodes: at `lrs`, after 0..`steps` steps."""

    def __init__(self, spec: DataSpec, metric: Metric, lrs: list[float], steps: int) -> None:
        self._spec, self._metric, self._lrs, self._steps = spec, metric, lrs, steps
        self._rows: dict[str, tuple[Any, ...]] = {}

    def read(self, _: int, records: RecordDict, task_ids: list[str]) -> None:
        """Take in the reply of a node about these tasks. Raises WireError."""
        reply = EvaluateReply.from_records(records, len(task_ids), len(self._lrs), self._steps)
        check_scores(reply, self._spec, self._metric)
        more = [None] * len(task_ids) if reply.second is None else reply.second
        self._rows.update(zip(task_ids, zip(reply.losses, reply.metrics, more, strict=True), strict=True))

    def scores(self) -> Scores:
        """Return what came in."""
        ids = sorted(self._rows)
        shape = (len(ids), len(self._lrs), self._steps + 1)
        losses, metrics = (np.array([self._rows[i][part] for i in ids]).reshape(shape) for part in (0, 1))
        known = bool(ids) and all(self._rows[i][2] is not None for i in ids)
        second = np.array([self._rows[i][2] for i in ids]).reshape(shape) if known else None
        return Scores(ids, self._lrs, losses, metrics, second)


class Evaluation:
    """The held-out tasks of one run. `lineage` names the training, as in the strategy.

    `metric`: what the nodes measure; `lrs`: the rates of adaptation to choose from; `steps`: the number of steps to score,
    which may grow after training; `last`: the newest scores of the validation tasks; `best`: the evaluation with the best of
    them so far, as in summary.json; `without`: tasks of the last `score` whose rows cannot be scored by the metric;
    `of_round`: the round after which the model was what it is when it is scored outside the rounds.
    """

    def __init__(
        self, config: RunConfig, population: Population, inner_lr: float, messages: Exchange, lineage: str = ""
    ) -> None:
        self._config = config
        self._population = population
        self._inner_lr = inner_lr
        self._messages = messages
        self._lineage = lineage
        self.metric = population.spec.metric if config.metric == "auto" else named(config.metric)
        # The algorithm's own inner rate is a candidate too: the meta-parameters were trained for it.
        self.lrs = sorted({*config.lrs, inner_lr}) if ALGORITHMS[config.algorithm].uses_adapt_lr else [inner_lr]
        self.steps = config.first_steps
        self.of_round = config.rounds
        self.last: Scores | None = None
        self.without: list[str] = []
        self.best: dict[str, Any] | None = None
        self._chosen: tuple[Scores, tuple[float, int]] | None = None

    def due(self, server_round: int) -> bool:
        """Return whether to score the validation tasks after this round: every `evaluate-every` rounds and after the last."""
        every = self._config.evaluate_every
        return (every > 0 and server_round % every == 0) or server_round == self._config.rounds

    def ask(
        self,
        arrays: ArrayRecord,
        task_ids: list[str],
        lrs: list[float],
        number: int,
        shots: int = 0,
        *,
        final: bool = False,
        seen: bool = False,
    ) -> list[Message]:
        """Return the messages that ask for these tasks' scores after round `number`. `final`: also of nodes that owe an answer.

        `shots`, `seen`: as for `score`.
        """
        request = self.request(arrays, lrs, number, shots, seen=seen)
        return self._messages.address(self._messages.hosts(task_ids, final=final), EVALUATE, number, request)

    def request(self, arrays: ArrayRecord, lrs: list[float], number: int, shots: int = 0, *, seen: bool = False) -> Request:
        """Return what makes the content of a message to a node: to score tasks by the model `arrays` of round `number`."""

        def request(_: int, part: list[str]) -> RecordDict:
            asked = EvaluateRequest({}, lrs, self.steps, part, shots, number, self._lineage, self.metric.name, seen)
            return asked.to_records(arrays)

        return request

    def read(self, replies: Iterable[Message], lrs: list[float]) -> Scores:
        """Return the scores in these replies. Invalid ones are named, and their tasks are missing."""
        rows = Rows(self._population.spec, self.metric, lrs, self.steps)
        self._messages.receive(replies, rows.read)
        return rows.scores()

    def score(
        self, grid: Grid, meta: Params, task_ids: list[str], lrs: list[float], shots: int = 0, *, seen: bool = False
    ) -> Scores:
        """Ask for the scores of these tasks, outside the rounds. Tasks of nodes that fail are missing, and are named.

        `meta`: the model after round `of_round`; `shots`: adapt only on the first so many support examples of
        each class; 0: on all. `seen`: the tasks are training tasks.
        """
        number = self.of_round
        messages = self.ask(to_arrays(meta), task_ids, lrs, number, shots, final=True, seen=seen)
        scores = self.read(grid.send_and_receive(messages, timeout=self._config.round_deadline), lrs)
        every = self.wait_for(grid, scores, meta, task_ids, number, shots, seen=seen)
        found = every.known(self.metric)
        self.without = sorted(set(every.task_ids) - set(found.task_ids))
        return found

    def wait_for(
        self,
        grid: Grid,
        scores: Scores,
        meta: Params,
        wanted: list[str],
        number: int,
        shots: int = 0,
        *,
        seen: bool = False,
    ) -> Scores:
        """With `on-too-few = "repeat"`, ask again for tasks whose nodes were away and return within `node-deadline`.

        `number`: the round after which they are scored. Returns `scores` with the additional ones.
        """
        nodes, homes = self._messages.nodes, self._population.homes
        clock = clock_of(grid)
        started = clock.now()
        while self._config.on_too_few == "repeat":
            missing = {task_id: homes[task_id] for task_id in set(wanted) - set(scores.task_ids)}
            away = [task for task, node in missing.items() if not (nodes.can_be_asked(node) or nodes.left_out(node))]
            if not away or clock.now() - started > self._config.node_deadline:
                break
            clock.sleep(min(0.5, self._config.node_deadline))
            nodes.refresh(grid)
            if back := sorted(task for task in away if nodes.can_be_asked(homes[task])):
                messages = self.ask(to_arrays(meta), back, scores.lrs, number, shots, seen=seen)
                replies = grid.send_and_receive(messages, timeout=self._config.round_deadline)
                scores = scores.joined(self.read(replies, scores.lrs))
        return scores

    def grown(self, grid: Grid, scores: Scores, meta: Params, number: int) -> Scores:
        """Ask again for these tasks with more steps, as long as they gain from the last ones and `adapt-steps` may grow.

        `number`: the round after which the model was `meta`. Returns the scores with the most steps,
        which `steps` then is. A task that is missing among the new scores ends it: means would be of other tasks.
        """
        for steps in (more for more in self._config.more_steps if more > self.steps):
            known = scores.known(self.metric)
            if not known.task_ids or not gains_at_the_end(known, self.metric, *self.choose_rate(known)):
                break
            before, self.steps = self.steps, steps
            messages = self.ask(to_arrays(meta), scores.task_ids, scores.lrs, number, final=True)
            longer = self.read(grid.send_and_receive(messages, timeout=self._config.round_deadline), scores.lrs)
            longer = self.wait_for(grid, longer, meta, scores.task_ids, number)
            if longer.task_ids != scores.task_ids:
                self.steps = before
                break
            scores = longer
        return scores

    def take_over(self, scores: Scores | None) -> None:
        """Take over the scores of the validation tasks from the run to go on from, with their number of steps."""
        self.last = scores
        if scores is not None and scores.steps in self._config.more_steps:
            self.steps = scores.steps

    @property
    def is_current(self) -> bool:
        """Whether the last scores are of the rates and the number of steps that the settings ask for; so if there are none."""
        return self.last is None or (self.last.lrs, self.last.steps) == (self.lrs, self.steps)

    def take(self, server_round: int, scores: Scores) -> tuple[dict[str, Any], Scored] | None:
        """Take in the scores of the validation tasks, and return (their entry in the history, the event).

        The history has the curve of the rate with the best of these scores. Returns None if no task
        could be scored.
        """
        scores = self.last = scores.known(self.metric)
        if not scores.task_ids:
            return None
        lr, step = self.chosen_rate()
        at, name = scores.lrs.index(lr), self.metric.name
        curve = scores.metrics[:, at].mean(axis=0)
        self._remember_best({"round": server_round, "adapt_lr": lr, "adapt_steps": step, name: float(curve[step])})
        losses = scores.losses[:, at].mean(axis=0)
        record = {"adapt_lr": lr, name: curve.tolist(), "loss": losses.tolist(), "tasks": len(scores.task_ids)}
        return record, Scored(server_round, name, float(curve[0]), float(curve[step]), lr, step, len(scores.task_ids))

    def _remember_best(self, scored: dict[str, Any]) -> None:
        """Keep the evaluation with the best validation score so far; the first of equal ones."""
        metric = self.metric
        value = scored[metric.name]
        if math.isfinite(value) and (self.best is None or metric.is_better(value, self.best[metric.name])):
            self.best = scored

    def choose_rate(self, scores: Scores) -> tuple[float, int]:
        """Return (learning rate, steps >= 1) with the best mean metric; ties go to the lower loss, then to fewer steps."""
        return best_rate(scores, self.metric)

    def chosen_rate(self) -> tuple[float, int]:
        """Return (learning rate, steps) by the last scores of the validation tasks; without any, inner rate and all steps."""
        scores = self.last
        if scores is None or not scores.task_ids:
            return self._inner_lr, self.steps
        if self._chosen is None or self._chosen[0] is not scores:  # every checkpoint asks, and there may be thousands of steps
            self._chosen = scores, self.choose_rate(scores)
        return self._chosen[1]
