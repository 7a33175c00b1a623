"""A personal model for other programs says what `predict` says."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loopback import LoopbackGrid

from quickbloom import predict
from quickbloom.client_app.export import export
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.datasets.own.columns import Reading, Schema, make_inputs
from quickbloom.common.datasets.own.files.image_arrays import choose_images
from quickbloom.common.datasets.own.files.tables import read_table
from quickbloom.common.datasets.own.preparation import Preparation
from quickbloom.common.errors import ConfigError, DataError
from quickbloom.common.personal import model as personal_model
from quickbloom.server_app.app import run_federation

KINDS: dict[str, dict[str, Any]] = {
    "mlp": {"algorithm": "fomaml"},
    "regression": {"algorithm": "fomaml", "own.target-column": "amount"},
    "prototypes": {"algorithm": "protonet"},
    "neighbours": {"algorithm": "knnper", "knnper.neighbours": 3, "adapt-steps": 1},
    "own prototypes": {"algorithm": "fedproto", "adapt-steps": 2},
    "refined": {"algorithm": "protonet", "protonet.refine": True, "adapt-steps": 3},
    "images": {"algorithm": "fomaml", "conv4.filters": 4, "rounds": 1, "adapt-steps": 2},
}


def trained(tmp_path: Path, kind: str) -> tuple[Path, Path]:
    """(a personal model, the file that it was adapted to) of a short run with four tasks."""
    rng = np.random.default_rng(0)
    path = tmp_path / "own.npz"
    task = np.repeat(list("ABCD"), 20)
    if kind == "images":
        shade = np.tile([0.0, 1.0], 40)
        pixels = rng.random((80, 8, 8)) * 0.5 + shade[:, None, None] * 0.5
        np.savez(path, task=task, image=pixels, target=np.where(shade > 0, "bright", "dark"))
    else:
        x = rng.normal(size=(80, 3)) * 5 + 2
        np.savez(path, task=task, x=x, target=np.where(x[:, 0] > 2, "high", "low"), amount=100 + 7 * x[:, 1])
    settings: dict[str, Any] = {"dataset": "own", "min-nodes": 1, "mlp.hidden": "8", "evaluate-every": 0, "rounds": 2}
    features = {} if kind == "images" else {"own.features": "x_0,x_1,x_2"}
    config = parse_run_config({**settings, **features, "output-dir": str(tmp_path / "run"), **KINDS[kind]})
    grid = LoopbackGrid(1, config.flat(), node_configs={0: {"data-path": str(path), "state-dir": str(tmp_path)}})
    run_federation(grid, config)
    return tmp_path / "personal" / "A.safetensors", path


def inputs(model: Path, data: Path) -> torch.Tensor:
    """What the exported program is fed with: rows as the card's preparation makes them."""
    card = personal_model.load(model).card
    rows = np.flatnonzero(np.load(data)["task"] == "A")
    table = read_table(str(data))
    choose_images(table, "")
    columns = make_inputs(table, Schema.from_json(card["schema"]), Reading(str(data)), rows)
    return torch.from_numpy(Preparation.from_json(card["preparation"]).encode(columns))


def outputs(form: str, path: Path, x: torch.Tensor) -> np.ndarray[Any, Any]:
    if form == "torch":
        return np.asarray(torch.export.load(path).module()(x))
    onnxruntime = pytest.importorskip("onnxruntime")
    return np.asarray(onnxruntime.InferenceSession(str(path)).run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("form", ["torch", "onnx"])
def test_the_exported_model_says_what_predict_says(tmp_path: Path, kind: str, form: str) -> None:
    if form == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    model, data = trained(tmp_path, kind)
    path = export(model, tmp_path / "out" / ("m.onnx" if form == "onnx" else "m.pt2"), form)
    rows, x = predict(model, data).rows, inputs(model, data)
    # Batch norm without running state looks at who else is there: each part by itself, as in a run.
    for part in ("support", "query", "test"):
        at = [i for i, row in enumerate(rows) if row["part"] == part]
        came = outputs(form, path, x[at])
        for i, output in zip(at, came, strict=True):
            if kind == "regression":
                assert output[0] == pytest.approx(float(rows[i]["prediction"]), rel=1e-5)
            else:
                label = ["bright", "dark"] if kind == "images" else ["high", "low"]
                assert output[label.index(rows[i]["prediction"])] == pytest.approx(float(rows[i]["probability"]), abs=1e-5)
                assert output.sum() == pytest.approx(1, abs=1e-5)


def test_a_missing_extra_and_an_unknown_format_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = trained(tmp_path, "mlp")
    with pytest.raises(ConfigError, match="`--format` must be onnx or torch, got 'tflite'"):
        export(model, tmp_path / "m", "tflite")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ConfigError, match=r"needs onnx, which is not installed: run pip install 'quickbloom\[export\]'"):
        export(model, tmp_path / "m.onnx", "onnx")
    with pytest.raises(DataError, match="holds 4 personal models: name the file of one"):
        export(tmp_path / "personal", tmp_path / "m", "torch")
    assert not (tmp_path / "m.onnx").exists()


def test_a_copy_that_says_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quickbloom.client_app import export as exporting

    write, read = exporting._WRITERS["torch"]
    monkeypatch.setitem(exporting._WRITERS, "torch", (write, lambda path, x: read(path, x) + 1e-4))
    model, _ = trained(tmp_path, "mlp")
    with pytest.raises(DataError, match=r"gives other outputs than the model itself, by 0\.0001"):
        export(model, tmp_path / "m.pt2", "torch")
    assert not (tmp_path / "m.pt2").exists()
