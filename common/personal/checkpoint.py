"""Checkpoint files: safetensors with facts as JSON beside the tensors, written atomically and verified when read.

The server writes them (`server_app.runs.checkpoints` lists the tensors). Any program can read one:
it names its run, round and settings, and the form of the data. A checksum over everything detects
damage. Nothing is unpickled.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quickbloom.common.errors import DataError
from quickbloom.common.system.whole_files import replacing

OnDamage = Callable[[str], None]

CHECKPOINT = "quickbloom-2"
"""Format of a checkpoint, as written in its file."""
ENCODER = "encoder/"
"""Begin of the names of an encoder's files among the tensors, see `common.personal.carried`."""


@dataclass(frozen=True)
class Checkpoint:
    """Content of a checkpoint file. `facts`: "round", "config" and whatever else was saved with it."""

    path: Path
    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    @property
    def meta(self) -> dict[str, Tensor]:
        """The meta-parameters by name."""
        return self._named("meta/")

    @property
    def encoder(self) -> dict[str, Tensor]:
        """The files of the encoder that it carries, by their names; {} for none."""
        return self._named(ENCODER)

    def _named(self, begin: str) -> dict[str, Tensor]:
        return {name.removeprefix(begin): value for name, value in self.tensors.items() if name.startswith(begin)}


def load(path: Path, on_damage: OnDamage) -> Checkpoint:
    """Return the checkpoint in a file, or the newest usable one of a run directory. Raises DataError.

    `on_damage` is called with one sentence if an older file replaces a damaged one.
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
    """Return the content of a file of the given format. Raises DataError; `what` names the kind of file in its message."""
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
    """Write a file for `read`, atomically. `wait`: return only once it is on the disk.

    Raises OSError or SafetensorError, for example on a full disk; then nothing has changed.
    """
    text = json.dumps(facts)
    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata = {"format": form, "facts": text, "sha256": _checksum(whole, text)}
    with replacing(path, mode=0o600, wait=wait) as partial:
        save_file(whole, partial, metadata=metadata)


def _checksum(tensors: dict[str, Tensor], facts: str) -> str:
    """Return the SHA-256 of a checkpoint's content. It detects damage, not deliberate changes."""
    digest = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"\n{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
