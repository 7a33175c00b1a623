"""Checkpoint files: safetensors with the facts as JSON beside the tensors, written whole or not at all, never read wrongly.

The server writes them (`server_app.runs.checkpoints` says which tensors there are); anybody may read one: it says which run,
round and settings it belongs to, and what the data must look like. A checksum over all of it finds damage. Nothing is
unpickled."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quickbloom.common.errors import DataError

OnDamage = Callable[[str], None]

CHECKPOINT = "quickbloom-2"
"""The form of a checkpoint, as its file names it."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds. `facts`: "round", "config" and whatever else was saved with it."""

    path: Path
    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    @property
    def meta(self) -> dict[str, Tensor]:
        """The meta-parameters."""
        return {name.removeprefix("meta/"): value for name, value in self.tensors.items() if name.startswith("meta/")}


def load(path: Path, on_damage: OnDamage) -> Checkpoint:
    """A checkpoint file, or the newest usable one of a run directory. Raises DataError.

    `on_damage` is told, in one sentence, of a damaged file for which an older one stands in.
    """
    if not path.is_dir():
        return read(path, CHECKPOINT, "checkpoint")
    found = sorted(path.glob("checkpoints/round-*.safetensors")) or sorted(path.glob("round-*.safetensors"))
    if not found:
        raise DataError(f"the directory '{path}' holds no checkpoint: name a run directory or a .safetensors file")
    reasons: list[str] = []
    for file in reversed(found):
        try:
            checkpoint = read(file, CHECKPOINT, "checkpoint")
        except DataError as error:
            reasons.append(str(error))
            continue
        if reasons:
            on_damage(f"Checkpoint {checkpoint.path} is used in place of a newer one: {'; '.join(reasons)}")
        return checkpoint
    raise DataError(f"no checkpoint in '{path}' can be used: {'; '.join(reasons)}")


def read(path: Path, form: str, what: str) -> Checkpoint:
    """A file of the given form. `what`: what that is called, for the sentence of the DataError."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise DataError(f"the {what} '{path}' cannot be read ({error})") from error
    try:
        text = metadata["facts"] if metadata.get("format") == form else ""
        facts = json.loads(text)
    except (KeyError, ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise DataError(f"the file '{path}' is no {what} of this version of quickbloom")
    if metadata.get("sha256") != _checksum(tensors, text):
        raise DataError(f"the {what} '{path}' is damaged: its content does not have the checksum that it was written with")
    return Checkpoint(path, tensors, facts)


def write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], form: str = CHECKPOINT, *, wait: bool) -> None:
    """Write a file that `read` reads; a crash at any moment leaves what was there. `wait`: until it is on the disk.

    Raises OSError or SafetensorError, such as for a disk that is full; then nothing has changed.
    """
    text = json.dumps(facts)
    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata = {"format": form, "facts": text, "sha256": _checksum(whole, text)}
    temporary = path.with_suffix(".partial")
    try:
        save_file(whole, temporary, metadata=metadata)
        temporary.chmod(0o600)
        if wait:
            _sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if wait:
        _sync(path.parent)


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
