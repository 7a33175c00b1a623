"""What a device predicts for a row is the same whatever else is in the call: with batch norm, offline and exported."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loopback import LoopbackGrid

from quickbloom import adapt, predict
from quickbloom.client_app.export import export
from quickbloom.client_app.offline.predictions import Predictions
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.personal import checkpoint
from quickbloom.common.personal import model as personal_model
from quickbloom.server_app.app import run_federation


def images(path: Path, tasks: str, number: int, seed: int = 0) -> Path:
    """Bright and dark images of each task."""
    rng = np.random.default_rng(seed)
    shade = np.tile([0.0, 1.0], len(tasks) * number // 2)
    pixels = rng.random((len(shade), 8, 8)) * 0.6 + shade[:, None, None] * 0.4
    np.savez(path, task=np.repeat(list(tasks), number), image=pixels, target=np.where(shade > 0, "bright", "dark"))
    return path


def trained(folder: Path, algorithm: str, **more: Any) -> Path:
    """A run directory of a short run with batch norm; its node keeps personal models in `personal`."""
    data = images(folder / "all.npz", "ABCDE", 12)
    settings: dict[str, Any] = {"dataset": "own", "min-nodes": 1, "rounds": 1, "evaluate-every": 0, "adapt-steps": 2}
    settings |= {"model": "conv4", "conv4.norm": "batch", "conv4.filters": 4, "baselines": False, "algorithm": algorithm}
    config = parse_run_config({**settings, **more, "output-dir": str(folder / "run")})
    node = {"data-path": str(data), "state-dir": str(folder)}
    run_federation(LoopbackGrid(1, config.flat(), node_configs={0: node}), config)
    return folder / "run"


def probabilities(found: Predictions) -> list[float]:
    return [float(row["probability"]) if row["prediction"] == "dark" else 1 - float(row["probability"]) for row in found.rows]


def alone(model: Path, data: Path, folder: Path) -> list[float]:
    arrays, found = dict(np.load(data)), []
    for i in range(len(arrays["target"])):
        np.savez(folder / "one.npz", **{name: values[i : i + 1] for name, values in arrays.items()})
        found += probabilities(predict(model, folder / "one.npz"))
    return found


@pytest.mark.parametrize("algorithm", ["fomaml", "protonet", "knnper"])
def test_adapted_and_kept_models_predict_a_row_alike_alone_and_among_others(tmp_path: Path, algorithm: str) -> None:
    run = trained(tmp_path, algorithm)
    (mine,) = adapt(run, images(tmp_path / "mine.npz", "Z", 6), tmp_path / "mine", own_rows=False)
    new, known = images(tmp_path / "new.npz", "Z", 6, seed=1), images(tmp_path / "known.npz", "A", 6, seed=1)
    assert not mine.mixes
    for model, data in ((tmp_path / "mine", new), (tmp_path / "personal" / "A.safetensors", known)):
        together = predict(model, data)
        assert alone(model, data, tmp_path) == pytest.approx(probabilities(together), abs=1e-5)
        assert len(set(probabilities(together))) > 1
        assert not any("predicted together" in remark for remark in together.remarks)


@pytest.mark.parametrize("form", ["torch", "onnx"])
def test_an_exported_model_says_of_a_row_alone_what_predict_says(tmp_path: Path, form: str) -> None:
    if form == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    adapt(trained(tmp_path, "fomaml"), images(tmp_path / "mine.npz", "Z", 6), tmp_path / "mine", own_rows=False)
    path = export(tmp_path / "mine", tmp_path / ("m.onnx" if form == "onnx" else "m.pt2"), form)
    model = personal_model.load(next((tmp_path / "mine").glob("*.safetensors")))
    x = torch.rand(4, *model.card["spec"][1], generator=torch.Generator().manual_seed(0))
    expected = (model.outputs(x) / model.temperature).softmax(dim=1).numpy()
    for i in range(4):
        if form == "torch":
            came = torch.export.load(path).module()(x[i : i + 1]).numpy()
        else:
            import onnxruntime

            came = onnxruntime.InferenceSession(str(path)).run(None, {"x": x[i : i + 1].numpy()})[0]
        np.testing.assert_allclose(came[0], expected[i], atol=1e-5)


def test_models_that_mix_rows_say_so(tmp_path: Path) -> None:
    data = images(tmp_path / "mine.npz", "Z", 6)
    (model,) = adapt(trained(tmp_path, "fomaml", transductive=True), data, tmp_path / "mine", own_rows=False)
    assert model.mixes
    (remark,) = (remark for remark in predict(tmp_path / "mine", data).remarks if "predicted together" in remark)
    assert remark.endswith("as its run asked (`transductive`)")
    np.savez(tmp_path / "few.npz", **{name: values[:3] for name, values in np.load(data).items()})
    few, all_rows = (probabilities(predict(tmp_path / "mine", path)) for path in (tmp_path / "few.npz", data))
    assert few != pytest.approx(all_rows[:3], abs=1e-4)


def test_a_model_of_an_earlier_version_predicts_as_it_did_and_says_so(tmp_path: Path) -> None:
    data, new = images(tmp_path / "mine.npz", "Z", 6), images(tmp_path / "new.npz", "Z", 4, seed=1)
    (model,) = adapt(trained(tmp_path, "fomaml"), data, tmp_path / "mine", own_rows=False)
    tensors = {name: value for name, value in model.tensors.items() if not name.rpartition(".")[2].startswith("running_")}
    assert len(tensors) < len(model.tensors)
    card = {**model.card, "config": {key: value for key, value in model.card["config"].items() if key != "transductive"}}
    checkpoint.write(tmp_path / "old.safetensors", tensors, card, personal_model.PERSONAL, wait=True)
    found = predict(tmp_path / "old.safetensors", new)
    assert any("an earlier version made it: adapt it anew" in remark for remark in found.remarks)
    assert probabilities(found) != probabilities(predict(tmp_path / "mine", new))
