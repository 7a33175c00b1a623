"""Encoders: what they read, how states become features, and what is refused."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import small_encoders
import torch
from onnx.external_data_helper import convert_model_to_external_data

from quickbloom.common.encoders import load_encoder
from quickbloom.common.encoders.encoding import Texts, encode_all
from quickbloom.common.encoders.pictures import Normalising
from quickbloom.common.encoders.pooling import of_sentence_transformers, pooled
from quickbloom.common.errors import ConfigError


def test_the_features_of_a_text_are_the_mean_of_its_tokens_without_padding(tmp_path: Path) -> None:
    file, table = small_encoders.text_onnx(tmp_path / "words.onnx")
    encoder = load_encoder(f"onnx:{file}")
    assert (encoder.kind, encoder.size) == ("text", 6)
    found = encoder.encode(["lamp on", "play the music please"])
    place = {word: at for at, word in enumerate(small_encoders.WORDS)}
    by_hand = [np.mean([table[place[word]] for word in text.split()], axis=0) for text in ("lamp on", "play the music please")]
    np.testing.assert_allclose(found, by_hand, rtol=1e-6)


@pytest.mark.parametrize(
    ("pooling", "words"), [("mean", ["lamp", "on"]), ("class", ["lamp"]), ("last", ["on"])], ids=["mean", "class", "last"]
)
def test_each_pooling_takes_its_tokens(tmp_path: Path, pooling: str, words: list[str]) -> None:
    file, table = small_encoders.text_onnx(tmp_path / "words.onnx")
    found = load_encoder(f"onnx:{file}", pooling).encode(["lamp on", "play the music please"])[0]
    expected = np.mean([table[small_encoders.WORDS.index(word)] for word in words], axis=0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_pictures_are_prepared_as_the_file_beside_the_encoder_says(tmp_path: Path) -> None:
    encoder = load_encoder(f"onnx:{small_encoders.picture_onnx(tmp_path / 'colours.onnx')}")
    picture = np.zeros((32, 16, 3), dtype=np.uint8)
    picture[..., 0], picture[..., 1] = 255, 51
    # (pixel / 255 - 0.5) / 0.5
    np.testing.assert_allclose(encoder.encode([picture]), [[1.0, -0.6, -1.0]], atol=1e-6)


def test_numbers_go_through_the_file_as_they_are(tmp_path: Path) -> None:
    file, matrix = small_encoders.numbers_onnx(tmp_path / "sensors.onnx", columns=4)
    rows = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    np.testing.assert_allclose(load_encoder(f"onnx:{file}").encode(list(rows)), rows @ matrix, rtol=1e-5)


def test_a_directory_of_transformers_gives_what_transformers_gives(tmp_path: Path) -> None:
    from transformers import AutoModel

    encoder = load_encoder(f"sentence:{small_encoders.transformer(tmp_path / 'bert')}")
    found = encoder.encode(["lamp on", "play the music please"])
    model = AutoModel.from_pretrained(tmp_path / "bert").eval()
    place = {word: at for at, word in enumerate(small_encoders.WORDS)}
    for row, text in zip(found, ("lamp on", "play the music please"), strict=True):
        with torch.no_grad():
            states = model(input_ids=torch.tensor([[place[word] for word in text.split()]])).last_hidden_state
        np.testing.assert_allclose(row, states[0].mean(dim=0).numpy(), atol=1e-5)


def test_a_directory_of_sentence_transformers_says_its_pooling_and_length(tmp_path: Path) -> None:
    folder = small_encoders.transformer(tmp_path / "bert")
    plain = load_encoder(f"sentence:{folder}", "class").encode(["lamp on"])
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    types = ["Transformer", "Pooling", "Normalize"]
    (folder / "modules.json").write_text(json.dumps([{"type": f"sentence_transformers.models.{one}"} for one in types]))
    load_encoder.cache_clear()
    found = load_encoder(f"sentence:{folder}").encode(["lamp on"])
    np.testing.assert_allclose(found, plain / np.linalg.norm(plain), rtol=1e-5)


def test_other_weights_another_tokenizer_or_another_pooling_are_another_encoder(tmp_path: Path) -> None:
    digests = [
        load_encoder(f"onnx:{small_encoders.text_onnx(tmp_path / 'a' / 'e.onnx')[0]}", how).digest for how in ("mean", "class")
    ]
    digests.append(load_encoder(f"onnx:{small_encoders.text_onnx(tmp_path / 'b' / 'e.onnx', seed=1)[0]}", "mean").digest)
    file, _ = small_encoders.text_onnx(tmp_path / "c" / "e.onnx")
    small_encoders.tokenizer(file.parent, [*small_encoders.WORDS[1:], "[PAD]"])
    digests.append(load_encoder(f"onnx:{file}", "mean").digest)
    again, _ = small_encoders.text_onnx(tmp_path / "d" / "e.onnx")
    assert len(set(digests)) == 4
    assert load_encoder(f"onnx:{again}", "mean").digest == digests[0]


MODULES = """
import numpy as np
import torch
from torch import nn

class Colours(nn.Module):
    input_size = (3, 4, 4)
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.9)
    def forward(self, x):
        return self.drop(self.norm(x))

class Lengths:
    def encode(self, texts):
        return np.array([[len(text), 1.0] for text in texts])

def numbers():
    module = nn.Linear(2, 5)
    module.input_size = (2,)
    return module

def not_one():
    return 3

def raises():
    raise ValueError("no weights here")
"""


def test_a_factory_of_ones_own_gives_a_module_or_an_object_that_encodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_encoders.py").write_text(MODULES)
    monkeypatch.syspath_prepend(str(tmp_path))
    colours = load_encoder("my_encoders:Colours")
    white = np.full((9, 9, 3), 255, dtype=np.uint8)
    # Dropout is off, batch norm uses its running statistics, mean 0 and variance 1, and the pixels are averaged.
    np.testing.assert_allclose(colours.encode([white]), [[1, 1, 1]], rtol=1e-4)
    assert (colours.kind, colours.size) == ("images", 3)
    lengths = load_encoder("my_encoders:Lengths")
    np.testing.assert_array_equal(lengths.encode(["ab", ""]), [[2, 1], [0, 1]])
    assert (load_encoder("my_encoders:numbers").kind, load_encoder("my_encoders:numbers").size) == ("numbers", 5)
    for name, said in (("not_one", "got a int"), ("raises", "no weights here"), ("absent", "absent")):
        with pytest.raises(ConfigError, match=said):
            load_encoder(f"my_encoders:{name}")


def _pickle(folder: Path) -> str:
    (folder / "e.onnx").write_bytes(pickle.dumps({"weights": 1}))
    return f"onnx:{folder / 'e.onnx'}"


def _no_tokenizer(folder: Path) -> str:
    file, _ = small_encoders.text_onnx(folder / "deep" / "er" / "e.onnx")
    (file.parent / "tokenizer.json").unlink()
    return f"onnx:{file}"


def _outside(folder: Path) -> str:
    file, _ = small_encoders.numbers_onnx(folder / "whole.onnx", columns=500)
    model = onnx.load(file)
    convert_model_to_external_data(model, location="weights.bin", size_threshold=0)
    onnx.save(model, str(folder / "e.onnx"))
    assert (folder / "weights.bin").exists()
    return f"onnx:{folder / 'e.onnx'}"


def _no_safetensors(folder: Path) -> str:
    made = small_encoders.transformer(folder / "bert")
    (made / "model.safetensors").unlink()
    (made / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    return f"sentence:{made}"


def _unknown_part(folder: Path) -> str:
    made = small_encoders.transformer(folder / "bert")
    (made / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Dense"}]))
    return f"sentence:{made}"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: "words", "must be onnx:FILE, sentence:DIRECTORY"),
        (lambda folder: f"onnx:{folder / 'none.onnx'}", "does not exist"),
        (lambda folder: "nowhere_at_all:encoder", "nowhere_at_all"),
        (lambda folder: "timm:resnet18", "timm"),
        (_pickle, "cannot be read"),
        (_no_tokenizer, "tokenizer.json"),
        (_outside, "save it as one file"),
        (_no_safetensors, "lacks the file model.safetensors"),
        (_unknown_part, "a part `Dense`"),
    ],
)
def test_what_is_no_encoder_is_refused_in_one_sentence(tmp_path: Path, make: Callable[[Path], str], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        load_encoder(make(tmp_path))
    assert "\n" not in str(raised.value)


def test_the_class_token_and_pictures_are_pooled() -> None:
    states = torch.arange(12.0).reshape(1, 3, 4)
    assert pooled(states, None, "class").tolist() == [[0, 1, 2, 3]]
    assert pooled(states, torch.tensor([[1, 1, 0]]), "last").tolist() == [[4, 5, 6, 7]]
    assert pooled(states.reshape(1, 3, 2, 2), None, "mean").tolist() == [[1.5, 5.5, 9.5]]


@pytest.mark.parametrize(
    ("config", "way"),
    [
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode": "cls"}, "class"),
        ({"pooling_mode_max_tokens": True}, ""),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, ""),
    ],
)
def test_only_known_ways_of_pooling_are_taken_over(config: dict[str, object], way: str) -> None:
    assert of_sentence_transformers(config) == way


def test_a_picture_is_scaled_by_its_shorter_side_and_its_middle_is_taken() -> None:
    config = {"size": {"shortest_edge": 8}, "crop_size": {"height": 4, "width": 4}, "do_normalize": False}
    normalising = Normalising.of_config(config)
    assert (normalising.side, normalising.resize) == (4, 8)
    picture = np.zeros((8, 24, 3), dtype=np.uint8)
    picture[2:6, 10:14] = 255
    assert normalising.inputs([picture]).min() == 1  # exactly the middle


def test_features_of_code_that_changed_are_not_taken_for_those_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two modules without weights, and of an object whose file of numbers is another one."""
    text = (
        "from torch import nn\nclass E(nn.Module):\n    input_size = (4,)\n    def forward(self, x):\n        return x[:, {}]\n"
    )
    for name, part in (("first_half", ":2"), ("second_half", "2:")):
        (tmp_path / f"{name}.py").write_text(text.format(part))
    reads = "import numpy as np\nclass E:\n    def __init__(self):\n        self.numbers = np.load({!r})\n"
    reads += "    def encode(self, texts):\n        return np.array([self.numbers * len(text) for text in texts])\n"
    (tmp_path / "reads_a_file.py").write_text(reads.format(str(tmp_path / "numbers.npy")))
    monkeypatch.syspath_prepend(str(tmp_path))
    one, other = (load_encoder(f"{name}:E") for name in ("first_half", "second_half"))
    assert one.digest != other.digest
    found = []
    for numbers in ([1.0, 2.0], [1.0, 3.0]):
        np.save(tmp_path / "numbers.npy", np.array(numbers))
        load_encoder.cache_clear()
        found.append(encode_all(load_encoder("reads_a_file:E"), Texts(["ab"]), tmp_path).tolist())
    assert found == [[[2, 4]], [[2, 6]]]
