"""The live view: what TensorBoard's and MLflow's own readers find is what the run directory says."""

import csv
import importlib.util
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loopback import LoopbackGrid
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from quickbloom.common.config.run import parse_run_config
from quickbloom.common.errors import ConfigError
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.runs import trackers
from quickbloom.server_app.runs.directory import read_history
from quickbloom.server_app.runs.tracked_values import FOLDER

WITHOUT_WANDB = importlib.util.find_spec("wandb") is None
WITHOUT_MLFLOW = importlib.util.find_spec("mlflow") is None


def run(path: Path, rounds: int = 3, **settings: Any) -> dict[str, Any]:
    known = {key.replace("_", "-"): value for key, value in settings.items()}
    config = parse_run_config({"rounds": rounds, "evaluate-every": 1, "adapt-steps": 2, "output-dir": str(path), **known})
    return run_federation(LoopbackGrid(2, config.flat()), config)


def events(path: Path) -> EventAccumulator:
    found = EventAccumulator(str(path / FOLDER), size_guidance={"scalars": 0, "histograms": 0})
    found.Reload()
    return found


def curve(path: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(path).Scalars(name)]


def single(value: float) -> float:
    """As TensorBoard keeps it."""
    return float(np.float32(value))


def test_tensorboard_has_the_curves_of_the_history(tmp_path: Path) -> None:
    summary = run(tmp_path, tensorboard=True)
    lines = read_history(tmp_path)
    assert curve(tmp_path, "train/loss") == [(line["round"], single(line["train"]["loss"])) for line in lines]
    after = [(line["round"], single(line["validation"]["accuracy"][-1])) for line in lines]
    assert curve(tmp_path, "validation/accuracy_after") == after
    assert curve(tmp_path, "test/accuracy_by_step") == [
        (step, single(value)) for step, value in enumerate(summary["test"]["accuracy"]["mean"])
    ]


def test_tensorboard_has_a_histogram_over_the_clients(tmp_path: Path) -> None:
    summary = run(tmp_path, tensorboard=True)
    with (tmp_path / "per_task.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    scores = [float(row[f"accuracy_step{summary['chosen']['adapt_steps']}"]) for row in rows]
    (found,) = events(tmp_path).Histograms("clients/test/accuracy_after")
    histogram = found.histogram_value
    assert (histogram.num, histogram.min, histogram.max) == (len(rows), min(scores), max(scores))
    assert histogram.sum == pytest.approx(sum(scores))
    training = [event.histogram_value for event in events(tmp_path).Histograms("clients/train/loss")]
    means = [value.sum / value.num for value in training]
    assert means == pytest.approx([line["train"]["loss"] for line in read_history(tmp_path)])
    assert [value.num for value in training] == [37] * 3


def test_a_run_that_goes_on_has_every_round_once(tmp_path: Path) -> None:
    class CutOffError(Exception):
        pass

    class Dying(LoopbackGrid):
        def answer(self, message: Any) -> Any:
            if message.metadata.group_id == "3" and message.metadata.message_type.startswith("train"):
                raise CutOffError
            return super().answer(message)

    settings = {"rounds": 4, "evaluate-every": 1, "adapt-steps": 1, "tensorboard": True}
    config = parse_run_config({**settings, "output-dir": str(tmp_path), "checkpoint-every": 1})
    with pytest.raises(CutOffError):
        run_federation(Dying(2, config.flat()), config)
    # The newest checkpoint is lost: its round is done again, and was shown already.
    (tmp_path / "checkpoints" / "round-000002.safetensors").unlink()
    run(tmp_path, rounds=4, adapt_steps=1, tensorboard=True, resume_from=str(tmp_path))
    losses = [(line["round"], single(line["train"]["loss"])) for line in read_history(tmp_path)]
    assert [number for number, _ in losses] == [1, 2, 3, 4]
    assert curve(tmp_path, "train/loss") == losses


def test_without_the_setting_nothing_is_written(tmp_path: Path) -> None:
    run(tmp_path)
    assert not (tmp_path / FOLDER).exists()


def test_what_breaks_is_left_out_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    told: list[int] = []

    def breaks(self: Any, record: Any, clients: Any) -> None:
        told.append(record["round"])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trackers.TensorBoard, "round", breaks)
    assert run(tmp_path, tensorboard=True)["rounds"] == 3
    assert told == [1]
    (line,) = [line for line in caplog.messages if line.startswith("TensorBoard")]
    assert line == "TensorBoard is told nothing more of this run: OSError: [Errno 28] No space left on device"


@pytest.mark.parametrize(("setting", "value", "extra"), [("tensorboard", True, "report"), ("mlflow", "http://x", "mlflow")])
def test_a_live_view_whose_package_is_missing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, value: Any, extra: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    sentence = (
        rf"`{setting}` needs {setting}\S*, which is not installed: run pip install 'quickbloom\[{extra}\]' where the server"
    )
    with pytest.raises(ConfigError, match=sentence):
        run(tmp_path / "x", **{setting: value})
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("localhost:5000", "`mlflow` must be a URI such as"),
        ("https://me:secret@tracking.example.org", "`mlflow` must be without a user and a password"),
    ],
)
def test_a_tracking_server_that_cannot_be_meant_is_refused_without_its_password(uri: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        parse_run_config({"mlflow": uri})
    assert "secret" not in str(error.value)


def test_what_is_open_is_closed_if_the_tracking_server_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ConfigError("no server there")

    monkeypatch.setattr(trackers, "MLflow", refuse)
    config = parse_run_config({"tensorboard": True, "mlflow": "http://127.0.0.1:9"})
    before = set(threading.enumerate())
    with pytest.raises(ConfigError, match="no server there"), trackers.tracked(config, tmp_path, 0, "abc"):
        pass
    assert list((tmp_path / FOLDER).iterdir())
    assert set(threading.enumerate()) == before  # TensorBoard's writer is a thread


needs_mlflow = pytest.mark.skipif(WITHOUT_MLFLOW, reason="needs mlflow: pip install 'quickbloom[mlflow]'")
theirs = pytest.mark.filterwarnings("ignore")  # MLflow and SQLAlchemy warn of each other


@needs_mlflow
@theirs
def test_mlflow_has_the_curves_and_the_settings(tmp_path: Path) -> None:
    import mlflow

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    summary = run(tmp_path / "run", mlflow=uri)
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("quickbloom")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    assert (found.data.params["algorithm"], found.data.params["reptile.inner-steps"]) == ("reptile", "10")
    history = client.get_metric_history(found.info.run_id, "train/loss")
    lines = read_history(tmp_path / "run")
    assert [(m.step, m.value) for m in history] == [(line["round"], line["train"]["loss"]) for line in lines]
    steps = client.get_metric_history(found.info.run_id, "test/accuracy_by_step")
    assert [m.value for m in sorted(steps, key=lambda m: m.step)] == summary["test"]["accuracy"]["mean"]


@needs_mlflow
@theirs
def test_mlflow_goes_on_with_a_run_that_was_cut_off(tmp_path: Path) -> None:
    import mlflow

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    settings = {"train": {"loss": 1.0, "tasks": 1}, "seconds": 1.0, "bytes": {"up": 1, "down": 1}, "failures": []}
    config = parse_run_config({"mlflow": uri})
    for number in (1, 2):
        with trackers.tracked(config, tmp_path / "run", number - 1, "abc") as live:
            live.round({"round": number, **settings}, {})
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("quickbloom")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert [metric.step for metric in client.get_metric_history(found.info.run_id, "train/loss")] == [1, 2]


@needs_mlflow
@theirs
def test_a_tracking_server_that_does_not_answer_is_refused_before_the_first_round(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`mlflow` must be the URI of a tracking server that answers, got 'http://127"):
        run(tmp_path, mlflow="http://127.0.0.1:9")
    assert read_history(tmp_path) == []
    assert json.loads((tmp_path / "config.json").read_text())["mlflow"] == "http://127.0.0.1:9"


def wandb_records(path: Path) -> list[Any]:
    """The records in the one file of an offline run: LevelDB's log format, behind a header of seven bytes.

    Blocks of 32 KiB hold pieces with a checksum (4 bytes), a length (2) and a type (1): whole, first, middle or last.
    """
    from wandb.proto import wandb_internal_pb2

    (file,) = path.glob("wandb/offline-run-*/*.wandb")
    data, at, held, found = file.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block that is too short for a piece
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        held = (b"" if kind in (1, 2) else held) + data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            found.append(wandb_internal_pb2.Record.FromString(held))
    return found


@pytest.mark.skipif(WITHOUT_WANDB, reason="needs wandb, 60 MB: pip install 'quickbloom[wandb]'")
def test_weights_and_biases_has_the_curves_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    summary = run(tmp_path, wandb="mine")
    records = wandb_records(tmp_path)
    shown: list[dict[str, float]] = []
    for record in records:
        if record.HasField("history"):
            items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            shown.append(items)
    lines = read_history(tmp_path)
    assert [(line["_step"], line["train/loss"]) for line in shown] == [(one["round"], one["train"]["loss"]) for one in lines]
    assert [line["validation/accuracy_after"] for line in shown] == [one["validation"]["accuracy"][-1] for one in lines]
    (started,) = [record.run for record in records if record.HasField("run")]
    assert (started.project, started.display_name) == ("mine", tmp_path.name)
    texts = " ".join(item.key + "".join(item.nested_key) for record in records for item in record.summary.update)
    assert f"test/accuracy_by_step/{len(summary['test']['accuracy']['mean']) - 1}" in texts
    (ended,) = [record.exit for record in records if record.HasField("exit")]
    assert ended.exit_code == 0


@pytest.mark.skipif(WITHOUT_WANDB, reason="needs wandb, 60 MB: pip install 'quickbloom[wandb]'")
def test_two_runs_in_one_process_are_two_at_weights_and_biases(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(tmp_path / name, rounds=1, wandb="mine")
    ids = [
        next(record.run.run_id for record in wandb_records(tmp_path / name) if record.HasField("run")) for name in ("a", "b")
    ]
    assert ids[0] != ids[1]
