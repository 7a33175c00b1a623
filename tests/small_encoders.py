"""Small encoders of the real kinds, for tests: ONNX files, directories of transformers, a tokenizer."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WORDS = ("[PAD]", "[UNK]", "lamp", "music", "on", "off", "please", "play", "stop", "the", "a")


def tokenizer(folder: Path, words: Sequence[str] = WORDS) -> Path:
    """Write tokenizer.json: one id for each word, in this order."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


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


def bert(folder: Path, seed: int = 0) -> Path:
    """Write a directory of transformers with a small BERT of random weights and a tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=32,
        )
        BertModel(config).save_pretrained(folder)
    tokenizer(folder)
    return folder
