"""Nodes that join while a run goes on: which of their tasks take part, and why others do not.

New tasks only ever train: a held-out task would change what the scores are of. They join the
training split, sorted as it is, so that the tasks of a round stay a function of (seed, round, ids).
Nothing here depends on rounds.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from quickbloom.common.config.run import RunConfig
from quickbloom.common.datasets.base import TaskInfo, left_out_in_words
from quickbloom.common.wire.refusal import Misfit
from quickbloom.common.wire.roll_call import RollCallReply
from quickbloom.server_app.events.channel import Events
from quickbloom.server_app.events.kinds import Joined, Refused
from quickbloom.server_app.messaging.admission import difference, group_of, hosted_twice, why_not_trained
from quickbloom.server_app.messaging.population import Population
from quickbloom.server_app.messaging.refusing import misfit_of

_LATER = "it can take part in the next one"


@dataclass(frozen=True)
class Offer:
    """What a node brings that answered the roll call during a run.

    `known`: ids of tasks of the run, which it may take over; `new`: tasks that can join; `left_out`: other new tasks by id,
    each with the reason. `refusal`: why the node does not take part, "" if it can.
    """

    known: list[str] = field(default_factory=list)
    new: list[TaskInfo] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    refusal: str = ""


class Joining:
    """Lets tasks of newcomers join `population`. `events`: is told who joined.

    `objection`: returns why the run could not go on with such a population, "" if it can; `count`: how often a node joined.
    """

    def __init__(self, population: Population, config: RunConfig, events: Events | None = None) -> None:
        self._population = population
        self._dataset = config.dataset
        self._events = events or Events()
        self._closed = _why_closed(config)
        self._news: dict[int, list[str]] = {}
        self.objection: Callable[[Population], str] = lambda population: ""
        self.count = 0

    def close(self, reason: str) -> None:
        """Let nobody join from now on, for this reason."""
        self._closed = self._closed or f"{reason}: {_LATER}"

    def offer(self, node_id: int, answer: RollCallReply, is_there: Callable[[int], bool]) -> Offer:
        """Return what of a node's answer to the roll call can take part. `is_there`: whether a node can be asked."""
        population = self._population
        if answer.spec != population.spec:
            return Offer(refusal=difference(answer.spec, population.spec))
        tasks = {task.task_id: task for task in answer.tasks}
        ours = population.tasks.keys() & tasks.keys()
        known = [task_id for task_id in tasks if task_id in ours and population.tasks[task_id] == tasks[task_id]]
        for task_id in sorted(ours.difference(known)):
            if (home := population.homes[task_id]) != node_id and is_there(home):
                return Offer(refusal=self.twice(task_id))
        others = [task for task_id, task in tasks.items() if task_id not in ours]
        new, left_out = self._sorted(others) if not self._closed else ([], {})
        refusal = "" if known or new else self._why_nothing(others, left_out)
        return Offer(known, new, left_out, refusal)

    def twice(self, task_id: str) -> str:
        """Return the sentence on a task that two nodes host."""
        return hosted_twice(task_id, self._dataset)

    def _sorted(self, tasks: Iterable[TaskInfo]) -> tuple[list[TaskInfo], dict[str, str]]:
        """Return (tasks that can train, reasons of the others)."""
        splits = self._population.splits
        held_out = {group_of(self._population.tasks[one]) for name in splits if name != "train" for one in splits[name]}
        reasons = {task.task_id: why_not_trained(task, held_out) for task in tasks}
        return [task for task in tasks if not reasons[task.task_id]], {name: why for name, why in reasons.items() if why}

    def _why_nothing(self, others: list[TaskInfo], left_out: dict[str, str]) -> str:
        if not others:
            return Misfit("tasks", f"it hosts no task as this run has it: {_LATER}")
        return Misfit("tasks", self._closed or f"none of its tasks can train: {left_out_in_words(left_out)}")

    def admit(self, node_id: int, offer: Offer, answer: RollCallReply) -> str:
        """Give the tasks of an offer their home on this node. Returns an objection, after which nothing has changed, or ""."""
        population = self._population
        come = [*offer.left_out, *(task.task_id for task in offer.new)] if offer.new else []
        homes = population.homes | dict.fromkeys([*offer.known, *come], node_id)
        train = sorted([*population.splits["train"], *(task.task_id for task in offer.new)])
        trial = replace(population, homes=homes, splits=population.splits | {"train": train})
        if offer.new and (reason := self.objection(trial)):
            if not offer.known:
                return f"with its tasks {reason}"
            self._events.warn(f"Node {node_id} takes part without its new tasks: with these {reason}")
            return self.admit(node_id, Offer(offer.known), answer)
        population.homes.update(homes)
        population.told.add(node_id)
        population.keepers |= {node_id} if answer.keeps else set()
        if offer.new:
            self._let_in(node_id, offer, answer, train)
        return ""

    def _let_in(self, node_id: int, offer: Offer, answer: RollCallReply, train: list[str]) -> None:
        population = self._population
        come = {task.task_id: task for task in answer.tasks if task.task_id not in population.tasks}
        population.tasks.update(come)
        population.splits["train"] = train
        ids = [task.task_id for task in offer.new]
        population.joined |= set(ids)
        self.count += 1
        self._news.setdefault(node_id, []).extend(ids)
        if left_out := {**answer.left_out, **offer.left_out}:
            self._events.warn(left_out_in_words(left_out))
        self._events.tell(Joined(node_id, len(ids), self._events.round))

    def refuse(self, node_id: int, reason: str) -> None:
        """Report a node that does not take part."""
        self._events.tell(Refused(node_id, misfit_of(reason), self._events.round))

    def news(self) -> dict[str, Any]:
        """Return who joined since the last call, for the history: {"nodes": ids, "tasks": ids}, both sorted; {} for nobody."""
        news, self._news = self._news, {}
        return {"nodes": sorted(news), "tasks": sorted(one for ids in news.values() for one in ids)} if news else {}


def _why_closed(config: RunConfig) -> str:
    """Return why the tasks of a run are fixed by its settings; "" if they are not."""
    if config.privacy.on:
        return f"with privacy the training tasks of a run are fixed, since its account counts with their number: {_LATER}"
    if config.secure_aggregation:
        return f"with `secure-aggregation` the nodes of a run are fixed: {_LATER}"
    if not config.join:
        return f"it hosts none of the tasks of this run, and `join` is false: {_LATER}"
    return ""
