"""What a comparison leaves, from real runs: CSV, LaTeX, the card, the page, and from Python with nothing else changed."""

import csv
import json
import logging
import os
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import quickbloom
from quickbloom.server_app.comparing.files import _escaped
from quickbloom.server_app.comparing.page import write_comparison_page
from quickbloom.server_app.comparing.table import table

VARIANTS: dict[str, dict[str, str | float]] = {
    "slow": {"algorithm": "fedavg", "inner-lr": 0.001},
    "far": {"algorithm": "fedavg", "inner-lr": 0.1},
}
_BY_LIBRARIES = ("GRPC_VERBOSITY", "TORCHINDUCTOR_CACHE_DIR")
"""Set by flwr and torch themselves when they are imported."""


def frame() -> dict[str, np.ndarray]:
    """Eight users of twenty rows with slopes of their own."""
    rng = np.random.default_rng(0)
    x, task = rng.normal(size=160), np.arange(160) % 8
    return {"x": x, "target": x * (task + 1) + rng.normal(size=160), "task": np.array([f"t{i}" for i in task])}


def state() -> list[Any]:
    """What a comparison might change in a process."""
    root = logging.getLogger()
    return [
        torch.get_num_threads(),
        torch.get_rng_state().tolist(),
        np.random.get_state(legacy=False)["state"]["key"].tolist(),
        random.getstate(),
        (root.level, list(root.handlers), logging.root.manager.disable, logging.getLogger("flwr").level),
        {name: value for name, value in os.environ.items() if name not in _BY_LIBRARIES},
        Path.cwd(),
        torch.get_default_dtype(),
    ]


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A comparison of two rows on two seeds: four runs; and that nothing else is changed."""
    directory = tmp_path_factory.mktemp("compared")
    torch.set_num_threads(2)
    before = state()
    result = quickbloom.compare(
        variants=VARIANTS, data=frame(), task="task", target="target", rounds=2, seeds=[0, 1], output=directory, model="linear"
    )
    after = state()
    torch.set_num_threads(1)
    assert after == before
    return result, directory


def test_nothing_global_is_changed_and_what_is_returned_is_what_is_written(left: tuple[dict[str, Any], Path]) -> None:
    result, directory = left
    assert json.loads((directory / "comparison.json").read_text()) == json.loads(json.dumps(result))
    assert [row["name"] for row in result["algorithms"]] == ["slow", "far"]


def test_repeated_with_the_same_frame_nothing_runs_and_with_another_it_starts_anew(
    left: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = shutil.copytree(left[1], tmp_path / "copy")
    started: list[Any] = []

    class StartedError(Exception):
        pass

    def popen(*arguments: Any, **options: Any) -> None:
        started.append(arguments)
        raise StartedError

    monkeypatch.setattr(subprocess, "Popen", popen)
    asked: dict[str, Any] = {
        "task": "task",
        "target": "target",
        "rounds": 2,
        "seeds": [0, 1],
        "output": directory,
        "model": "linear",
    }
    quickbloom.compare(variants=VARIANTS, data=frame(), **asked)
    assert started == []
    capsys.readouterr()
    with pytest.raises(StartedError):
        quickbloom.compare(variants=VARIANTS, data=frame() | {"x": frame()["x"] + 1}, **asked)
    said = " ".join(capsys.readouterr().err.split())
    assert "Remark: The data changed since this comparison was begun, `data.npz`: the runs on them start anew." in said


def test_the_csv_has_a_row_for_each_row_seed_and_split_with_the_scores_of_the_summaries(
    left: tuple[dict[str, Any], Path],
) -> None:
    result, directory = left
    with (directory / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(row["row"], row["seed"], row["split"]) for row in rows}
    assert found >= {(name, seed, split) for name in ("slow", "far") for seed in "01" for split in ("validation", "test")}
    row = next(row for row in rows if (row["row"], row["seed"], row["split"]) == ("far", "1", "test"))
    summary = json.loads((directory / row["directory"] / "summary.json").read_text())
    step = summary["chosen"]["adapt_steps"]
    for measure in ("mse", "rmse"):
        if measure in summary["test"]:
            assert float(row[f"{measure}_before"]) == summary["test"][measure]["mean"][0]
            assert float(row[f"{measure}_after"]) == summary["test"][measure]["mean"][step]
            assert float(row[f"{measure}_worst10"]) == summary["test"][measure]["worst10"][step]
    assert row["data_sha256"] == result["data_sha256"]


def test_tests_are_over_the_users_of_per_task_csv(left: tuple[dict[str, Any], Path]) -> None:
    result, directory = left
    (pair,) = result["paired"]["pairs"]
    users = set()
    for run in result["algorithms"][0]["runs"]:
        with (directory / run["directory"] / "per_task.csv").open(newline="") as file:
            users |= {row["task"] for row in csv.DictReader(file) if row["split"] == "test"}
    assert (pair["seeds"]["pairs"], pair["users"]["pairs"]) == (2, len(users))
    assert sum(row["mean_rank"] for row in result["algorithms"]) == pytest.approx(3)  # of two rows, 1 + 2


def test_the_table_for_a_paper_is_whole(left: tuple[dict[str, Any], Path]) -> None:
    result, directory = left
    text = (directory / "comparison.tex").read_text()
    body = [line for line in text.splitlines() if not line.startswith("%")]
    ends = [line for line in body if line.endswith(r" \\")]
    columns = len(re.findall(r"[lr]", text.partition(r"\begin{tabular}{")[2].partition("}")[0]))
    assert {len(re.split(r"(?<!\\)&", line)) for line in ends} == {columns}
    assert len(ends) == 1 + len(table(result)[1])
    assert [text.count(rf"\{rule}rule") for rule in ("top", "bottom")] == [1, 1]
    assert text.count(r"\textbf{") == columns  # the best row
    assert not re.search(r"(?<!\\)[#_]|±", "\n".join(body))
    assert result["data_sha256"] in text.splitlines()[0]


def test_signs_that_mean_something_to_latex_are_written_out() -> None:
    assert _escaped(r"a_b & 5% ± 1 \x {y} #2 $") == r"a\_b \& 5\% $\pm$ 1 \textbackslash{}x \{y\} \#2 \$"


def test_every_file_names_the_data_and_the_versions(left: tuple[dict[str, Any], Path]) -> None:
    result, directory = left
    write_comparison_page(result, directory / "comparison.html")
    names = ("comparison.json", "comparison.md", "comparison.tex", "comparison-card.md", "comparison.html", "comparison.csv")
    for name in names:
        text = (directory / name).read_text()
        assert result["data_sha256"] in text, name
        assert result["version"] in text, name
        if name != "comparison.csv":
            assert torch.__version__.partition("+")[0] in text, name


def test_the_card_says_what_is_needed_to_repeat_it(left: tuple[dict[str, Any], Path]) -> None:
    result, directory = left
    text = (directory / "comparison-card.md").read_text()
    assert "- Rows: `slow` (fedavg, inner-lr=0.001, inner rate given), `far` (fedavg, inner-lr=0.1, inner rate given)" in text
    assert "- data.npz: 1 part, SHA-256" in text
    for run in result["algorithms"][0]["runs"]:
        assert f"    {run['command']}\n" in text
    assert f"    {result['command']}\n" in text
    assert "cannot settle anything here" in text  # two seeds


def test_the_page_shows_all_columns(left: tuple[dict[str, Any], Path]) -> None:
    result, directory = left
    page = write_comparison_page(result, directory / "comparison.html").read_text()
    for heading in table(result)[0]:
        assert f">{heading}</th>" in page
    assert "Better, or luck?" in page


def test_the_citation_is_of_this_version() -> None:
    root = Path(__file__).resolve().parents[3]
    said = yaml.safe_load((root / "CITATION.cff").read_text())
    assert (said["cff-version"], said["title"], said["version"]) == ("1.2.0", "quickbloom", quickbloom.__version__)
    assert {"message", "authors", "type", "license"} <= said.keys()
