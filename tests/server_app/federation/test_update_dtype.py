"""`update-dtype` in whole runs: fewer bytes up, nearly the same learning, and what is lost stays on the node."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from quickbloom.common.config.run import parse_run_config
from quickbloom.common.datasets import load_dataset
from quickbloom.common.datasets.base import resolve_data_dir
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.errors import ConfigError
from quickbloom.server_app.cli.main import cli
from quickbloom.server_app.runs.directory import read_history


def run(directory: Path, *settings: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    arguments = ["run", "--in-process", "--nodes", "2", "--dataset", "digits", "--algorithm", "reptile", "--rounds", "12"]
    sets = [part for setting in ("evaluate-every=0", *settings) for part in ("--set", setting)]
    done = CliRunner().invoke(cli, [*arguments, *sets, "--no-report", "--output", str(directory)])
    assert done.exit_code == 0, done.output
    return read_history(directory), json.loads((directory / "summary.json").read_text())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    return run(tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize(
    ("kind", "most_bytes", "tolerance"),
    [("bfloat16", 0.53, 0.02), ("float16", 0.55, 0.005), ("int8", 0.31, 0.05), ("top-k", 0.16, 0.4)],
)
def test_fewer_bytes_and_nearly_the_same_learning(
    plain: tuple[list[dict[str, Any]], dict[str, Any]], tmp_path: Path, kind: str, most_bytes: float, tolerance: float
) -> None:
    rounds, summary = run(tmp_path / "run", f"update-dtype={kind}")
    assert rounds[0]["bytes"]["up"] < most_bytes * plain[0][0]["bytes"]["up"]
    assert rounds[0]["bytes"]["down"] == plain[0][0]["bytes"]["down"]
    assert summary["failures"] == 0
    losses = [[line["train"]["loss"] for line in history] for history in (rounds, plain[0])]
    assert losses[0][0] == losses[1][0]  # the first round begins at the same model
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)


def test_the_wire_carries_the_numbers_and_one_header(plain: tuple[list[dict[str, Any]], dict[str, Any]]) -> None:
    """At float32 four bytes a number, and NumPy's header of 128 bytes for tensors that travel together; two nodes."""
    config = parse_run_config({"dataset": "digits"}).resolved()
    spec = load_dataset("digits", config.table("digits"), resolve_data_dir("")).spec
    model = build_algorithm(config, spec).init()
    expected = 2 * (128 + sum(4 * value.numel() for value in model.values()))
    assert plain[0][0]["bytes"] == {"up": expected, "down": expected}


def test_privacy_excludes_it() -> None:
    settings = {"update-dtype": "int8", "privacy.noise-multiplier": 1.0, "privacy.clip": 1.0}
    with pytest.raises(ConfigError, match=r"`update-dtype` must be 'float32' with `privacy.noise-multiplier` above 0"):
        parse_run_config(settings)
