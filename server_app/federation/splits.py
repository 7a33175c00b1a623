"""Splits the tasks into training, validation and test, by seed.

`hashed` decides on every task by itself, by a hash u in [0, 1) of (seed, name): test if u is below
the share of test tasks, validation if it lies in the next part, else training. A task therefore
does not affect the split of others, which privacy requires. A whole number instead of a share takes
the tasks with the smallest u; one more task can then move one task across each border. `exact`
draws a permutation and has exact shares, but one more task redraws all.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from quickbloom.common.config.run import RunConfig
from quickbloom.common.datasets.base import SPLITS, TaskInfo
from quickbloom.common.errors import ConfigError
from quickbloom.common.formatting import counted
from quickbloom.common.randomness import generator
from quickbloom.server_app.events.channel import Warn, warn_in_log
from quickbloom.server_app.messaging.admission import group_of, lacks

Split = dict[str, str]
"""The split of every name, of a task or of a group of tasks."""


def split_tasks(tasks: Sequence[TaskInfo], config: RunConfig, warn: Warn = warn_in_log) -> dict[str, list[str]]:
    """Return the task ids of "train", "validation" and "test": as published by the data set's authors, else drawn by seed.

    Tasks of one group stay together. If authors published a test part but no validation part,
    validation tasks are drawn from their training part. A task without the examples that its part
    needs (support, query or test) is left out and named.
    """
    published = {task.split for task in tasks} - {""}
    fixed = published - {"train"} if "validation" not in published else published
    splits: dict[str, list[TaskInfo]] = {name: [task for task in tasks if task.split == name in fixed] for name in SPLITS}
    free: dict[str, list[TaskInfo]] = {}
    for task in tasks:
        if task.split not in fixed:
            free.setdefault(group_of(task), []).append(task)
    validation = 0 if "validation" in published else config.validation_tasks
    test = 0 if "test" in published else config.test_tasks
    _check_enough(validation, test, len(free), config)
    draw = hashed if by_hash(config) else exact
    where = draw(sorted(free), config.seed, validation, test) if free else {}
    for name, split in where.items():
        splits[split] += free[name]
    if config.privacy.on and (reason := _dependence(where, config, validation, test)):
        warn(reason)
    usable = {
        split: sorted(task.task_id for task in members if _usable(task, split, warn)) for split, members in splits.items()
    }
    if not usable["train"]:
        raise ConfigError("no task is left to train on: every training task needs at least one support and one query example")
    return usable


@dataclass(frozen=True)
class Before:
    """The tasks of a run that is continued.

    `splits`: as in `Population`; `joined`: those that joined during the run; `unused`: those in no split, None where the
    checkpoint does not say: then no task can be new.
    """

    splits: Mapping[str, Sequence[str]]
    joined: frozenset[str] = frozenset()
    unused: frozenset[str] | None = None

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(task_id for ids in self.splits.values() for task_id in ids) | (self.unused or frozenset())

    def is_new(self, task_id: str) -> bool:
        """Return whether the run did not have this task."""
        return self.unused is not None and task_id not in self._known

    def split(self, tasks: Mapping[str, TaskInfo], config: RunConfig, warn: Warn) -> dict[str, list[str]]:
        """Return the split as it was, without tasks that joined and are not there now. Raises ConfigError if others lack.

        Otherwise training tasks could end up among the test tasks. `tasks`: those of the run that are there, by id.
        """
        if self.unused is None:
            original = [task for task_id, task in tasks.items() if task_id not in self.joined]
            fits = split_tasks(original, config, warn) == self._without(self.joined)
        else:
            missing = {task_id for task_id in self._known - self.unused - self.joined if task_id not in tasks}
            lacking = [one for split, ids in self.splits.items() for one in ids if one in tasks and lacks(tasks[one], split)]
            fits = not missing and not lacking
        if not fits:
            raise ConfigError(
                "`resume-from` needs the tasks of the run to go on from: connect the same nodes with the same data"
            )
        if away := {one for one in self.splits["train"] if one in self.joined and one not in tasks}:
            warn(
                f"{counted(len(away), 'task')} that joined the run before cannot be asked: they join when their nodes are back"
            )
        return self._without(away)

    def _without(self, away: Collection[str]) -> dict[str, list[str]]:
        return {split: [one for one in ids if one not in away] for split, ids in self.splits.items()}


def by_hash(config: RunConfig) -> bool:
    """Return whether each task is decided on by itself. A user's own tasks come and go; those of built-in data are fixed."""
    return config.split == "hashed" or (
        config.split == "auto" and ((config.dataset == "own" and not config.partition) or config.privacy.on)
    )


def exact(names: Sequence[str], seed: int, validation: float, test: float) -> Split:
    """Draw a permutation: the first names are for validation, the next for test, with exact shares below 1, or numbers."""
    order = [names[i] for i in generator(seed, "split").permutation(len(names))]
    num_validation, num_test = (_part(value, len(order)) for value in (validation, test))
    splits = ["validation"] * num_validation + ["test"] * num_test
    return dict(zip(order, splits + ["train"] * (len(order) - len(splits)), strict=True))


def hashed(names: Sequence[str], seed: int, validation: float, test: float) -> Split:
    """Split every name by its own hash, with shares below 1; with whole numbers by the smallest hashes, test before validation.

    A share beside a whole number of test tasks takes the largest hashes, so that it does not depend
    on that number. With few names a part may be empty: it then takes the nearest name of another
    part that has several.
    """
    place = {name: hashed_place(seed, name) for name in names}
    order = sorted(names, key=lambda name: (place[name], name))
    where = dict.fromkeys(order, "train")
    if _is_share(validation):
        low = test if _is_share(test) else 1 - validation
        where |= {name: "validation" for name in order if low <= place[name] < low + validation}
    if _is_share(test):
        where |= {name: "test" for name in order if place[name] < test}
    else:
        where |= dict.fromkeys(order[: int(test)], "test")
    if not _is_share(validation):
        where |= dict.fromkeys([name for name in order if where[name] == "train"][: int(validation)], "validation")
    return _without_empty(where, {"test": test > 0, "validation": validation > 0, "train": True})


def hashed_place(seed: int, name: str) -> float:
    """Return the position of a task or group in [0, 1): a keyed hash of its name, the same on every machine."""
    key = hashlib.blake2b(str(seed).encode(), digest_size=32, person=b"quickbloom split").digest()
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


def _without_empty(where: Split, wanted: dict[str, bool]) -> Split:
    """Return `where` in the order of the hashes, with a name in every part that is wanted.

    Test takes the smallest hash that another part can spare, training the largest, validation the
    smallest of training, or the largest of test.
    """
    where = dict(where)
    for split, donors in (
        ("test", ("validation", "train")),
        ("train", ("validation", "test")),
        ("validation", ("train", "test")),
    ):
        if not wanted[split] or split in where.values() or not where:
            continue
        for donor in donors:
            members = [name for name, part in where.items() if part == donor]
            if len(members) > (1 if wanted[donor] else 0):
                where[members[-1 if split == "train" or donor == "test" else 0]] = split
                break
    return where


def _dependence(where: Split, config: RunConfig, validation: float, test: float) -> str:
    """Return in words why, with privacy, the split of one task may depend on the presence of another; "" if it does not."""
    way_out = (
        "adding a task can move another one between training and held out, so the account is that of adding or removing a "
        "training task while all other splits stay"
    )
    if not by_hash(config):
        return f'Privacy with `split = "exact"`: {way_out}; set `split` to "hashed"'
    if any(value >= 1 for value in (validation, test)):
        return f"Privacy with whole numbers of `validation-tasks` or `test-tasks`: {way_out}; give shares below 1"
    if any(_by_place(config.seed, name, validation, test) != split for name, split in where.items()):
        return f"Privacy with so few tasks that a split would be empty: {way_out}; connect more tasks"
    return ""


def _by_place(seed: int, name: str, validation: float, test: float) -> str:
    place = hashed_place(seed, name)
    return "test" if place < test else "validation" if place < test + validation else "train"


def _check_enough(validation: float, test: float, number: int, config: RunConfig) -> None:
    """Raise ConfigError if none of `number` tasks or groups is left for training."""
    num_validation, num_test = (_part(value, number) for value in (validation, test))
    all_of_it = by_hash(config) and sum(value for value in (validation, test) if _is_share(value)) >= 1
    if number and (num_validation + num_test >= number or all_of_it):
        raise ConfigError(
            f"`validation-tasks` ({num_validation}) and `test-tasks` ({num_test}) leave none of the {number} tasks for "
            "training: lower them (such as `--set validation-tasks=0 --set test-tasks=1`), or connect nodes with more tasks"
            + _instead(config, number)
        )


def _instead(config: RunConfig, number: int) -> str:
    """Return alternatives for so few tasks of a user's own."""
    if config.dataset != "own":
        return ""
    if number > 1:
        return "; to test every task on a model of the others, use `quickbloom run --leave-one-out`"
    return "; of a single task nothing can be held out: name the column that tells tasks apart with `--task`"


def _usable(task: TaskInfo, split: str, warn: Warn) -> bool:
    if reason := lacks(task, split):
        warn(f"Task {task.task_id} is left out: {reason}")
    return not reason


def _is_share(value: float) -> bool:
    return 0 < value < 1


def _part(value: float, total: int) -> int:
    return max(1, round(value * total)) if _is_share(value) else int(value)
