"""Support, query and test of simulated users, and who holds what."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from quickbloom.common.config.run import parse_run_config
from quickbloom.common.datasets import load_dataset
from quickbloom.common.datasets.digits import _read
from quickbloom.common.datasets.holdings import held, in_words, table_of
from quickbloom.common.datasets.partitioned import PartitionedDataset, cut, user_names
from quickbloom.common.errors import DataError
from quickbloom.common.maths.batch import Batch, TaskData


def digits(partition: str, users: int = 15, **settings: float) -> PartitionedDataset:
    flat = {"dataset": "digits", "partition": partition, "users": users}
    config = parse_run_config(flat | {name.replace("_", "-"): value for name, value in settings.items()})
    found = load_dataset("digits", config.table("digits"), Path())
    assert isinstance(found, PartitionedDataset)
    return found


def parts_of(data: TaskData) -> tuple[Batch, Batch, Batch]:
    return data.support, data.query, data.test


def test_eight_examples_of_two_classes_are_cut_by_hand() -> None:
    # Shares 1/2, 1/4, 1/4; owed after each example of class 0: (.5 .25 .25) -> support; (0 .5 .5) -> query; (.5 -.25 .75) ->
    # test; (1 0 0) -> support. Class 1 goes on from there with nothing owed, so it is cut alike.
    parts = cut(np.array([0, 0, 0, 0, 1, 1, 1, 1]), (0.5, 0.25, 0.25))
    assert [part.tolist() for part in parts] == [[0, 3, 4, 7], [1, 5], [2, 6]]


@given(st.lists(st.integers(0, 4), min_size=3, max_size=60), st.floats(0.05, 0.9), st.floats(0.1, 0.9))
def test_parts_are_disjoint_hold_everything_and_have_their_shares(classes: list[int], test: float, support: float) -> None:
    strata, shares = np.array(classes), ((1 - test) * support, (1 - test) * (1 - support), test)
    parts = cut(strata, shares)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(strata)))
    assert all(map(len, parts))
    for part, share in zip(parts, shares, strict=True):
        assert len(part) <= share * len(strata) + 2
        for stratum in np.unique(strata):  # of each class to about one
            assert abs((strata[part] == stratum).sum() - share * (strata == stratum).sum()) <= 3


def test_copies_of_an_example_go_to_one_part() -> None:
    copies = np.array([7, 7, 1, 2, 3, 3, 4, 5, 6, 8, 9, 9])
    parts = cut(np.zeros(12, dtype=int), (0.375, 0.375, 0.25), copies)
    for one in range(3):
        for other in range(one):
            assert not set(copies[parts[one]]) & set(copies[parts[other]])


@given(st.lists(st.integers(0, 5), min_size=3, max_size=16), st.floats(0.05, 0.5))
def test_copies_of_few_examples_go_to_one_part_too(copies: list[int], test: float) -> None:
    every = np.array(copies)
    # As many copies as count one by one are left out.
    assume(len(set(copies)) >= 3 and len(set(copies)) * 4 >= len(copies))
    parts = cut(every % 2, ((1 - test) / 2, (1 - test) / 2, test), every)
    assert all(map(len, parts))
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(copies)))
    for one in range(3):
        for other in range(one):
            assert not set(every[parts[one]]) & set(every[parts[other]])


def test_natural_users_need_a_column() -> None:
    with pytest.raises(DataError, match="is for data with columns"):
        digits("natural:writer", users=0)


def test_three_copies_of_one_example_still_make_three_parts() -> None:
    assert [len(part) for part in cut(np.zeros(3, dtype=int), (0.375, 0.375, 0.25), np.zeros(3))] == [1, 1, 1]


def test_all_digits_are_with_one_user_each_and_in_one_part() -> None:
    dataset = digits("dirichlet:0.5")
    seen = [
        (row.tobytes(), int(label))
        for task in dataset.tasks()
        for part in parts_of(dataset.test_draws(task.task_id)[0])
        for row, label in zip(part.x.numpy(), part.y, strict=True)
    ]
    images, labels = _read()
    assert sorted(seen) == sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))
    assert (dataset.spec.outputs, dataset.spec.input_shape) == (10, (1, 8, 8))


def test_a_quarter_of_each_user_is_test_by_default_and_another_share_if_asked() -> None:
    for share, dataset in ((0.25, digits("iid")), (0.5, digits("iid", test_share=0.5))):
        for task in dataset.tasks():
            number = task.num_support + task.num_query + task.num_test
            assert abs(task.num_test - share * number) <= 1


def test_a_training_draw_never_touches_the_test_part() -> None:
    dataset = digits("pathological:2")
    for task in dataset.tasks():
        fixed = dataset.test_draws(task.task_id)[0].test
        draw = dataset.train_draw(task.task_id, np.random.default_rng(0))
        assert np.array_equal(draw.test.x, fixed.x)
        assert len(draw.support.x) + len(draw.query.x) == task.num_support + task.num_query


def test_the_same_users_come_out_for_every_seed_of_the_run() -> None:
    one, other = digits("dirichlet:0.5"), digits("dirichlet:0.5", seed=4)
    assert one.tasks() == other.tasks()
    assert one.tasks() != digits("dirichlet:0.5", partition_seed=1).tasks()


def test_only_examples_of_users_that_are_asked_for_are_made() -> None:
    dataset = digits("iid", partition_seed=9)
    assert len(dataset._data) == 0
    dataset.test_draws(dataset.tasks()[3].task_id)
    assert list(dataset._data) == ["user-03"]


def test_digits_without_a_partition_are_the_devices() -> None:
    found = load_dataset("digits", parse_run_config({}).table("digits"), Path())
    assert [task.task_id for task in found.tasks()][:2] == ["device-00", "device-01"]
    assert isinstance(found, PartitionedDataset)
    assert found.holdings() is None


def test_names_have_as_many_digits_as_they_need() -> None:
    assert user_names(2) == ["user-00", "user-01"]
    assert user_names(101)[::100] == ["user-000", "user-100"]


def test_who_holds_what_is_counted_and_told() -> None:
    found = held(["ant", "bee"], {"a": [np.array([0, 0]), np.array([1]), np.array([0])], "b": [np.array([1])] * 3})
    assert found.counts.tolist() == [[[2, 0, 1], [0, 1, 0]], [[0, 0, 0], [1, 1, 1]]]
    assert in_words(found) == "7 examples of 2 users, 3 to 4 each, half of them at least 3; 1 to 2 of 2 classes each"
    assert [line.split() for line in table_of(found)] == [
        ["user", "support", "query", "test", "ant", "bee"],
        ["a", "2", "1", "1", "3", "1"],
        ["b", "1", "1", "1", ".", "3"],
    ]


def test_a_long_table_says_what_it_leaves_out() -> None:
    found = held([str(k) for k in range(30)], {f"u{k}": [np.array([0])] * 3 for k in range(120)})
    assert list(table_of(found))[-2:] == ["and 20 more users", "and 10 more classes"]


@pytest.mark.parametrize("partition", ["size:linear", "shards:3"])
def test_holdings_agree_with_what_is_announced(partition: str) -> None:
    dataset = digits(partition)
    found = dataset.holdings()
    assert found is not None
    announced = [[task.num_support, task.num_query, task.num_test] for task in dataset.tasks()]
    assert found.counts.sum(axis=1).tolist() == announced
    assert found.counts.sum() == 1797
