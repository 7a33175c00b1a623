"""A run with simulated users: what it writes down about them, and the picture in its report."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import quickbloom
from quickbloom.client_app.check_data import describe
from quickbloom.common.errors import ConfigError
from quickbloom.server_app.reporting.report import write_report
from quickbloom.server_app.runs.holdings import read_holdings

SETTINGS: dict[str, bool | int | float | str] = {"partition": "dirichlet:0.5", "users": 12, "adapt-steps": 2, "model": "mlp"}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> quickbloom.Run:
    directory = tmp_path_factory.mktemp("partition") / "run"
    return quickbloom.run("fedavg", dataset="digits", rounds=1, output=directory, progress=False, settings=SETTINGS)


def test_the_run_directory_says_who_holds_what(digits: quickbloom.Run) -> None:
    with (digits.directory / "partition.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    total = sum(int(row[part]) for row in rows for part in ("support", "query", "test"))
    assert total == 1797
    assert Counter({row["user"]: row["split"] for row in rows}.values()) == Counter(digits.summary["tasks"])
    tested = dict(zip(digits.per_task["task"], digits.per_task["num_test"], strict=True))
    for user, number in tested.items():
        assert sum(int(row["test"]) for row in rows if row["user"] == user) == number


def test_the_report_draws_it(digits: quickbloom.Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    html = write_report(digits.directory, tmp_path / "report.html").read_text()
    assert "dirichlet:0.5 over 12 users, partition-seed 0. 1797 examples of 12 users" in html
    assert "37.5 % support, 37.5 % query, 25 % test" in html
    found = read_holdings(digits.directory)
    assert found is not None
    assert f"at most {found[0].counts.sum(axis=2).max()}; partition.csv has all" in html
    assert found[0].classes == [str(digit) for digit in range(10)]


def test_a_run_with_real_users_has_neither(tmp_path: Path) -> None:
    run = quickbloom.run("local", dataset="digits", rounds=1, output=tmp_path / "run", progress=False)
    assert not (run.directory / "partition.csv").exists()
    assert "Who holds what" not in write_report(run.directory, None).read_text()


def test_a_frame_is_a_table_too(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kind = np.arange(240) % 3
    frame = pd.DataFrame({"a": rng.normal(size=240) + kind, "b": rng.normal(size=240), "kind": [f"k{k}" for k in kind]})
    settings: dict[str, bool | int | float | str] = {"partition": "pathological:2", "users": 10, "adapt-steps": 1}
    run = quickbloom.run("fedavg", data=frame, target="kind", rounds=1, output=tmp_path, progress=False, settings=settings)
    assert sum(run.summary["tasks"].values()) == 10
    found = read_holdings(tmp_path)
    assert found is not None
    assert (found[0].counts.sum(axis=2) > 0).sum(axis=1).tolist() == [2] * 10


def test_check_data_tells_a_table_of_users_and_classes(tmp_path: Path) -> None:
    lines = list(describe("digits", "", "", settings={"partition": "iid", "users": 4}))
    assert lines[0] == "digits: classification; inputs (1, 8, 8)"
    assert lines[1].startswith("partition iid over 4 users, partition-seed 0: 1797 examples of 4 users, 449 to 450 each")
    assert [line.split()[0] for line in lines[2:]] == ["user", "user-00", "user-01", "user-02", "user-03"]
    assert sum(int(cell) for line in lines[3:] for cell in line.split()[4:]) == 1797

    file = tmp_path / "rows.csv"
    file.write_text("a,target\n" + "".join(f"{k},{'xy'[k % 2]}\n" for k in range(40)))
    told = list(describe(str(file), "", "", settings={"partition": "iid", "users": 4}))
    assert "user     support  query  test  x  y" in told
    assert not any(line.startswith(("task ", "no column")) for line in told)


def test_check_data_takes_no_columns_for_a_table_that_has_none() -> None:
    with pytest.raises(ConfigError, match="name columns of a file, got 'ward' with 'digits'"):
        list(describe("digits", "ward", "", settings={"partition": "iid", "users": 4}))
    assert list(describe("digits", "", "")) == [
        "digits: 56 users of its own; `--partition` spreads its examples over simulated ones"
    ]
