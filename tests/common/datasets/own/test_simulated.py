"""Simulated users of a user's own file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quickbloom.client_app.node import Node
from quickbloom.common.config.run import NodeConfig, parse_run_config
from quickbloom.common.datasets.own import Own, OwnOptions
from quickbloom.common.errors import ConfigError, DataError
from quickbloom.common.flower.partitioners import draw
from quickbloom.common.partition import Partition

ROWS = 240


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Rows with a number of their own, a ward, a task that plays no part, and a target of three classes."""
    lines = ["task,a,ward,target,score", *(f"t{k % 5},{k},w{k % 8},{'xyz'[k % 3]},{k / 7:.3f}" for k in range(ROWS))]
    file = tmp_path / "rows.csv"
    file.write_text("\n".join(lines) + "\n")
    return file


def own(path: Path, partition: str, users: int = 0, **settings: Any) -> Own:
    named = {f"own.{name.replace('_', '-')}": value for name, value in settings.items()}
    config = parse_run_config({"dataset": "own", "own.path": str(path), "partition": partition, "users": users, **named})
    options = config.table("own")
    assert isinstance(options, OwnOptions)
    return Own(options, Path())


def rows_of(found: Own) -> list[list[int]]:
    return [sorted(np.concatenate(parts).tolist()) for parts in found.rows.values()]


@pytest.mark.parametrize("partition", ["dirichlet:0.5", "pathological:2", "shards", "size:linear", "iid"])
def test_every_row_has_one_user_who_is_drawn_by_the_target(table: Path, partition: str) -> None:
    found = own(table, partition, 8)
    classes = np.arange(ROWS) % 3
    assert rows_of(found) == [sorted(rows.tolist()) for rows in draw(Partition(partition, 8), classes)]
    assert [task.task_id for task in found.tasks()] == [f"user-0{k}" for k in range(8)]


def test_the_column_of_real_users_is_neither_a_user_nor_an_input(table: Path) -> None:
    assert sorted(own(table, "iid", 4).schema.features) == ["a", "score", "ward"]
    assert sorted(own(table, "iid", 4, task_column="ward").schema.features) == ["a", "score", "task"]
    assert sorted(own(table, "natural:ward").schema.features) == ["a", "score"]


def test_a_file_without_a_task_column_can_be_spread(tmp_path: Path) -> None:
    file = tmp_path / "rows.npz"
    np.savez(file, pixels=np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8), target=np.arange(60) % 4)
    found = own(file, "dirichlet:5", 3)
    assert sum(map(len, rows_of(found))) == 60
    assert found.has_pixels


def test_natural_users_are_the_values_of_a_column(table: Path) -> None:
    found = own(table, "natural:ward")
    assert list(found.rows) == [f"w{k}" for k in range(8)]
    assert rows_of(found)[3] == list(range(3, ROWS, 8))


def test_a_user_tests_on_a_quarter_of_their_rows(table: Path) -> None:
    for support, query, test in own(table, "iid", 8).rows.values():  # 30 rows each
        assert abs(len(test) - 7.5) <= 1
        assert abs(len(support) - len(query)) <= 1


def test_rows_without_a_target_are_nobodys(table: Path) -> None:
    lines = table.read_text().splitlines()
    lines[1:11] = [line.replace(f",{line.split(',')[3]},", ",,") for line in lines[1:11]]
    table.write_text("\n".join(lines) + "\n")
    found = own(table, "iid", 4)
    assert sorted(row for rows in rows_of(found) for row in rows) == list(range(10, ROWS))


def test_rows_of_simulated_users_can_be_cut_in_time(table: Path) -> None:
    found = own(table, "iid", 4, time_column="a")
    for support, query, test in found.rows.values():
        assert support.max() < query.min() <= query.max() < test.min()
        assert abs(len(test) - 15) <= 1


def test_numbers_can_be_spread_but_not_by_class(table: Path) -> None:
    found = own(table, "size:linear", 4, target_column="score")
    holdings = found.holdings()
    assert holdings is not None
    assert (found.kind, holdings.classes, holdings.sizes.tolist()) == ("regression", [""], [24, 48, 72, 96])
    with pytest.raises(DataError, match="spreads examples by their class, and the target holds numbers: use iid"):
        own(table, "dirichlet:1", 4, target_column="score")


def test_a_user_with_too_few_rows_of_their_own_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("who,a,target\n" + "".join(f"{'ab'[k > 1]},{k},{k % 2}\n" for k in range(12)))
    found = own(file, "natural:who")
    assert found.left_out == {"a": "it has 2 rows with a target, a user needs 3"}


@pytest.mark.parametrize(
    ("partition", "settings", "error", "said"),
    [
        ("natural:wrad", {}, DataError, "have no column `wrad`: did you mean `ward`?"),
        ("iid", {"split_column": "ward"}, ConfigError, "`own.split-column` says which rows are whose test part"),
        ("iid", {"task_name": "me"}, ConfigError, "`own.task-name` names a single user, got 'me'"),
        ("pathological:4", {}, DataError, "at most the 3 classes that there are"),
    ],
)
def test_what_does_not_fit_the_file_is_refused(table: Path, partition: str, settings: Any, error: Any, said: str) -> None:
    with pytest.raises(error) as caught:
        own(table, partition, 0 if ":w" in partition else 4, **settings)
    assert said in str(caught.value)


def test_nodes_share_the_users_however_many_they_are(table: Path) -> None:
    run = parse_run_config({"dataset": "own", "own.path": str(table), "partition": "dirichlet:0.5", "users": 7}).resolved()

    def hosted(nodes: int) -> dict[str, tuple[int, int, int]]:
        found = [Node(run, NodeConfig(partition_id=k, num_partitions=nodes)) for k in range(nodes)]
        tasks = [task for node in found for task in node.tasks]
        assert len({task.task_id for task in tasks}) == len(tasks)
        return {task.task_id: (task.num_support, task.num_query, task.num_test) for task in tasks}

    assert hosted(1) == hosted(3) == hosted(7)


def test_a_node_with_a_file_of_its_own_has_no_simulated_users(table: Path) -> None:
    run = parse_run_config({"dataset": "own", "partition": "iid", "users": 4}).resolved()
    with pytest.raises(
        ConfigError, match="spreads one table that all nodes read, got 'iid' beside the node setting `data-path`"
    ):
        Node(run, NodeConfig(data_path=str(table)))
