"""Checkpoints: one safetensors file each, written whole or not at all, and never read wrongly.

The tensors are the meta-parameters (`meta/...`), the outer optimizer's state (`outer/...`) and, after the last round, the
scores of the validation tasks (`validation/...`); the metadata say which run, round and settings they belong to, and hold
a checksum over all of it. There is no random state to keep: every draw is a function of (seed, round, task).
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from logging import WARNING
from pathlib import Path
from typing import Any

import torch
from flwr.common import log
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.errors import DataError

OnDamage = Callable[[str], None]

_KEEP = 3
_FORMAT = "quickbloom-2"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds. `facts`: "round", "config" and whatever else was saved with it."""

    path: Path
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class CheckpointWriter:
    """Writes the checkpoints of one run into `directory`. `facts`: what all of them say.

    A process that is killed loses nothing that was written. A power failure costs about a second: the disk is waited for no
    more often, because that takes as long as a small round, and the newest file that is surely on the disk is kept.
    """

    def __init__(self, directory: Path, facts: dict[str, Any]) -> None:
        self._directory = directory
        self._facts = facts
        self._synced = -math.inf
        self._durable: Path | None = None

    def write(self, server_round: int, tensors: dict[str, Tensor], facts: dict[str, Any], *, last: bool = False) -> Path:
        """Write the checkpoint of a round and remove all but the newest few. A crash at any moment leaves the older whole.

        `last`: wait for the disk, since nothing will follow.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"round-{server_round:06d}.safetensors"
        temporary = path.with_suffix(".partial")
        text = json.dumps({**self._facts, **facts, "round": server_round})
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        metadata = {"format": _FORMAT, "facts": text, "sha256": _checksum(tensors, text)}
        save_file(tensors, temporary, metadata=metadata)
        due = last or time.monotonic() - self._synced > 1
        if due:
            _sync(temporary)
        temporary.replace(path)
        if due:
            _sync(self._directory)
            self._synced, self._durable = time.monotonic(), path
        for old in sorted(self._directory.glob("round-*.safetensors"))[:-_KEEP]:
            if old != self._durable:
                old.unlink()
        return path


def warn(sentence: str) -> None:
    """Put a sentence into the log as a warning."""
    log(WARNING, "%s", sentence)


def load(path: Path, on_damage: OnDamage = warn) -> Checkpoint:
    """A checkpoint file, or the newest usable one of a run directory. Raises DataError.

    `on_damage` is told, in one sentence, of a damaged file for which an older one stands in.
    """
    if not path.is_dir():
        return _read(path)
    found = sorted(path.glob("checkpoints/round-*.safetensors")) or sorted(path.glob("round-*.safetensors"))
    if not found:
        raise DataError(f"the directory '{path}' holds no checkpoint: name a run directory or a .safetensors file")
    reasons: list[str] = []
    for file in reversed(found):
        try:
            checkpoint = _read(file)
        except DataError as error:
            reasons.append(str(error))
            continue
        if reasons:
            on_damage(f"Checkpoint {checkpoint.path} is used in place of a newer one: {'; '.join(reasons)}")
        return checkpoint
    raise DataError(f"no checkpoint in '{path}' can be used: {'; '.join(reasons)}")


def _read(path: Path) -> Checkpoint:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise DataError(f"the checkpoint '{path}' cannot be read ({error})") from error
    try:
        text = metadata["facts"] if metadata.get("format") == _FORMAT else ""
        facts = json.loads(text)
    except (KeyError, ValueError):
        facts = None
    if not isinstance(facts, dict):
        raise DataError(f"the file '{path}' is no checkpoint of this version of quickbloom")
    if metadata.get("sha256") != _checksum(tensors, text):
        raise DataError(f"the checkpoint '{path}' is damaged: its content does not have the checksum that it was written with")
    return Checkpoint(path, tensors, facts)


def _checksum(tensors: dict[str, Tensor], facts: str) -> str:
    """SHA-256 of everything that a checkpoint says: it finds damage, not somebody who computes it anew."""
    digest = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"\n{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
