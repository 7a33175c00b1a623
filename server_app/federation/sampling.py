"""Chooses the training tasks of a round and those that are scored as seen users, and checks that this can work."""

import math

from quickbloom.common.config.run import RunConfig
from quickbloom.common.errors import ConfigError
from quickbloom.common.randomness import generator
from quickbloom.server_app.federation.private.privacy import TaskPrivacy
from quickbloom.server_app.federation.private.secure_sum import unfit
from quickbloom.server_app.federation.robust.aggregation import too_few
from quickbloom.server_app.messaging.population import Population


def seen_users(config: RunConfig, population: Population) -> tuple[list[str], int]:
    """Return (the training tasks to score as seen users, sorted; the number of those that could be), a function of the seed.

    At most `seen-users`, of the tasks with test examples of their own. Raises ConfigError if the settings ask for seen users
    and there are none.
    """
    if not config.scores_seen:
        return [], 0
    able = sorted(task_id for task_id in population.splits["train"] if population.tasks[task_id].num_test)
    if not able and config.evaluate_users != "auto":
        raise ConfigError(
            f'`evaluate-users` must be "unseen" or "auto" where no training task has test examples of its own, got '
            f"{config.evaluate_users!r}"
        )
    if not config.seen_users or len(able) <= config.seen_users:
        return able, len(able)
    chosen = generator(config.seed, "seen").choice(len(able), config.seen_users, replace=False)
    return [able[i] for i in sorted(chosen)], len(able)


class Sampling:
    """The training tasks of every round. With `privacy` they are a secret sample, or take turns."""

    def __init__(self, config: RunConfig, population: Population, privacy: TaskPrivacy | None) -> None:
        self._config = config
        self._population = population
        self._privacy = privacy

    @property
    def number_of_tasks(self) -> int:
        """Return the intended number of training tasks in a round."""
        return self._config.tasks_in_round(len(self._population.splits["train"]))

    @property
    def enough_tasks(self) -> int | None:
        """Return how many tasks, with `over-select`, must be answered for until the others are not waited for."""
        return self.number_of_tasks if self._config.over_select > 1 else None

    @property
    def least_replies(self) -> int:
        """Return how many training tasks must contribute to a round."""
        least = self._config.min_replies
        return max(1, math.ceil(least * self.number_of_tasks - 1e-9) if least < 1 else math.ceil(least))

    def of_round(self, server_round: int) -> list[str]:
        """Return the training tasks of a round: with privacy those of `TaskPrivacy.choose`, else of `choose_tasks`."""
        if self._privacy:
            return self._privacy.choose(self._population.splits["train"], server_round)
        return self.choose_tasks(server_round)

    def choose_tasks(self, server_round: int) -> list[str]:
        """Return the training tasks of a round without privacy: a function of (seed, round) and of the task ids only."""
        train = self._population.splits["train"]
        number = math.ceil(self._config.over_select * self.number_of_tasks - 1e-9)
        if number >= len(train):
            return list(train)
        chosen = generator(self._config.seed, "tasks", server_round).choice(len(train), number, replace=False)
        return [train[i] for i in sorted(chosen)]

    def check(self, first_round: int) -> None:
        """Raise ConfigError for settings with which some round from `first_round` on would have too few tasks or nodes."""
        if self.least_replies > self.number_of_tasks:
            raise ConfigError(
                f"`min-replies` must be at most the {self.number_of_tasks} training tasks of a round, "
                f"got {self._config.min_replies:g}"
            )
        self._check_rule(first_round)

    def objection(self, population: Population, first_round: int) -> str:
        """Return why some round from `first_round` on would have too few nodes with such a population; "" if none would."""
        try:
            Sampling(self._config, population, self._privacy)._check_rule(first_round)
        except ConfigError as error:
            return str(error)
        return ""

    def _check_rule(self, first_round: int) -> None:
        """Refuse a rule of aggregation that would have too few nodes in some round, or too many."""
        config = self._config
        if config.aggregate == "mean" and not config.secure_aggregation:
            return
        rounds = self._nodes_of_rounds(first_round)
        if not rounds:  # resuming a run whose training is complete
            return
        for nodes, number in (min(rounds), max(rounds)) if config.secure_aggregation else ():
            if reason := unfit(nodes):
                raise ConfigError(f"`secure-aggregation` cannot work in round {number}: {reason}")
        nodes, number = min(rounds)
        if reason := too_few(config.aggregate, config.malicious, nodes, config.bucketing):
            lower = "`malicious` or `bucketing`" if config.bucketing > 1 else "`malicious`"
            raise ConfigError(
                f'`aggregate = "{config.aggregate}"` cannot work in round {number}: {reason}, since every node is one '
                f"vote; connect more nodes, let more tasks take part, or lower {lower}"
            )

    def _nodes_of_rounds(self, first_round: int) -> list[tuple[int, int]]:
        """Yield (nodes, round) of every round, if all of them answer."""
        homes = self._population.homes
        if self._privacy:  # the tasks of a round are not known before; all nodes take part
            return [(len({homes[task_id] for task_id in self._population.splits["train"]}), first_round)]
        rounds = range(first_round, self._config.rounds + 1)
        return [(len({homes[t] for t in self.choose_tasks(number)}), number) for number in rounds]
