"""Small encoders of the real kinds, for tests: ONNX files, directories of transformers, tokenizers, and sentences for them."""

import json
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from loopback import LoopbackGrid
from onnx import TensorProto, helper, numpy_helper

from quickbloom.common.config.run import RunConfig, parse_run_config

MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = (
    *MARKS,
    *("what", "is", "the", "my", "a", "to", "how", "do", "i", "of", "you", "me", "can", "please", "tell", "in", "for"),
    *("on", "need", "card", "account", "much", "are", "there", "set", "have", "want", "at", "by"),
    *("lamp", "music", "off", "play", "stop"),
)
VOCABULARY = len(WORDS)
SAID = {"light": ("lamp on", "the lamp on please", "a lamp off", "lamp off please"), "sound": ("play music", "stop the music")}


def sentences(path: Path, users: str) -> Path:
    """Write twelve rows of each user: what was said, how loud, and what was meant; one cell is empty."""
    rng = np.random.default_rng(list(users.encode()))
    lines = ["user,said,loud,label"]
    for user in users:
        for row in range(12):
            label = ("light", "sound")[row % 2]
            lines.append(f"{user},{rng.choice(SAID[label]) if row else ''},{rng.normal():.2f},{label}")
    path.write_text("\n".join(lines) + "\n")
    return path


def tokenizer(folder: Path, words: Sequence[str] = WORDS, *, ends: bool = False) -> Path:
    """Write tokenizer.json: one id for each word, in this order. `ends`: a sentence stands between [CLS] and [SEP]."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = {word: place for place, word in enumerate(words)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        marks = [(mark, vocabulary[mark]) for mark in ("[CLS]", "[SEP]")]
        made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=marks)
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@lru_cache(maxsize=1)
def characters() -> str:
    """Return a directory with a tokenizer alone, whose ids are the characters of a sentence."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocabulary = {"[PAD]": 0, "[UNK]": 1, **{chr(code): 2 + code - 32 for code in range(32, 127)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    folder = Path(tempfile.mkdtemp(prefix="small-tokenizer-"))
    made.save(str(folder / "tokenizer.json"))
    return str(folder)


def _saved(path: Path, nodes: list[Any], inputs: list[Any], output: Any, weights: dict[str, np.ndarray[Any, Any]]) -> Path:
    given = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "encoder", inputs, [output], given), opset_imports=[helper.make_opsetid("", 17)]
    )
    model.ir_version = 9
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def text_onnx(path: Path, size: int = 6, seed: int = 0) -> tuple[Path, np.ndarray[Any, Any]]:
    """Write an encoder of text, a table of word vectors, with its tokenizer; return its path and the table."""
    table = np.random.default_rng(seed).normal(size=(len(WORDS), size)).astype(np.float32)
    shape = ["n", "length"]
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name in ("input_ids", "attention_mask")]
    output = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, [*shape, size])
    nodes = [
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "axis"], ["column"]),
        helper.make_node("Gather", ["table", "input_ids"], ["states"]),
        helper.make_node("Mul", ["states", "column"], ["last_hidden_state"]),
    ]
    _saved(path, nodes, inputs, output, {"table": table, "axis": np.array([2])})
    tokenizer(path.parent)
    return path, table


def numbers_onnx(path: Path, columns: int, size: int = 3) -> tuple[Path, np.ndarray[Any, Any]]:
    """Write an encoder of numbers, one matrix; return its path and the matrix."""
    matrix = np.random.default_rng(1).normal(size=(columns, size)).astype(np.float32)
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", columns])
    output = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", size])
    return _saved(
        path, [helper.make_node("MatMul", ["x", "matrix"], ["features"])], [given], output, {"matrix": matrix}
    ), matrix


def picture_onnx(path: Path, side: int = 8) -> Path:
    """Write an encoder of pictures: the mean of each colour, after normalising with mean 0.5 and deviation 0.5."""
    given = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["n", 3, side, side])
    output = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", 3])
    _saved(path, [helper.make_node("ReduceMean", ["pixel_values"], ["features"], axes=[2, 3], keepdims=0)], [given], output, {})
    config = {"size": {"height": side, "width": side}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (path.parent / "preprocessor_config.json").write_text(json.dumps(config))
    return path


def transformer(folder: Path, kind: str = "bert", seed: int = 0, *, ends: bool = False) -> Path:
    """Write config.json, model.safetensors and tokenizer.json of a "bert" or a "llama" of random weights; return the folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _KINDS[kind](transformers).save_pretrained(folder)
    tokenizer(folder, ends=ends)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", "pad_token": "[PAD]"}))
    return folder


@lru_cache(maxsize=8)
def directory(kind: str = "bert", seed: int = 0) -> str:
    """Return a directory of `transformer` whose sentences have ends; the same for the same arguments."""
    return str(transformer(Path(tempfile.mkdtemp(prefix="small-encoder-")), kind, seed, ends=True))


_SIZES = {
    **{"vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"intermediate_size": 12, "max_position_embeddings": 40, "initializer_range": 0.5},
}


def _bert(transformers: Any) -> Any:
    return transformers.BertModel(transformers.BertConfig(**_SIZES))


def _llama(transformers: Any) -> Any:
    return transformers.LlamaModel(transformers.LlamaConfig(**_SIZES, pad_token_id=0, num_key_value_heads=1))


_KINDS: dict[str, Callable[[Any], Any]] = {"bert": _bert, "llama": _llama}


def _of_own_data(folder: Path, users: str) -> dict[str, Any]:
    flat: dict[str, Any] = {"dataset": "own", "own.path": str(sentences(folder / "said.csv", users)), "own.task-column": "user"}
    flat |= {"own.text": "said", "own.features": "said", "algorithm": "protonet", "protonet.outer-lr": 0.01, "seed": 3}
    return flat | {"rounds": 2, "evaluate-every": 1, "validation-tasks": 4, "test-tasks": 4, "adapt-steps": 1, "keep": "last"}


def frozen(folder: Path, users: str) -> dict[str, Any]:
    """Return the settings of a run on sentences of `users` behind an ONNX encoder; its files lie in `folder`."""
    return {**_of_own_data(folder, users), "own.encoder": f"onnx:{text_onnx(folder / 'words.onnx')[0]}"}


def adapter(folder: Path, users: str) -> dict[str, Any]:
    """Return the settings of a run that trains a low-rank adapter in a small BERT on sentences of `users`."""
    place = str(transformer(folder / "bert"))
    flat = {"own.tokenizer": place, "own.tokens": 8, "model": "transformer", "transformer.directory": place}
    return {**_of_own_data(folder, users), **flat, "transformer.lora-rank": 2, "transformer.lora-targets": "query,value"}


WAYS: dict[str, Callable[[Path, str], dict[str, Any]]] = {"frozen encoder": frozen, "adapter": adapter}
"""The ways of using a pretrained model, by name: settings of a run of two rounds from a folder and users of one letter."""


def run_config(folder: Path, encoder: str, **more: Any) -> RunConfig:
    """Return the settings of a run of three rounds on own texts behind an encoder."""
    flat: dict[str, Any] = {"dataset": "own", "own.task-column": "user", "own.text": "said", "own.encoder": encoder}
    flat |= {"min-nodes": 1, "rounds": 3, "algorithm": "ridge", "validation-tasks": 2, "test-tasks": 2, "adapt-steps": 1}
    flat |= {"output-dir": str(folder / "run"), "node-deadline": 5.0, "round-deadline": 20.0, **more}
    return parse_run_config(flat).resolved()


def on_nodes(folder: Path, config: RunConfig, *nodes: str, encoders: tuple[str, ...] = ()) -> LoopbackGrid:
    """Return nodes of which each hosts some users of one letter."""
    settings: dict[int, dict[str, Any]] = {}
    for node, users in enumerate(nodes):
        settings[node] = {
            "data-path": str(sentences(folder / f"{users}.csv", users)),
            "state-dir": str(folder / f"state-{users}"),
        }
        settings[node] |= {"encoder": encoders[node]} if encoders else {}
    return LoopbackGrid(len(nodes), config.flat(), {}, settings)
