"""A device that has only the checkpoint adapts, predicts and exports behind a small encoder, which the checkpoint carries."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import small_encoders
import torch
from onnx import TensorProto, helper
from safetensors import safe_open
from small_encoders import on_nodes, run_config, sentences

from quickbloom.client_app.export import export
from quickbloom.client_app.offline.adapting import adapt
from quickbloom.client_app.offline.predicting import predict
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.encoders import load_encoder
from quickbloom.common.errors import ConfigError, DataError
from quickbloom.common.personal import carried, checkpoint
from quickbloom.common.personal.checkpoint import CHECKPOINT, Checkpoint
from quickbloom.server_app.app import run_federation


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load_encoder.cache_clear()
    return tmp_path / "cache"


def trained(folder: Path, **more: Any) -> Path:
    """The last checkpoint of a run, alone in a folder; the encoder that it was trained with is gone."""
    file, _ = small_encoders.text_onnx(folder / "there" / "words.onnx")
    config = run_config(folder, f"onnx:{file}", **more)
    run_federation(on_nodes(folder, config, "ABCD", "EFGH"), config)
    last = max((folder / "run" / "checkpoints").glob("round-*"))
    place = folder / "device" / "model.safetensors"
    place.parent.mkdir()
    place.write_bytes(last.read_bytes())
    file.unlink()
    (file.parent / "tokenizer.json").unlink()
    load_encoder.cache_clear()
    return place


def names(file: Path) -> list[str]:
    with safe_open(file, "pt") as found:
        return sorted(found.keys())


def test_a_device_with_the_checkpoint_alone_adapts_predicts_and_exports(tmp_path: Path) -> None:
    place = trained(tmp_path, **{"own.features": "said"})
    mine = sentences(tmp_path / "Z.csv", "Z")
    (model,) = adapt(place, str(mine), tmp_path / "mine.safetensors", task="user")
    # On a third device there is neither the checkpoint nor what was unpacked of it.
    place.unlink()
    for file in (tmp_path / "cache" / "quickbloom" / "encoders").glob("*/*"):
        file.unlink()
    load_encoder.cache_clear()
    rows = predict(tmp_path / "mine.safetensors", str(mine)).rows
    assert len(rows) == 12
    path = export(tmp_path / "mine.safetensors", tmp_path / "whole.onnx", "onnx", with_encoder=True)
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    ids = np.array([[small_encoders.WORDS.index(word) for word in ("play", "music")]])
    (shares,) = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    said = next(row for row in rows if row["said"] == "play music")
    assert [float(said[f"probability_{label}"]) for label in model.classes] == pytest.approx(shares[0].tolist(), abs=2e-4)


def test_only_the_last_checkpoint_carries_it_and_a_node_keeps_it_once(tmp_path: Path) -> None:
    trained(tmp_path)
    files = sorted((tmp_path / "run" / "checkpoints").glob("round-*"))
    of_each = [[name for name in names(file) if name.startswith("encoder/")] for file in files]
    assert of_each == [[]] * (len(files) - 1) + [["encoder/model.onnx", "encoder/tokenizer.json"]]
    state = tmp_path / "state-ABCD"
    assert "encoder/model.onnx" in names(state / "meta.safetensors")
    assert not any(name.startswith("encoder/") for file in (state / "personal").glob("*.safetensors") for name in names(file))


def test_what_is_too_large_or_not_wanted_is_not_carried_and_is_said_where_it_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carried, "SMALL", 100)
    place = trained(tmp_path)
    assert not any(name.startswith("encoder/") for name in names(place))
    with pytest.raises(
        ConfigError, match=r"carries no encoder, since only one in an ONNX file is carried, .* say with `--encoder`"
    ):
        adapt(place, str(sentences(tmp_path / "Z.csv", "Z")), tmp_path / "mine", task="user")


def test_true_carries_any_size_and_false_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carried, "SMALL", 100)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert "encoder/model.onnx" in names(trained(tmp_path / "a", **{"own.carry-encoder": True}))
    monkeypatch.setattr(carried, "SMALL", 10**6)
    load_encoder.cache_clear()
    assert "encoder/model.onnx" not in names(trained(tmp_path / "b", **{"own.carry-encoder": False}))


def test_directories_and_code_cannot_be_asked_for() -> None:
    for encoder in ("sentence:directory", "my_module:factory", "timm:resnet18"):
        with pytest.raises(ConfigError, match=r"`own.carry-encoder` must be .* code and directories are never carried"):
            parse_run_config({"dataset": "own", "own.path": "a.csv", "own.encoder": encoder, "own.carry-encoder": True})


def test_an_encoder_of_pictures_takes_its_preparation_along(tmp_path: Path) -> None:
    file = small_encoders.picture_onnx(tmp_path / "there" / "colours.onnx")
    encoder = load_encoder(f"onnx:{file}")
    parts = {name: place.read_bytes() for name, place in encoder.parts.items()}  # type: ignore[attr-defined]
    assert sorted(parts) == ["model.onnx", "preprocessor_config.json"]
    tensors = {name: torch.tensor(list(content), dtype=torch.uint8) for name, content in parts.items()}
    assert load_encoder(carried.place_of(tensors, "", (), "the file")).digest == encoder.digest


def rewritten(place: Path, change: Any) -> Path:
    """A checkpoint that somebody made from another, with a checksum that is right."""
    found = checkpoint.read(place, CHECKPOINT, "checkpoint")
    tensors, facts = dict(found.tensors), json.loads(json.dumps(found.facts))
    change(tensors, facts)
    checkpoint.write(place, tensors, facts, wait=False)
    return place


def as_tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def outside_references(tensors: dict[str, Any], facts: Any) -> None:
    """An ONNX file whose weights are another file of the machine."""
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1])
    made = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", 1])
    weights = TensorProto(name="matrix", data_type=TensorProto.FLOAT, dims=[1, 1], data_location=TensorProto.EXTERNAL)
    weights.external_data.add(key="location", value="../../../etc/passwd")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "matrix"], ["features"])], "g", [given], [made], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    tensors["encoder/model.onnx"] = as_tensor(model.SerializeToString())


def other_weights(tensors: dict[str, Any], facts: Any) -> None:
    content = bytearray(tensors["encoder/model.onnx"].numpy().tobytes())
    at = content.find(np.float32(np.random.default_rng(0).normal(size=1).astype(np.float32)[0]).tobytes())
    content[at] ^= 1
    tensors["encoder/model.onnx"] = as_tensor(bytes(content))


def a_path(tensors: dict[str, Any], facts: Any) -> None:
    tensors["encoder/../../.bashrc"] = as_tensor(b"echo")


def a_pickle(tensors: dict[str, Any], facts: Any) -> None:
    tensors["encoder/model.pt"] = as_tensor(b"\x80\x04.")


def no_bytes(tensors: dict[str, Any], facts: Any) -> None:
    tensors["encoder/tokenizer.json"] = torch.zeros(3, 3)


def no_model(tensors: dict[str, Any], facts: Any) -> None:
    del tensors["encoder/model.onnx"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (outside_references, "save it as one file, with its weights in it"),
        (other_weights, "the other nodes' has"),
        (a_path, "carries a file `../../.bashrc` that no encoder has"),
        (a_pickle, "carries a file `model.pt` that no encoder has"),
        (no_bytes, "carries a file `tokenizer.json` that no encoder has"),
        (no_model, "carries an encoder without the file `model.onnx`"),
    ],
)
def test_a_foreign_checkpoint_brings_nothing_but_an_encoder(tmp_path: Path, change: Any, said: str) -> None:
    place = rewritten(trained(tmp_path), change)
    before = {file for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises((ConfigError, DataError), match=said):
        adapt(place, str(sentences(tmp_path / "Z.csv", "Z")), tmp_path / "mine", task="user")
    new = {file for file in tmp_path.rglob("*") if file.is_file()} - before
    assert {file.name for file in new if "encoders" in file.parts} <= {"model.onnx", "tokenizer.json"}
    assert not list(tmp_path.rglob(".bashrc"))


def test_many_personal_models_do_not_each_carry_it(tmp_path: Path) -> None:
    place = trained(tmp_path)
    said: list[str] = []
    models = adapt(place, str(sentences(tmp_path / "many.csv", "KLMNOPQRSTU")), tmp_path / "mine", task="user", say=said.append)
    assert len(models) == 11
    assert not any(name.startswith("encoder/") for file in (tmp_path / "mine").glob("*.safetensors") for name in names(file))
    assert any("do not carry the encoder" in sentence for sentence in said)


def test_the_files_are_no_part_of_the_model() -> None:
    found = Checkpoint(Path("a"), {"meta/w": torch.zeros(1), "encoder/model.onnx": torch.zeros(1, dtype=torch.uint8)}, {})
    assert set(found.meta) == {"w"}
    assert set(found.encoder) == {"model.onnx"}
