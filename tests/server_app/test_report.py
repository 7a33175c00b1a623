"""The HTML report of a run: of real files, whole or half done."""

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import Message
from loopback import LoopbackGrid

from common.config import parse_run_config
from common.errors import DataError
from common.wire import TRAIN
from server_app.app import run_federation
from server_app.history import read_history
from server_app.report import write_report


@pytest.fixture(scope="module", params=["digits", "sinusoid"])
def run_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "run"
    settings = {"dataset": request.param, "sinusoid.clients": 12, "rounds": 2, "evaluate-every": 1, "output-dir": str(path)}
    config = parse_run_config(settings)
    run_federation(LoopbackGrid(2, config.flat()), config)
    return path


def test_the_report_is_one_file_with_the_figures_and_three_plots(run_dir: Path) -> None:
    text = write_report(run_dir, None).read_text()
    summary = json.loads((run_dir / "summary.json").read_text())
    name, scale = ("accuracy", 100) if "accuracy" in summary["test"] else ("mse", 1)
    after = scale * summary["test"][name]["mean"][summary["chosen"]["adapt_steps"]]
    assert f"{after:.4g} ±" in text
    images = re.findall(r"data:image/png;base64,([^\"]+)", text)
    assert len(images) == 3
    assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)
    assert not re.search(r"(src|href)=\"(?!data:)", text)  # nothing is fetched from elsewhere


def test_a_run_that_goes_on_has_a_report_too(run_dir: Path, tmp_path: Path) -> None:
    for name in ("config.json", "history.jsonl"):
        (tmp_path / name).write_text((run_dir / name).read_text())
    text = write_report(tmp_path, tmp_path / "half.html").read_text()
    assert "2 rounds so far" in text
    assert text.count("data:image/png") == 1


def test_a_run_with_skipped_rounds_has_a_report_too(tmp_path: Path) -> None:
    def silent(message: Message, answer: Callable[[Message], Message]) -> Message | None:
        return None if message.metadata.message_type == TRAIN and message.metadata.group_id == "1" else answer(message)

    settings = {"rounds": 3, "min-replies": 0.9, "on-too-few": "skip", "output-dir": str(tmp_path), "adapt-steps": 1}
    config = parse_run_config(settings)
    summary = run_federation(LoopbackGrid(2, config.flat(), {1: silent}), config)
    first, *others = read_history(tmp_path)
    assert (first["train"], "`min-replies` asks for 34" in first["skipped"]) == ({"loss": None, "tasks": 0}, True)
    assert all(line["train"]["tasks"] == summary["tasks"]["train"] for line in others[1:])
    assert "round 1: node 101: it sent no reply" in write_report(tmp_path, None).read_text()


def test_markup_in_a_failure_is_shown_not_run(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((run_dir / "config.json").read_text())
    record = json.loads((run_dir / "history.jsonl").read_text().splitlines()[0])
    record["failures"] = [{"who": "node 1", "reason": "<script>alert(1)</script>"}]
    (tmp_path / "history.jsonl").write_text(json.dumps(record) + "\n")
    text = write_report(tmp_path, None).read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is no directory of a run: it holds no config\.json"):
        write_report(tmp_path, None)


def test_a_place_that_cannot_be_written_is_refused(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be written"):
        write_report(run_dir, tmp_path / "missing" / "report.html")


def test_the_report_of_a_private_run_says_what_it_is_worth(tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    private = {"privacy.noise-multiplier": 1.0, "privacy.clip": 1.0, "privacy.delta": 0.01}
    config = parse_run_config({"rounds": 1, "output-dir": str(tmp_path), "adapt-steps": 1, **private})
    summary = run_federation(LoopbackGrid(2, config.flat()), config)
    text = write_report(tmp_path, None).read_text()
    epsilon = f"{summary['privacy']['epsilon']:.4g}"
    assert f"Differential privacy of a training task: epsilon {epsilon}, delta 0.01, after 1 steps." in text
