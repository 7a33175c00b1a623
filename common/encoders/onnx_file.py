"""Encoders in an ONNX file, computed by `onnxruntime`: nothing is unpickled, no code of the file is run.

The file's inputs say what it reads: `input_ids` (and `attention_mask`, `token_type_ids`) are text, for which `tokenizer.json`
lies beside the file or in the folder above; [n, 3, height, width] or [n, height, width, 3] are pictures, prepared as
`preprocessor_config.json` beside the file says (else as ImageNet's); [n, columns] are numbers.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quickbloom.common.encoders.base import Encoder, Features, Kind, digest_of, existing
from quickbloom.common.encoders.pictures import Normalising
from quickbloom.common.encoders.pooling import of_sentence_transformers, pooled
from quickbloom.common.encoders.tokens import FILE, LENGTHS, Tokenizer, read_json
from quickbloom.common.errors import ConfigError, in_one_line
from quickbloom.common.system.extras import needs

_IDS, _MASK, _TYPES = "input_ids", "attention_mask", "token_type_ids"
_EMBEDDINGS = ("sentence_embedding", "embeddings", "embedding", "features", "image_embeds", "text_embeds")
"""Names of outputs that are features already, which come before any other."""
_POOLING, _PICTURES = "1_Pooling/config.json", "preprocessor_config.json"
MODEL = "model.onnx"
PARTS = (MODEL, FILE, *LENGTHS, _POOLING, _PICTURES)
"""Files that an encoder may consist of, beside its model."""


class OnnxEncoder(Encoder):
    """An ONNX file as an encoder. `file`: its place; `output`: the name of the output that is pooled as `pooling` says."""

    def __init__(self, path: str, pooling: str) -> None:
        """Raise ConfigError if the file cannot be used."""
        runtime: Any = needs("onnx", "onnxruntime", f"`encoder=onnx:{path}`")
        self.file = existing(f"onnx:{path}", path)
        self._session = _session(runtime, self.file)
        self._inputs = {one.name: one for one in self._session.get_inputs()}
        self.output = _chosen(self._session.get_outputs())
        self.kind = self._kind()
        self.pooling = self._pooling_of(pooling)
        files = [self.file]
        facts: dict[str, Any] = {"pooling": self.pooling, "output": self.output}
        if self.kind == "text":
            self._tokenizer = Tokenizer(_beside(self.file, FILE))
            files.append(self._tokenizer.file)
            facts["longest"] = self._tokenizer.longest
        elif self.kind == "images":
            self._normalising = self._normalising_of()
            self.shorter_side = self._normalising.resize
            facts["pictures"] = self._normalising.to_json()
        self.digest = digest_of(facts, *files)
        self.size = self._tried()

    @property
    def columns(self) -> int:
        """Numbers of one example, for an encoder of numbers; 0: any."""
        found = next(iter(self._inputs.values())).shape[1]
        return found if isinstance(found, int) else 0

    @property
    def parts(self) -> dict[str, Path]:
        """The files that it consists of, by the names that they have beside `MODEL`."""
        found = {MODEL: self.file, _POOLING: _beside(self.file, _POOLING)}
        if self.kind == "text":
            folder = self._tokenizer.file.parent
            found |= {FILE: self._tokenizer.file, **{name: folder / name for name in LENGTHS}}
        elif self.kind == "images":
            found[_PICTURES] = _beside(self.file, _PICTURES)
        return {name: file for name, file in found.items() if file.is_file() and file.stat().st_size}

    def encode(self, examples: Sequence[Any]) -> Features:
        feed, mask = self.feed(examples)
        return pooled(torch.from_numpy(self.states(feed)), mask, self.pooling).numpy()

    def states(self, feed: Mapping[str, Any]) -> Features:
        """Return the output that is pooled, for inputs by name."""
        (found,) = self._session.run([self.output], dict(feed))
        return np.asarray(found, dtype=np.float32)

    def feed(self, examples: Sequence[Any]) -> tuple[dict[str, Any], torch.Tensor | None]:
        """Return (the inputs of the file by name, the mask of the tokens [n, length] or None)."""
        if self.kind == "text":
            ids, mask = self._tokenizer.padded(examples)
            every = {_IDS: ids, _MASK: mask, _TYPES: np.zeros_like(ids)}
            return {name: every[name] for name in self._inputs}, torch.from_numpy(mask)
        (one,) = self._inputs.values()
        if self.kind == "numbers":
            return {one.name: np.stack(examples).astype(np.float32)}, None
        x = self._normalising.inputs(examples).numpy()
        return {one.name: x if one.shape[1] in (1, 3) else np.ascontiguousarray(x.transpose(0, 2, 3, 1))}, None

    def _kind(self) -> Kind:
        shapes = {name: f"{one.type} {one.shape}" for name, one in self._inputs.items()}
        if _IDS in self._inputs and self._inputs.keys() <= {_IDS, _MASK, _TYPES}:
            return "text"
        if len(self._inputs) == 1:
            (one,) = self._inputs.values()
            if one.type == "tensor(float)" and len(one.shape) == 2:
                return "numbers"
            if one.type == "tensor(float)" and len(one.shape) == 4 and {1, 3} & {one.shape[1], one.shape[3]}:
                return "images"
        raise ConfigError(
            f"the encoder '{self.file}' must read `input_ids`, pictures [n, 3, height, width] or numbers [n, columns], got "
            f"{shapes}: export it with one of these as its only input"
        )

    def _pooling_of(self, asked: str) -> str:
        if asked != "auto":
            return asked
        said = read_json(_beside(self.file, _POOLING))
        found = of_sentence_transformers(said)
        if said and not found:
            raise ConfigError(f"the pooling of the encoder '{self.file}' is not known here: set `own.encoder-pooling`")
        return found or "mean"

    def _normalising_of(self) -> Normalising:
        (one,) = self._inputs.values()
        first = one.shape[1] in (1, 3)
        channels, side = (one.shape[1], one.shape[2]) if first else (one.shape[3], one.shape[1])
        config = read_json(_beside(self.file, _PICTURES))
        return Normalising.of_config(config, side if isinstance(side, int) else 0, channels)

    def _tried(self) -> int:
        """Return the features of one example, by encoding one. Raises ConfigError."""
        made_up: dict[Kind, Any] = {"text": "a", "images": np.zeros((8, 8, 3), dtype=np.uint8)}
        made_up["numbers"] = np.zeros(self.columns or 1, dtype=np.float32)
        try:
            found = self.encode([made_up[self.kind]])
        except Exception as error:  # the runtime raises its own types
            raise ConfigError(
                f"the encoder '{self.file}' cannot compute the output `{self.output}` ({in_one_line(error)}): export it anew"
            ) from None
        if found.ndim != 2 or found.shape[0] != 1:
            raise ConfigError(f"the encoder '{self.file}' must give features [n, size], got the shape {found.shape}")
        return int(found.shape[1])


def _session(runtime: Any, file: Path) -> Any:
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = torch.get_num_threads()
    # Weights in other files could be any file of this machine: they are looked for where there is nothing.
    with tempfile.TemporaryDirectory() as nothing:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", nothing)
        try:
            return runtime.InferenceSession(file.read_bytes(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime raises its own types
            why = in_one_line(error)
            mend = "save it as one file, with its weights in it" if "external" in why.lower() else "export it anew as ONNX"
            raise ConfigError(f"the encoder '{file}' cannot be read ({why}): {mend}") from None


def _chosen(outputs: Sequence[Any]) -> str:
    names = [one.name for one in outputs]
    return next((name for name in _EMBEDDINGS if name in names), str(names[0]))


def _beside(file: Path, name: str) -> Path:
    """Return the place of a file that belongs to the model: beside it, or in the folder above, as hubs have it."""
    near, above = file.parent / name, file.parent.parent / name
    return above if not near.exists() and above.exists() else near


def load(path: str, pooling: str) -> Encoder:
    """Return the encoder in an ONNX file. Raises ConfigError."""
    return OnnxEncoder(path, pooling)
