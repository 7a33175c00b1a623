"""Whose turn it is in asynchronous training: the samples of rounds 1, 2, .. one after another, without a round's end.

A training task is given work in the order in which the rounds of synchronous training would draw it. So the choice depends
on (seed, turn) and not on who answers fast, and where all are equally fast it is that of the rounds.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from quickbloom.common.errors import ConfigError
from quickbloom.server_app.federation.sampling import Sampling

Turn = tuple[int, str]
"""(number of the turn, task)"""
_MOST_NAMED = 10
_PATIENCE = 20
"""Turns that each task has on average in a search that finds nobody, until the search is given up for now."""


@dataclass
class Turns:
    """The order of work. `state` is all that a continued run needs of it.

    `last`: the last turn that was drawn; `waiting`: turns of tasks whose node was away, or worked for another of its tasks;
    `drawn` and `given`: how many turns a task had while it was there, and how often it was then given work. With F =
    `fairness`, a task is given work in at most F times the share of its turns that all tasks are given work in, plus one; 0:
    no limit.
    """

    sampling: Sampling
    fairness: float = 0.0
    last: int = 0
    waiting: list[Turn] = field(default_factory=list)
    drawn: Counter[str] = field(default_factory=Counter)
    given: Counter[str] = field(default_factory=Counter)

    def take(
        self, number: int, present: Collection[str], at_work: Collection[str], can_start: Callable[[str], bool]
    ) -> list[Turn]:
        """Return the turns of up to `number` tasks that start to work now, in order.

        `present`: the training tasks whose nodes are there; `at_work`: those that compute; `can_start`: whether a task's
        node can be asked now. A task that is at work when its turn comes loses this turn. One whose node works for another
        task, or is away, waits, and goes before all later turns.
        """
        search = _Search(number, set(present), set(at_work), {task for task in present if can_start(task)} - set(at_work))
        search.drawn, search.given = (sum(map(counts.__getitem__, search.present)) for counts in (self.drawn, self.given))
        for turn in list(self.waiting):
            if search.wants_more and turn[1] in search.free:
                self.waiting.remove(turn)
                self._start_or_lose(turn, search)
        fruitless, most = 0, math.ceil(_PATIENCE * len(present) / max(1, self.sampling.number_of_tasks))
        while search.wants_more and fruitless < most and any(self._may(task, search) for task in search.free):
            before = len(search.chosen)
            self._draw(search)
            fruitless = 0 if len(search.chosen) > before else fruitless + 1
        return search.chosen

    def _draw(self, search: "_Search") -> None:
        """Go through one more turn."""
        self.last += 1
        queued = {task for _, task in self.waiting}
        for task in self.sampling.choose_tasks(self.last):
            turn = self.last, task
            started = task in search.at_work
            if task in queued:
                continue
            if not started and (task not in search.free or not search.wants_more):
                self.waiting.append(turn)
                continue
            self._start_or_lose(turn, search)

    def _start_or_lose(self, turn: Turn, search: "_Search") -> None:
        task = turn[1]
        if task in search.present:
            self.drawn[task] += 1
            search.drawn += 1
        if self._may(task, search):
            search.chosen.append(turn)
            search.free.discard(task)
            search.at_work.add(task)
            self.given[task] += 1
            search.given += 1

    def _may(self, task: str, search: "_Search") -> bool:
        """Return whether this task may start now: it is free, and has not had more than its share."""
        if task not in search.free:
            return False
        share = search.given / search.drawn if search.drawn else 1.0
        return not self.fairness or self.given[task] < self.fairness * share * self.drawn[task] + 1

    # ---- a continued run

    def state(self, under_way: Collection[Turn]) -> dict[str, Any]:
        """Return what a continued run needs, as JSON. `under_way`: what is asked for again then, before all others."""
        waiting = sorted(under_way) + self.waiting
        return {"turn": self.last, "waiting": waiting, "drawn": dict(self.drawn), "given": dict(self.given)}

    def restore(self, state: Any) -> None:
        """Go on from a `state`. Raises ConfigError if it is none."""
        try:
            self.last = _counted(state["turn"])
            self.waiting = [(_counted(turn), str(task)) for turn, task in state["waiting"]]
            self.drawn, self.given = (
                Counter({str(task): _counted(number) for task, number in state[name].items()}) for name in ("drawn", "given")
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ConfigError(
                "`resume-from` names a checkpoint of asynchronous training that does not say whose turn it is: start anew"
            ) from None


@dataclass
class _Search:
    """One search for tasks that can start. `free`: those that can; `chosen`: those that do.

    `drawn` and `given`: turns of all that are there, and how many of them they worked in.
    """

    number: int
    present: set[str]
    at_work: set[str]
    free: set[str]
    drawn: int = 0
    given: int = 0
    chosen: list[Turn] = field(default_factory=list)

    @property
    def wants_more(self) -> bool:
        return len(self.chosen) < self.number


def _counted(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**53:
        raise ValueError(f"{value!r} is no count")
    return value


def contributions(counted: Mapping[str, int], tasks: Collection[str]) -> dict[str, Any]:
    """Return how often `tasks` contributed to a step: "least", "median", "most", and as "rarely" who hardly ever did.

    These are up to ten tasks that contributed less than half as often as the median, the rarest first. `counted`: by task,
    without those that never did; `tasks`: one or more.
    """
    numbers = {task: counted.get(task, 0) for task in tasks}
    middle = median(numbers.values())
    rarely = sorted((task for task, number in numbers.items() if 2 * number < middle), key=lambda task: (numbers[task], task))
    known = {"least": min(numbers.values()), "median": middle, "most": max(numbers.values())}
    return {**known, "rarely": rarely[:_MOST_NAMED]}
