"""Interface of an encoder."""

import hashlib
import inspect
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from quickbloom.common.errors import ConfigError
from quickbloom.common.system.user_code import FOLDER

Kind = Literal["text", "images", "numbers"]
Features = NDArray[np.float32]


class Encoder(ABC):
    """A frozen function from examples to features.

    `kind`: what it reads: "text" (str), "images" (pictures as uint8 [height, width, 3], of any size) or "numbers" (float32
    [columns]). `size`: features of one example. `digest`: SHA-256 in hexadecimal digits of all that the features depend on:
    weights, tokenizer, and how examples are prepared. Two nodes with one digest have the same encoder.
    """

    kind: Kind
    size: int
    digest: str
    shorter_side: int = 0
    """Pixels of the shorter side that pictures are scaled to; larger ones may be scaled down before; 0: no pictures."""
    at_once: ClassVar[int] = 32
    """Examples that are encoded together, so that memory is bounded."""

    @property
    def stored_as(self) -> str:
        """The name under which features are stored on this machine: the digest, if that covers all they depend on."""
        return self.digest

    @abstractmethod
    def encode(self, examples: Sequence[Any]) -> Features:
        """Return the features [n, size] of n examples. May raise anything: `encode_all` says it in one sentence."""


def of_probe(encoder: Encoder, examples: Sequence[Any]) -> str:
    """Return the digest with a hash of the features of some examples, for an encoder that is code: what it does may change
    without a change of its weights or of its file. Exact, and so for one machine alone.
    """
    features = np.ascontiguousarray(encoder.encode(list(examples)), dtype=np.float32)
    return hashlib.sha256(encoder.digest.encode() + features.tobytes()).hexdigest()


def sources(*objects: Any) -> list[Path]:
    """Return the files in which functions, classes or modules are written, each once."""
    found: list[Path] = []
    for one in objects:
        try:
            file = inspect.getsourcefile(one)
        except TypeError:  # built in
            continue
        if file and Path(file).is_file() and Path(file) not in found:
            found.append(Path(file))
    return found


def digest_of(facts: Mapping[str, Any], *files: Path) -> str:
    """Return the SHA-256 of settings and of whole files. Raises OSError."""
    total = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for file in files:
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def existing(what: str, path: str) -> Path:
    """Return the place of an encoder's file or directory. Raises ConfigError if there is none.

    A relative one is looked for here, where the command was started, and in the folder of data files.
    """
    given = Path(path).expanduser()
    folders = [Path(), *(Path(os.environ[name]) for name in (FOLDER, "QUICKBLOOM_DATA_DIR") if os.environ.get(name))]
    found = next((folder / given for folder in folders if (folder / given).exists()), None)
    if found is None:
        raise ConfigError(f"the encoder '{what}' does not exist: put it there, or say with `--encoder` where it is")
    return found.absolute()
