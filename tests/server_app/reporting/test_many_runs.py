"""Several runs in one report."""

import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loopback import LoopbackGrid

from quickbloom.common.config.run import parse_run_config
from quickbloom.common.errors import DataError
from quickbloom.common.maths.intervals import t_quantile
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.reporting.report import write_report
from quickbloom.server_app.reporting.run_record import RunFacts


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    every: dict[str, dict[str, Any]] = {
        "reptile": {},
        "maml": {"algorithm": "maml"},
        "other-seed": {"seed": 1},
        "sinusoid": {"dataset": "sinusoid", "sinusoid.clients": 12},
    }
    for name, settings in every.items():
        config = parse_run_config({"rounds": 1, "adapt-steps": 2, "output-dir": str(root / name), **settings})
        run_federation(LoopbackGrid(2, config.flat()), config)
    return {name: root / name for name in every}


def told(paths: list[Path], output: Path) -> str:
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", write_report(paths, output).read_text())).split())


def test_the_difference_to_the_first_run_is_taken_client_by_client(runs: dict[str, Path], tmp_path: Path) -> None:
    text = told([runs["reptile"], runs["maml"]], tmp_path / "x.html")
    first, second = ({c.task: c.after for c in RunFacts.read(runs[name]).clients} for name in ("reptile", "maml"))
    gaps = 100 * np.array([second[task] - first[task] for task in sorted(first)])
    half = t_quantile(len(gaps) - 1) * np.sqrt(((gaps - gaps.mean()) ** 2).sum() / (len(gaps) - 1) / len(gaps))
    assert f"{gaps.mean():+.1f} ± {half:.1f} %" in text
    assert "These runs tested different clients" not in text


def test_the_settings_that_differ_are_shown_and_no_others(runs: dict[str, Path], tmp_path: Path) -> None:
    text = told([runs["reptile"], runs["maml"]], tmp_path / "x.html")
    table = text.partition("Settings that differ")[2].partition("Repeat them")[0]
    assert "algorithm reptile maml" in table
    assert "maml.outer-lr - 0.01" in table
    assert "fedavg." not in table
    assert "rounds" not in table


def test_runs_of_other_seeds_are_said_to_have_tested_other_clients(runs: dict[str, Path], tmp_path: Path) -> None:
    text = told([runs["reptile"], runs["other-seed"]], tmp_path / "x.html")
    assert "These runs tested different clients (a seed decides which)" in text
    assert "seed 0 " in text
    assert "seed 1 " in text


def test_a_run_that_has_not_ended_stands_beside_the_others(runs: dict[str, Path], tmp_path: Path) -> None:
    half = tmp_path / "half"
    half.mkdir()
    for name in ("config.json", "history.jsonl"):
        (half / name).write_text((runs["reptile"] / name).read_text())
    assert "2: reptile - - - - - 1 of 1" in told([runs["reptile"], half], tmp_path / "x.html")


def test_runs_that_are_scored_differently_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="runs with different scores cannot be compared"):
        write_report([runs["reptile"], runs["sinusoid"]], tmp_path / "x.html")


def test_more_runs_than_can_be_told_apart_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at most 24 runs, got 25"):
        write_report([runs["reptile"]] * 25, tmp_path / "x.html")
