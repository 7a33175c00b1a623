"""Encoders of sentences in a directory of `transformers` or `sentence-transformers`. Nothing is fetched, no code is run.

Weights are read from safetensors alone. A directory of sentence-transformers says in `modules.json` how states become the
features of a sentence: by pooling, and perhaps at unit length.
"""

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from quickbloom.common.encoders.base import Encoder, Features, digest_of, existing
from quickbloom.common.encoders.pooling import of_sentence_transformers, pooled
from quickbloom.common.encoders.tokens import FILE, Tokenizer, read_json
from quickbloom.common.errors import ConfigError, in_one_line
from quickbloom.common.system.extras import needs

WEIGHTS = "model.safetensors"
_KNOWN = ("Transformer", "Pooling", "Normalize")


class SentenceEncoder(Encoder):
    """A transformer with pooled states."""

    kind = "text"

    def __init__(self, path: str, pooling: str) -> None:
        """Raise ConfigError if the directory cannot be used."""
        transformers: Any = needs("pretrained", "transformers", f"`encoder=sentence:{path}`")
        directory = existing(f"sentence:{path}", path)
        for name in ("config.json", WEIGHTS):
            if not (directory / name).is_file():
                raise ConfigError(f"the encoder '{directory}' lacks the file {name}: save the model there with save_pretrained")
        parts = _modules(directory)
        said = of_sentence_transformers(read_json(directory / "1_Pooling" / "config.json"))
        if pooling == "auto" and "Pooling" in parts and not said:
            raise ConfigError(f"the pooling of the encoder '{directory}' is not known here: set `own.encoder-pooling`")
        self._pooling = said or "mean" if pooling == "auto" else pooling
        self._unit = "Normalize" in parts
        self._tokenizer = Tokenizer(directory / FILE)
        self._model = _model(transformers, directory)
        self.size = int(self._model.config.hidden_size)
        facts = {"pooling": self._pooling, "unit": self._unit, "longest": self._tokenizer.longest}
        self.digest = digest_of(facts, directory / "config.json", directory / WEIGHTS, directory / FILE)

    def encode(self, examples: Sequence[Any]) -> Features:
        ids, mask = (torch.from_numpy(part) for part in self._tokenizer.padded(examples))
        with torch.inference_mode():
            states = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
            found = pooled(states, mask, self._pooling)
            found = torch.nn.functional.normalize(found, dim=-1) if self._unit else found
        return found.float().numpy()


def _modules(directory: Path) -> list[str]:
    """Return the parts of a directory of sentence-transformers; [] for one of transformers. Raises ConfigError."""
    file = directory / "modules.json"
    if not file.is_file():
        return []
    try:
        parts = [str(part["type"]).rpartition(".")[2] for part in json.loads(file.read_text(encoding="utf-8"))]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigError(f"the file '{file}' cannot be read ({in_one_line(error)}): fetch it again") from None
    if unknown := [part for part in parts if part not in _KNOWN]:
        raise ConfigError(
            f"the encoder '{directory}' has a part `{unknown[0]}`, and only {', '.join(_KNOWN)} are known: export it as ONNX, "
            "and use `encoder=onnx:FILE`"
        )
    return parts


def _model(transformers: Any, directory: Path) -> Any:
    logging: Any = import_module("transformers.utils.logging")

    shows = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return transformers.AutoModel.from_pretrained(
            str(directory), local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
        ).eval()
    except Exception as error:  # the library raises a dozen types
        raise ConfigError(f"the encoder '{directory}' cannot be read ({in_one_line(error)}): save it anew") from None
    finally:
        if shows:
            logging.enable_progress_bar()


def load(path: str, pooling: str) -> Encoder:
    """Return the encoder in a directory. Raises ConfigError."""
    return SentenceEncoder(path, pooling)
