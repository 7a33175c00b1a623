"""Whole runs on a user's own texts, pictures and rows behind a frozen encoder."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import small_encoders
import torch
from loopback import LoopbackGrid
from PIL import Image
from safetensors.torch import load_file
from small_encoders import on_nodes, run_config, sentences

from quickbloom.client_app.export import export
from quickbloom.client_app.offline.adapting import adapt
from quickbloom.client_app.offline.predicting import predict
from quickbloom.common.config.run import RunConfig
from quickbloom.common.datasets.own import Own, OwnOptions
from quickbloom.common.datasets.own.columns import Schema
from quickbloom.common.datasets.own.encoded import encode_pictures
from quickbloom.common.encoders import load_encoder
from quickbloom.common.errors import ConfigError, DataError
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.events.file import read_events
from quickbloom.server_app.events.kinds import Scored
from quickbloom.server_app.runs import checkpoints


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load_encoder.cache_clear()
    return tmp_path / "cache"


def test_features_are_centred_by_the_training_users_and_have_one_length(tmp_path: Path) -> None:
    file, table = small_encoders.text_onnx(tmp_path / "words.onnx")
    config = run_config(tmp_path, f"onnx:{file}")
    summary = run_federation(on_nodes(tmp_path, config, "ABCD", "EFGH"), config)
    facts = checkpoints.load(tmp_path / "run").facts
    schema = Schema.from_json(facts["schema"])
    assert summary["failures"] == 0
    assert schema.features == {"loud": "number", "said": "features"}
    # By hand, from the table of word vectors.
    place = {word: at for at, word in enumerate(small_encoders.WORDS)}

    def unit(vector: Any) -> Any:
        return vector / np.linalg.norm(vector)

    def by_hand(text: str) -> Any:
        return unit(np.mean([table[place[word]] for word in text.split()], axis=0))

    train = []
    for users in ("ABCD", "EFGH"):
        own = Own(
            OwnOptions(path=str(tmp_path / f"{users}.csv"), task_column="user", text="said", encoder=f"onnx:{file}"), Path()
        )
        cells = own.table["said"].cells()  # type: ignore[union-attr]
        rows = [row for task in users if task in facts["splits"]["train"] for part in own.rows[task][:2] for row in part]
        train += [by_hand(cells[row]) for row in rows if cells[row]]
    mean = np.mean(train, axis=0)
    np.testing.assert_allclose([schema.scales[f"said[{at}]"][0] for at in range(6)], mean, rtol=1e-5)
    card = json.loads((tmp_path / "state-ABCD" / "personal" / "A.json").read_text())
    np.testing.assert_allclose(card["preparation"]["encoded"]["said"], mean, rtol=1e-5)
    shared = own.on_scales(schema.scales, schema.target_scale)
    batch = shared.test_draws("E")[0].support
    row = int(shared.rows["E"][0][1])
    np.testing.assert_allclose(batch.x[1, 1:].numpy(), 4 * unit(by_hand(str(cells[row])) - mean), rtol=1e-4)


def test_behind_an_encoder_the_best_model_is_kept_everywhere(tmp_path: Path) -> None:
    file, _ = small_encoders.text_onnx(tmp_path / "words.onnx")
    settings = {"algorithm": "protonet", "protonet.outer-lr": 0.05, "evaluate-every": 1, "rounds": 6}
    config = run_config(tmp_path, f"onnx:{file}", **settings)
    summary = run_federation(on_nodes(tmp_path, config, "ABCD", "EFGH"), config)
    scored = {event.round: event.after for event in read_events(tmp_path / "run") if isinstance(event, Scored)}
    assert scored.keys() == set(range(7))  # the initial model as well
    assert summary["kept"]["accuracy"] == max(scored.values()) == scored[summary["kept"]["round"]]
    # What nodes keep, and what a device adapts, is of that model.
    tensors = checkpoints.load(tmp_path / "run").tensors
    personal = load_file(tmp_path / "state-ABCD" / "personal" / "A.safetensors")
    assert torch.equal(tensors["meta/1.up.weight"], personal["1.up.weight"])


def test_an_empty_cell_is_zero_and_the_rest_of_the_row_counts(tmp_path: Path) -> None:
    file, _ = small_encoders.text_onnx(tmp_path / "words.onnx")
    path = sentences(tmp_path / "A.csv", "AB")
    own = Own(OwnOptions(path=str(path), task_column="user", text="said", encoder=f"onnx:{file}"), Path(), whole=True)
    x = own.test_draws("A")[0].support.x.numpy()
    assert not x[0, 1:].any()
    assert x[1:, 1:].any(axis=1).all()
    np.testing.assert_allclose(np.linalg.norm(x[1:, 1:], axis=1), 4, rtol=1e-6)


def test_the_spread_over_nodes_changes_nothing(tmp_path: Path) -> None:
    file, _ = small_encoders.text_onnx(tmp_path / "words.onnx")
    scores = []
    for place, nodes in enumerate((("ABCDEFGH",), ("AB", "CD", "EF", "GH"))):
        folder = tmp_path / str(place)
        folder.mkdir()
        config = run_config(folder, f"onnx:{file}")
        # One generator per user, so that a user's rows do not depend on the file.
        for user in "ABCDEFGH":
            sentences(tmp_path / f"{user}.csv", user)
        settings = {}
        for node, users in enumerate(nodes):
            lines = [(tmp_path / f"{user}.csv").read_text().splitlines()[1:] for user in users]
            own = folder / f"{users}.csv"
            own.write_text("\n".join(["user,said,loud,label", *(line for part in lines for line in part)]) + "\n")
            settings[node] = {"data-path": str(own)}
        summary = run_federation(LoopbackGrid(len(nodes), config.flat(), {}, settings), config)
        scores.append(summary["test"]["loss"]["mean"])
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-6)


def test_a_node_with_another_encoder_is_refused_with_both_hashes(tmp_path: Path) -> None:
    files = [f"onnx:{small_encoders.text_onnx(tmp_path / str(seed) / 'words.onnx', seed=seed)[0]}" for seed in (0, 1)]
    config = run_config(tmp_path, files[0], **{"validation-tasks": 0, "test-tasks": 1})
    grid = on_nodes(tmp_path, config, "ABCD", "EFG", encoders=(files[0], files[1]))
    summary = run_federation(grid, config)
    digests = [load_encoder(file).digest for file in files]
    (told,) = [line for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines() if "does not take part" in line]
    assert all(digest in told for digest in digests)
    assert sum(summary["tasks"].values()) == 4


def test_each_text_is_encoded_once_also_over_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "noted_encoder.py").write_text(
        "import numpy as np\n"
        "class Noted:\n"
        "    def encode(self, texts):\n"
        f"        with open({str(tmp_path / 'asked')!r}, 'a') as file:\n"
        "            file.write(''.join(text + '\\n' for text in texts))\n"
        "        return np.array([[len(text), text.count('lamp'), 1.0] for text in texts])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = run_config(tmp_path, "noted_encoder:Noted", **{"output-dir": str(tmp_path / "first")})
    run_federation(on_nodes(tmp_path, config, "ABCD", "EFGH"), config)
    asked = (tmp_path / "asked").read_text().splitlines()
    real = [text for text in asked if " " in text]
    assert len(real) == len(set(real)) > 3  # "a" and "b" try the encoder out
    config = run_config(tmp_path, "noted_encoder:Noted", **{"output-dir": str(tmp_path / "second"), "seed": 1})
    run_federation(on_nodes(tmp_path, config, "ABCD", "EFGH"), config)
    assert [text for text in (tmp_path / "asked").read_text().splitlines() if " " in text] == real


def test_a_device_adapts_and_predicts_with_the_encoder_and_not_with_another(tmp_path: Path) -> None:
    file, _ = small_encoders.text_onnx(tmp_path / "words.onnx")
    other, _ = small_encoders.text_onnx(tmp_path / "other" / "words.onnx", seed=1)
    config = run_config(tmp_path, f"onnx:{file}", **{"own.carry-encoder": False})
    run_federation(on_nodes(tmp_path, config, "ABCD", "EFGH"), config)
    mine = sentences(tmp_path / "Z.csv", "Z")
    (model,) = adapt(tmp_path / "run", str(mine), tmp_path / "mine", task="user")
    moved = tmp_path / "elsewhere" / "words.onnx"
    small_encoders.text_onnx(moved)
    file.unlink()
    load_encoder.cache_clear()
    with pytest.raises(ConfigError, match="say with `--encoder` where it is"):
        predict(tmp_path / "mine", str(mine))
    found = predict(tmp_path / "mine", str(mine), encoder=f"onnx:{moved}")
    assert len(found.rows) == 12
    with pytest.raises(DataError) as raised:
        predict(tmp_path / "mine", str(mine), encoder=f"onnx:{other}")
    assert load_encoder(f"onnx:{other}").digest in str(raised.value)
    assert model.schema.encoder["digest"] in str(raised.value)


def test_a_file_never_makes_a_device_run_code_as_an_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_code.py").write_text(
        "import numpy as np\nclass E:\n    def encode(self, texts):\n        return np.ones((len(texts), 2))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = run_config(tmp_path, "my_code:E")
    run_federation(on_nodes(tmp_path, config, "ABCD", "EFGH"), config)
    mine = sentences(tmp_path / "Z.csv", "Z")
    with pytest.raises(ConfigError, match="--trust-model my_code:E"):
        adapt(tmp_path / "run", str(mine), tmp_path / "mine", task="user")
    adapt(tmp_path / "run", str(mine), tmp_path / "mine", task="user", trust=["my_code:E"])
    with pytest.raises(ConfigError, match="--trust-model my_code:E"):
        predict(tmp_path / "mine", str(mine))
    assert predict(tmp_path / "mine", str(mine), trust=["my_code:E"]).rows
    with pytest.raises(ConfigError, match="--trust-model my_code:E"):
        export(tmp_path / "mine", tmp_path / "whole.onnx", "onnx", with_encoder=True)
    with pytest.raises(DataError, match="needs an encoder in an ONNX file"):
        export(tmp_path / "mine", tmp_path / "whole.onnx", "onnx", ["my_code:E"], with_encoder=True)


@pytest.mark.parametrize("kind", ["folder", "array"])
def test_pictures_of_any_size_reach_the_encoder_in_colour(tmp_path: Path, kind: str) -> None:
    encoder = f"onnx:{small_encoders.picture_onnx(tmp_path / 'colours.onnx')}"
    colours = {"red": (204, 51, 51), "blue": (0, 0, 255)}
    path = tmp_path / "pictures"
    rows = []
    for user in "AB":
        for label, colour in colours.items():
            for number in range(3):
                size = (20 + number, 14)
                made = path / user / label / f"{number}.png"
                made.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", size, colour).save(made)
                rows.append((user, label, colour))
    if kind == "array":
        pixels = np.array([np.broadcast_to(np.array(colour, dtype=np.uint8), (9, 9, 3)) for _, _, colour in rows])
        path = tmp_path / "pictures.npz"
        np.savez(path, image=pixels, task=[row[0] for row in rows], label=[row[1] for row in rows])
    own = Own(OwnOptions(path=str(path), encoder=encoder), Path(), whole=True)
    x, y = own.test_draws("A")[0].support.x.numpy(), own.test_draws("A")[0].support.y.numpy()
    # 204 of 255 is 0.6 and 51 is -0.6 after normalising; each is brought to the length 4.
    blue, red = np.array([-1, -1, 1]) * 4 / np.sqrt(3), np.array([1, -1, -1]) * 4 / np.sqrt(3)
    np.testing.assert_allclose(x, np.where(y[:, None] == own.classes.index("red"), red, blue), rtol=1e-5)


def test_all_numbers_of_a_row_go_through_an_encoder_of_numbers(tmp_path: Path) -> None:
    file, matrix = small_encoders.numbers_onnx(tmp_path / "sensors.onnx", columns=2)
    rng = np.random.default_rng(0)
    lines = ["task,x,y,class"] + [
        f"{task},{rng.normal():.3f},{rng.normal():.3f},{row % 2}" for task in "AB" for row in range(8)
    ]
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(lines) + "\n")
    options = OwnOptions(path=str(path), encoder=f"onnx:{file}", target_column="class", features="y,x")
    own = Own(options, Path(), whole=True)
    numbers = np.array([[float(cell) for cell in line.split(",")[2:0:-1]] for line in lines[1:9]])
    features = numbers @ matrix
    expected = 4 * features / np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_allclose(own.test_draws("A")[0].support.x.numpy(), expected, rtol=1e-4, atol=1e-5)
    path.write_text("\n".join([*lines, "A,,1,0"]) + "\n")
    with pytest.raises(DataError, match="needs a number in every cell, row 17 has none in `x`"):
        Own(options, Path())
    with pytest.raises(DataError, match="in an order of its own: name the columns"):
        Own(options.model_copy(update={"features": ""}), Path())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"text": "said"}, "need an encoder"),
        ({"encoder": "text"}, "name its column with `--text`, one of loud, said"),
        ({"encoder": "text", "text": "sayd"}, "did you mean `said`"),
        ({"encoder": "pictures"}, "reads images, and"),
        ({"encoder": "pictures", "text": "said"}, "choose an encoder of text"),
        ({"encoder": "numbers", "features": "loud"}, "reads 7 numbers, and"),
    ],
)
def test_an_encoder_of_another_kind_than_the_data_is_refused(tmp_path: Path, options: dict[str, str], said: str) -> None:
    made = {
        "text": lambda: small_encoders.text_onnx(tmp_path / "words.onnx")[0],
        "pictures": lambda: small_encoders.picture_onnx(tmp_path / "colours.onnx"),
        "numbers": lambda: small_encoders.numbers_onnx(tmp_path / "sensors.onnx", columns=7)[0],
    }
    if "encoder" in options:
        options = options | {"encoder": f"onnx:{made[options['encoder']]()}"}
    settings = {"path": str(sentences(tmp_path / "A.csv", "AB")), "task-column": "user", **options}
    with pytest.raises(DataError, match=said):
        Own(OwnOptions.model_validate(settings), Path())


@pytest.mark.parametrize("algorithm", ["ridge", "protonet"])
def test_encoder_and_model_are_written_as_one_file_that_needs_nothing_else(tmp_path: Path, algorithm: str) -> None:
    file, _ = small_encoders.text_onnx(tmp_path / "words.onnx")
    config = run_config(tmp_path, f"onnx:{file}", **{"own.features": "said", "algorithm": algorithm})
    run_federation(on_nodes(tmp_path, config, "ABCD", "EFGH"), config)
    mine = sentences(tmp_path / "Z.csv", "Z")
    adapt(tmp_path / "run", str(mine), tmp_path / "mine", task="user", own_rows=False)
    whole = export(tmp_path / "mine", tmp_path / "whole.onnx", "onnx", with_encoder=True)
    rows = [row for row in predict(tmp_path / "mine", str(mine)).rows if row["said"]]
    place = {word: at for at, word in enumerate(small_encoders.WORDS)}
    session = onnxruntime.InferenceSession(whole.read_bytes(), providers=["CPUExecutionProvider"])
    for row in rows:
        ids = np.array([[place[word] for word in row["said"].split()] + [0]])
        given = {"input_ids": ids, "attention_mask": np.array([[1] * (ids.shape[1] - 1) + [0]])}
        (outputs,) = session.run(["outputs"], given)
        expected = [float(row["probability_light"]), float(row["probability_sound"])]
        assert outputs[0].tolist() == pytest.approx(expected, abs=1e-4)


def test_a_device_with_an_onnx_encoder_needs_no_library_of_pretrained_models(tmp_path: Path) -> None:
    file, _ = small_encoders.text_onnx(tmp_path / "words.onnx")
    config = run_config(tmp_path, f"onnx:{file}", algorithm="protonet")
    run_federation(on_nodes(tmp_path, config, "ABCD", "EFGH"), config)
    mine = sentences(tmp_path / "Z.csv", "Z")
    code = """
import sys
for name in ("transformers", "sentence_transformers", "timm", "torchvision", "peft"):
    sys.modules[name] = None
from quickbloom.client_app.cli import main
main()
"""
    output = str(tmp_path / "mine")
    edge = [sys.executable, "-c", code, "adapt", "--checkpoint", str(tmp_path / "run"), "--data", str(mine), "--output", output]
    done = subprocess.run(edge, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Personal model of Z" in done.stdout
    assert len(predict(tmp_path / "mine", str(mine)).rows) == 12


def test_what_cannot_be_one_file_is_said(tmp_path: Path) -> None:
    file, _ = small_encoders.text_onnx(tmp_path / "words.onnx")
    config = run_config(tmp_path, f"onnx:{file}")
    run_federation(on_nodes(tmp_path, config, "ABCD", "EFGH"), config)
    adapt(tmp_path / "run", str(sentences(tmp_path / "Z.csv", "Z")), tmp_path / "mine", task="user", own_rows=False)
    with pytest.raises(DataError, match="reads 2 columns"):
        export(tmp_path / "mine", tmp_path / "whole.onnx", "onnx", with_encoder=True)
    with pytest.raises(ConfigError, match="is for `--format onnx`"):
        export(tmp_path / "mine", tmp_path / "whole.pt2", "torch", with_encoder=True)
    assert not (tmp_path / "whole.onnx").exists()


def of_tokens(folder: Path, directory: Path, **more: Any) -> RunConfig:
    flat = {
        "own.features": "said",
        "own.tokenizer": str(directory),
        "own.tokens": 8,
        "algorithm": "protonet",
        "model": "transformer",
    }
    flat |= {"transformer.directory": str(directory), "transformer.lora-rank": 2, "transformer.lora-targets": "query,value"}
    return run_config(folder, "", **{**flat, **more})


def test_a_model_that_reads_text_itself_is_trained_adapted_and_used(tmp_path: Path) -> None:
    directory = small_encoders.transformer(tmp_path / "bert")
    config = of_tokens(tmp_path, directory)
    grid = on_nodes(tmp_path, config, "ABCD", "EFGH")
    summary = run_federation(grid, config)
    assert summary["failures"] == 0
    found = checkpoints.load(tmp_path / "run")
    assert found.facts["tokens"] == len(small_encoders.WORDS)
    own = Own(config.table("own").model_copy(update={"path": str(tmp_path / "ABCD.csv")}), Path())  # type: ignore[arg-type]
    ids = own.test_draws("A")[0].support.x
    words = str(own.table["said"].cells()[own.rows["A"][0][1]]).split()  # type: ignore[union-attr]
    assert ids[1].tolist() == [small_encoders.WORDS.index(word) for word in words] + [0] * (8 - len(words))
    mine = sentences(tmp_path / "Z.csv", "Z")
    with pytest.raises(DataError, match=r"set `own\.tokenizer` to its directory"):
        adapt(tmp_path / "run", str(mine), tmp_path / "mine", task="user", trust=[f"transformer.directory={directory}"])
    moved = shutil.move(directory, tmp_path / "moved")
    places = [f"transformer.directory={moved}", f"own.tokenizer={moved}"]
    adapt(tmp_path / "run", str(mine), tmp_path / "mine", task="user", trust=places)
    rows = predict(tmp_path / "mine", str(mine), trust=places).rows
    assert {row["prediction"] for row in rows} <= {"light", "sound"}
    assert len(rows) == 12


def test_a_node_with_another_tokenizer_is_refused_with_both_hashes(tmp_path: Path) -> None:
    directory, other = small_encoders.transformer(tmp_path / "bert"), tmp_path / "other"
    small_encoders.tokenizer(other, [*small_encoders.WORDS[1:], "[PAD]"])
    path = sentences(tmp_path / "A.csv", "AB")
    settings = {"path": str(path), "task-column": "user", "text": "said", "features": "said", "tokenizer": str(directory)}
    schema = Own(OwnOptions.model_validate(settings), Path()).spec.schema
    options = OwnOptions.model_validate({**settings, "tokenizer": str(other)})
    with pytest.raises(DataError) as raised:
        Own(options, Path(), schema)
    assert Schema.from_json(schema).encoder["digest"] in str(raised.value)
    with pytest.raises(DataError, match=r"set `own\.tokenizer` to its directory"):
        Own(OwnOptions.model_validate({**settings, "tokenizer": ""}), Path(), schema)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "reads one column of text and nothing else"),
        ({"encoder": "onnx:a.onnx", "features": "said"}, "and no `own.encoder`"),
    ],
)
def test_token_ids_are_the_only_input(tmp_path: Path, more: dict[str, str], said: str) -> None:
    directory = small_encoders.transformer(tmp_path / "bert")
    settings = {
        "path": str(sentences(tmp_path / "A.csv", "AB")),
        "task-column": "user",
        "text": "said",
        "tokenizer": str(directory),
    }
    options = OwnOptions.model_validate({**settings, **more})
    with pytest.raises(DataError, match=said):
        Own(options, Path())


def test_pictures_that_are_read_together_do_not_change_one_another(tmp_path: Path) -> None:
    """Decimal pixels: what is white is that of all, in whatever rows are encoded at once."""
    encoder = f"onnx:{small_encoders.picture_onnx(tmp_path / 'colours.onnx')}"
    pixels = np.stack([np.full((3, 9, 9), value) for value in (0.0, 2.0, 100.0, 250.0)]).astype(np.float32)
    together = encode_pictures(encoder, "auto", pixels)
    alone = encode_pictures(encoder, "auto", pixels, np.array([1]))
    np.testing.assert_array_equal(together.inputs([])[1], alone.inputs([])[0])
    with pytest.raises(DataError, match="neither 0 to 1 nor 0 to 255"):
        encode_pictures(encoder, "auto", pixels * 1000)


def test_a_column_with_the_name_of_a_feature_is_refused(tmp_path: Path) -> None:
    file, _ = small_encoders.text_onnx(tmp_path / "words.onnx")
    path = sentences(tmp_path / "A.csv", "AB")
    path.write_text(path.read_text().replace("loud", "said[2]", 1))
    with pytest.raises(DataError, match=r"the column `said\[2\]` has the name of a feature of `said`: rename it"):
        Own(OwnOptions(path=str(path), task_column="user", text="said", encoder=f"onnx:{file}"), Path())


def test_the_row_that_cannot_be_encoded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fragile.py").write_text(
        "from torch import nn\nclass E(nn.Module):\n    input_size = (2,)\n    def forward(self, x):\n"
        "        if (x[:, 0] == 7).any():\n            raise ValueError('seven')\n        return x\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = [f"{'AB'[row % 2]},{7 if row == 4 else 50 - row},1,{row % 3}" for row in range(12)]
    (tmp_path / "rows.csv").write_text("\n".join(["task,x,y,class", *rows]) + "\n")
    options = OwnOptions(path=str(tmp_path / "rows.csv"), encoder="fragile:E", target_column="class", features="x,y")
    with pytest.raises(DataError, match=r"cannot encode the row 5 \(ValueError: seven\)"):
        Own(options, Path())
