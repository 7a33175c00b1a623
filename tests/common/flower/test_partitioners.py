"""Whose rows are whose, against flwr-datasets used as its own documents say."""

import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest

from quickbloom.common.errors import DataError
from quickbloom.common.flower.partitioners import draw, load, users_by_name
from quickbloom.common.partition import Partition

ROWS = 900
CLASSES = np.random.default_rng(5).integers(0, 6, ROWS)


def directly(name: str, users: int, shuffle: int, **arguments: Any) -> list[list[int]]:
    """The rows of every user as flwr-datasets gives them: a table that is shuffled, then its partitioner."""
    table = load("datasets").Dataset.from_dict({"label": CLASSES, "row": np.arange(ROWS)}).shuffle(seed=shuffle)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        partitioner = getattr(load("flwr_datasets.partitioner"), name)(**arguments)
        partitioner.dataset = table
        return [list(partitioner.load_partition(user)["row"]) for user in range(users)]


@pytest.mark.parametrize(
    ("text", "name", "arguments"),
    [
        ("dirichlet:0.5", "DirichletPartitioner", {"alpha": 0.5, "self_balancing": True, "min_partition_size": 10}),
        ("dirichlet:2:unbalanced", "DirichletPartitioner", {"alpha": 2.0, "min_partition_size": 10}),
        (
            "pathological:2",
            "PathologicalPartitioner",
            {"num_classes_per_partition": 2, "class_assignment_mode": "first-deterministic"},
        ),
        ("shards:2", "ShardPartitioner", {"num_shards_per_partition": 2}),  # 36 shards of 25 rows: nothing is left over
        ("size:linear", "LinearPartitioner", {}),
        ("size:square", "SquarePartitioner", {}),
        ("iid", "IidPartitioner", {}),
    ],
)
def test_it_is_what_flwr_datasets_draws_with_this_seed(text: str, name: str, arguments: dict[str, Any]) -> None:
    by_class = name in ("DirichletPartitioner", "PathologicalPartitioner", "ShardPartitioner")
    more = {"partition_by": "label", "seed": 11} if by_class else {}
    users = 6 if name == "SquarePartitioner" else 18
    found = draw(Partition(text, users, seed=11), CLASSES)
    assert [rows.tolist() for rows in found] == directly(name, users, 11, num_partitions=users, **arguments, **more)


def test_given_sizes_are_what_flwr_datasets_gives() -> None:
    found = draw(Partition("size:100,7,40", 0, seed=2), CLASSES)
    assert [rows.tolist() for rows in found] == directly("SizePartitioner", 3, 2, partition_sizes=[100, 7, 40])


@pytest.mark.parametrize(
    "text",
    ["dirichlet:0.3", "dirichlet:0.3:unbalanced", "pathological:3", "shards", "shards:5", "size:linear", "size:square", "iid"],
)
def test_every_row_has_one_user_and_rows_without_a_class_have_none(text: str) -> None:
    classes = CLASSES.copy()
    classes[::13] = -1
    found = draw(Partition(text, 6, seed=4), classes)
    assert sorted(np.concatenate(found).tolist()) == np.flatnonzero(classes >= 0).tolist()
    assert min(map(len, found)) >= 3


def test_another_seed_draws_otherwise_and_the_same_again_alike() -> None:
    one, again, other = (draw(Partition("dirichlet:0.3", 10, seed=seed), CLASSES) for seed in (1, 1, 2))
    assert all(map(np.array_equal, one, again))
    assert not all(map(np.array_equal, one, other))


def test_another_process_draws_the_same() -> None:
    program = (
        "import numpy as np; from quickbloom.common.flower.partitioners import draw; "
        "from quickbloom.common.partition import Partition; "
        f"rows = draw(Partition('dirichlet:0.3', 10, seed=1), np.random.default_rng(5).integers(0, 6, {ROWS})); "
        "print([each.tolist() for each in rows])"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert told.strip() == str([rows.tolist() for rows in draw(Partition("dirichlet:0.3", 10, seed=1), CLASSES)])


def test_a_least_number_that_one_try_seldom_gives_is_drawn_again_until_it_is_met() -> None:
    least = 32  # of 60 on average
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        once = load("flwr_datasets.partitioner").DirichletPartitioner(
            num_partitions=15, partition_by="label", alpha=0.3, min_partition_size=least, self_balancing=True, seed=0
        )
        once.dataset = load("datasets").Dataset.from_dict({"label": CLASSES}).shuffle(seed=0)
        with pytest.raises(ValueError, match="max number of attempts"):
            once.load_partition(0)
    found = draw(Partition("dirichlet:0.3", 15, seed=0, least=least), CLASSES)
    assert min(map(len, found)) >= least
    assert sum(map(len, found)) == ROWS


def test_pathological_users_have_as_many_classes_as_they_are_to() -> None:
    for rows in draw(Partition("pathological:2", 9), CLASSES):
        assert len(np.unique(CLASSES[rows])) == 2


def test_natural_users_are_the_values_of_a_column() -> None:
    found = users_by_name(["b", "a", "b", "c"])
    assert {name: rows.tolist() for name, rows in found.items()} == {"a": [1], "b": [0, 2], "c": [3]}


@pytest.mark.parametrize(
    ("partition", "said"),
    [
        (Partition("iid", 301), "`users` must be at most 300 for 900 examples, of which each user needs 3, got 301"),
        (Partition("dirichlet:0.1", 100), "`least-per-user` must be at most 9 for 900 examples of 100 users, got 10"),
        (Partition("pathological:7", 5), "at most the 6 classes that there are, got 'pathological:7'"),
        (Partition("pathological:1", 4), "to nobody, because no user drew their class: take more users than 4"),
        (Partition("size:900,1", 0), "must sum up to at most the 900 examples, got 901"),
        (Partition("size:1,800", 0), "leaves a user with 1 of 900 examples"),
        (Partition("size:exponential", 30), "cannot be drawn for 30 users of 900 examples"),
        (Partition("dirichlet:0.01", 80), "gives no 80 users with at least 10 of 900 examples each, in 1100 draws"),
    ],
)
def test_what_the_rows_do_not_allow_is_refused_in_one_sentence(partition: Partition, said: str) -> None:
    with pytest.raises(DataError) as caught:
        draw(partition, CLASSES)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
