"""The split: as published or drawn by seed, and by hash one task changes nothing for the others."""

import logging
from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.datasets.base import TaskInfo
from quickbloom.common.errors import ConfigError
from quickbloom.server_app.federation.splits import exact, hashed, hashed_place, split_tasks

# A deadline per example would fail on a busy machine.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

PRIVATE = {"privacy.noise-multiplier": 1.0, "privacy.clip": 1.0}


def config(**changes: str | int | float) -> RunConfig:
    return parse_run_config({key.replace("_", "-"): value for key, value in changes.items()})


def task(name: str, *, group: str = "", split: str = "", counts: tuple[int, int, int] = (2, 2, 2)) -> TaskInfo:
    return TaskInfo(name, *counts, group=group, split=split)


def tasks(count: int) -> list[TaskInfo]:
    return [task(f"task-{i:03d}") for i in range(count)]


def where(splits: dict[str, list[str]]) -> dict[str, str]:
    return {task_id: name for name, ids in splits.items() for task_id in ids}


def test_split_depends_on_the_seed() -> None:
    drawn = [split_tasks(tasks(40), config(seed=seed))["test"] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


@given(st.lists(st.integers(0, 6), min_size=9, max_size=40), st.integers(0, 5))
def test_tasks_of_a_group_stay_together(groups: list[int], seed: int) -> None:
    hosted = [task(f"task-{i}", group=f"group-{group}") for i, group in enumerate(groups)]
    if len(set(groups)) < 3:
        return
    splits = split_tasks(hosted, config(seed=seed))
    where = {task_id: name for name, ids in splits.items() for task_id in ids}
    assert len(where) == len(hosted)
    assert len({(t.group, where[t.task_id]) for t in hosted}) == len(set(groups))


def test_published_splits_are_honoured() -> None:
    hosted = [task(f"{split}-{i}", split=split) for split in ("train", "validation", "test") for i in range(3)]
    splits = split_tasks(hosted, config(seed=9))
    assert splits == {split: [f"{split}-{i}" for i in range(3)] for split in ("train", "validation", "test")}


def test_validation_is_drawn_from_published_train_where_none_is_published() -> None:
    hosted = [task(f"{split}-{i:02d}", split=split) for split in ("train", "test") for i in range(20)]
    splits = split_tasks(hosted, config())
    assert splits["test"] == [f"test-{i:02d}" for i in range(20)]
    assert len(splits["validation"]) == 3
    assert sorted(splits["train"] + splits["validation"]) == [f"train-{i:02d}" for i in range(20)]


def test_parts_may_be_numbers_of_tasks_and_may_be_none() -> None:
    splits = split_tasks(tasks(20), config(validation_tasks=5, test_tasks=0))
    assert {name: len(ids) for name, ids in splits.items()} == {"train": 15, "validation": 5, "test": 0}


def test_a_small_part_still_gets_one_task() -> None:
    splits = split_tasks(tasks(3), config(validation_tasks=0.01, test_tasks=0.01))
    assert {name: len(ids) for name, ids in splits.items()} == {"train": 1, "validation": 1, "test": 1}


@pytest.mark.parametrize(
    ("count", "changes"), [(2, {}), (10, {"test_tasks": 10}), (10, {"validation_tasks": 4, "test_tasks": 6})]
)
def test_too_few_tasks_are_refused(count: int, changes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=rf"leave none of the {count} tasks for training: lower them"):
        split_tasks(tasks(count), config(**changes))


def without(part: str) -> Callable[[TaskInfo], TaskInfo]:
    return lambda info: replace(info, **{f"num_{part}": 0})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("part", "left"),
    [("support", set()), ("query", {"validation", "test"}), ("test", {"train"})],
    ids=["support", "query", "test"],
)
def test_a_task_that_cannot_do_its_part_is_left_out_and_named(
    part: str, left: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    # One of the two tasks of every published split lacks its examples of `part`.
    hosted = [task(f"{split}-{i}", split=split) for split in ("train", "validation", "test") for i in range(2)]
    hosted = [without(part)(info) if info.task_id.endswith("0") else info for info in hosted]
    splits = split_tasks(hosted, config())
    assert {name for name, ids in splits.items() if len(ids) == 2} == left
    for name in {"train", "validation", "test"} - left:
        assert splits[name] == [f"{name}-1"]
        assert f"Task {name}-0 is left out" in caplog.text


def test_no_usable_training_task_is_refused() -> None:
    with pytest.raises(ConfigError, match="no task is left to train on"):
        split_tasks([without("query")(info) for info in tasks(20)], config())


# ---- by hash


def test_the_place_of_a_task_is_a_keyed_hash_of_seed_and_name() -> None:
    # The same with hashlib by hand: nothing of it may change, or runs could not go on.
    key = blake2b(b"7", digest_size=32, person=b"quickbloom split").digest()
    number = int.from_bytes(blake2b("Ärztin 1".encode(), digest_size=8, key=key).digest(), "big")
    assert hashed_place(7, "Ärztin 1") == pytest.approx(number / 2**64, abs=2**-52)
    assert hashed_place(0, "a") == 0.3232152315605161
    assert hashed_place(7, "a") != hashed_place(70, "a") != hashed_place(7, "b")
    assert 0 <= hashed_place(7, "\udcff") < 1


def test_shares_are_met_on_average_and_the_parts_lie_beside_one_another() -> None:
    names = [f"user {i}" for i in range(20_000)]
    found = hashed(names, 3, 0.15, 0.2)
    # Binomial: a deviation of sqrt(n p (1 - p)), at most 57.
    assert [list(found.values()).count(part) for part in ("test", "validation", "train")] == pytest.approx(
        [4000, 3000, 13_000], abs=5 * 70
    )
    assert all((hashed_place(3, name) < 0.2) == (part == "test") for name, part in found.items())
    assert all((0.2 <= hashed_place(3, name) < 0.35) == (part == "validation") for name, part in found.items())


NAMES = st.lists(st.text(max_size=6), min_size=40, max_size=80, unique=True)


@settings(max_examples=50)
@given(NAMES, st.integers(0, 99), st.data())
def test_by_shares_one_task_changes_nothing_for_the_others(names: list[str], seed: int, data: st.DataObject) -> None:
    gone = data.draw(st.sampled_from(names))
    all_of_them = hashed(names, seed, 0.25, 0.3)
    others = hashed([name for name in names if name != gone], seed, 0.25, 0.3)
    del all_of_them[gone]
    if min(list(all_of_them.values()).count(part) for part in ("train", "validation", "test")) > 0:
        assert others == all_of_them


@settings(max_examples=50)
@given(NAMES, st.integers(0, 99), st.data())
def test_by_whole_numbers_one_task_moves_at_most_one_across_each_border(
    names: list[str], seed: int, data: st.DataObject
) -> None:
    gone = data.draw(st.sampled_from(names))
    before, after = hashed(names, seed, 5, 7), hashed([name for name in names if name != gone], seed, 5, 7)
    moved = sorted((before[name], after[name]) for name in after if before[name] != after[name])
    assert moved in ([], [("train", "validation")], [("train", "validation"), ("validation", "test")])
    for found in (before, after):
        assert [list(found.values()).count(part) for part in ("test", "validation")] == [7, 5]
        places = {p: [hashed_place(seed, n) for n in found if found[n] == p] for p in ("test", "validation", "train")}
        assert max(places["test"]) < min(places["validation"]) <= max(places["validation"]) < min(places["train"])


@settings(max_examples=50)
@given(NAMES, st.integers(0, 99), st.data())
def test_a_share_beside_a_whole_number_does_not_depend_on_it(names: list[str], seed: int, data: st.DataObject) -> None:
    gone = data.draw(st.sampled_from(names))
    for validation, test in ((0.3, 4), (4, 0.3)):
        share, number = ("validation", "test") if validation < 1 else ("test", "validation")
        before = hashed(names, seed, validation, test)
        after = hashed([name for name in names if name != gone], seed, validation, test)
        assert sum(before[name] != after[name] for name in after) <= 1 or list(after.values()).count(share) <= 1
        assert list(after.values()).count(number) == 4
    # It lies at the other end, so that the tasks which the whole number takes are not its own.
    beside = hashed(names, seed, 0.3, 4)
    upper = {name for name in names if hashed_place(seed, name) >= 0.7}
    assert {name for name in names if beside[name] == "validation"} == upper or not upper or len(upper) > len(names) - 5


def test_where_one_permutation_redraws_the_others() -> None:
    # The fault that hashing mends, to show that the tests above can fail.
    names = [f"{i:02d}" for i in range(40)]
    before, after = exact(names, 0, 0.25, 0.3), exact(names[1:], 0, 0.25, 0.3)
    assert sum(before[name] != after[name] for name in after) > 10


@pytest.mark.parametrize(
    ("validation", "test"), [(0.15, 0.2), (0.01, 0.01), (0, 0.001), (0.001, 0), (2, 0.01), (0.01, 2), (0, 0)]
)
def test_of_few_tasks_no_part_that_was_asked_for_is_empty(validation: float, test: float) -> None:
    for seed in range(60):
        names = [f"ward {i}" for i in range(4)]
        found = hashed(names, seed, validation, test)
        counts = {part: list(found.values()).count(part) for part in ("train", "validation", "test")}
        assert counts["train"] > 0
        assert (counts["validation"] > 0, counts["test"] > 0) == (validation > 0, test > 0)
        assert found == hashed(names[::-1], seed, validation, test)


def test_of_few_tasks_those_nearest_to_a_part_go_there_by_hand() -> None:
    names = ["a", "b", "c", "d"]
    order = sorted(names, key=lambda name: hashed_place(11, name))
    # Shares too small for any of the four places: the least goes to test, the next to validation.
    assert hashed(names, 11, 1e-9, 1e-9) == {order[0]: "test", order[1]: "validation", order[2]: "train", order[3]: "train"}
    # Shares so large that none would train: the largest does.
    assert hashed(names, 11, 0.5 - 1e-9, 0.5)[order[-1]] == "train"


def test_groups_are_placed_as_a_whole_by_their_names() -> None:
    hosted = [task(f"drawer-{i}", group=f"alphabet {i % 9}") for i in range(90)]
    found = where(split_tasks(hosted, config(split="hashed", seed=5)))
    by_group = hashed([f"alphabet {i}" for i in range(9)], 5, 0.15, 0.2)
    assert found == {info.task_id: by_group[info.group] for info in hosted}


@pytest.mark.parametrize(
    ("settings", "by_hash"),
    [
        ({}, False),
        ({"dataset": "own"}, True),
        ({"split": "hashed"}, True),
        ({"split": "exact", "dataset": "own"}, False),
        (PRIVATE, True),
        ({**PRIVATE, "dataset": "own"}, True),
        ({**PRIVATE, "split": "exact"}, False),
    ],
)
def test_who_is_split_how(settings: dict[str, str | float], by_hash: bool) -> None:
    found = where(split_tasks(tasks(30), parse_run_config(settings)))
    names = [info.task_id for info in tasks(30)]
    assert found == (hashed if by_hash else exact)(names, 0, 0.15, 0.2)


def test_the_split_of_the_built_in_data_sets_is_the_one_it_was() -> None:
    # Learning curves hang on it: of 56 writers with seed 0, written down before there was a hash.
    found = split_tasks([task(f"device-{i:02d}") for i in range(56)], config())
    assert found["validation"] == [f"device-{i:02d}" for i in [2, 8, 30, 31, 32, 45, 49, 54]]
    assert found["test"] == [f"device-{i:02d}" for i in [4, 5, 9, 13, 16, 26, 28, 35, 38, 41, 43]]


@pytest.mark.parametrize(
    ("changes", "number", "words"),
    [
        ({}, 60, ""),
        ({"split": "exact"}, 60, 'Privacy with `split = "exact"`'),
        ({"validation-tasks": 4.0}, 60, "Privacy with whole numbers"),
        ({"test-tasks": 4.0, "validation-tasks": 0.0}, 60, "Privacy with whole numbers"),
        ({"test-tasks": 0.0, "validation-tasks": 0.0}, 60, ""),
        ({}, 3, "Privacy with so few tasks"),
    ],
)
def test_a_split_that_hangs_on_the_presence_of_a_task_is_told_with_privacy(
    changes: dict[str, str | float], number: int, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("flwr").propagate = True
    split_tasks(tasks(number), parse_run_config({**PRIVATE, **changes}))
    assert ("can move another one between training and held out" in caplog.text) == bool(words)
    assert words in caplog.text
    caplog.clear()
    split_tasks(tasks(number), parse_run_config({"dataset": "own", **changes}))
    assert caplog.text == ""


def test_shares_that_leave_nothing_for_training_are_refused() -> None:
    with pytest.raises(ConfigError, match="leave none of the 5 tasks for training: lower them"):
        split_tasks(tasks(5), config(split="hashed", validation_tasks=0.5, test_tasks=0.5))
    with pytest.raises(ConfigError, match="`split` must be 'auto', 'hashed' or 'exact', got 'hash'"):
        config(split="hash")
