"""Texts as token ids, by the `tokenizers` library from a file `tokenizer.json`."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quickbloom.common.errors import ConfigError, in_one_line
from quickbloom.common.system.extras import needs

FILE = "tokenizer.json"
_NAMED = {"sentence_bert_config.json": "max_seq_length", "tokenizer_config.json": "model_max_length"}
LENGTHS = tuple(_NAMED)
"""Files beside it that name the most tokens of a text."""
LONGEST = 512
"""Most tokens of a text, unless the model's own directory names fewer."""


class Tokenizer:
    """The tokenizer of a directory. Texts longer than `longest` tokens are cut."""

    def __init__(self, file: Path, longest: int = 0) -> None:
        """Raise ConfigError if the file is missing or cannot be read. `longest`: 0: what the directory names."""
        library: Any = needs("onnx", "tokenizers", "an encoder of text")
        if not file.is_file():
            raise ConfigError(f"an encoder of text needs the file '{file}': put the model's tokenizer there")
        try:
            self._of = library.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain exceptions
            raise ConfigError(f"the tokenizer '{file}' cannot be read ({in_one_line(error)}): fetch it again") from None
        self.file, self.longest = file, longest or _longest(file.parent)
        self._of.enable_truncation(self.longest)
        said = (self._of.padding or {}).get("pad_id")
        known = [self._of.token_to_id(word) for word in ("[PAD]", "<pad>", "<|endoftext|>")]
        self.padding = int(next((one for one in (said, *known) if one is not None), 0))
        """The id that fills up short texts."""
        self._of.no_padding()

    @cached_property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return int(self._of.get_vocab_size())

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of every text; one id at least."""
        # One by one: batches are computed by threads, which a process that was forked since must not have.
        return [self._of.encode(text).ids or [self.padding] for text in texts]

    def padded(self, texts: Sequence[str], length: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (ids, mask), each [n, length], padded at the end; 0: as long as the longest text."""
        found = self.ids(texts)
        ids = np.full((len(found), length or max(map(len, found), default=1)), self.padding, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, one in enumerate(found):
            ids[row, : len(one)] = one[: ids.shape[1]]
            mask[row, : len(one)] = 1
        return ids, mask


def _longest(directory: Path) -> int:
    """Return the most tokens that the files of a model's directory name."""
    found = [read_json(directory / file).get(name) for file, name in _NAMED.items()]
    numbers = [int(number) for number in found if isinstance(number, int | float) and 0 < number <= LONGEST]
    return min(numbers, default=LONGEST)


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file; {} if there is none. Raises ConfigError for anything else."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"the file '{file}' cannot be read ({in_one_line(error)}): fetch it again") from None
    return found if isinstance(found, dict) else {}
