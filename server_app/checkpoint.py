"""Checkpoints: one safetensors file each, written whole or not at all.

The tensors are the meta-parameters (`meta/...`) and the outer optimizer's state (`outer/...`); the file's metadata say which
run, round and settings they belong to.
"""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.errors import DataError

_KEEP = 3


def save(directory: Path, server_round: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Path:
    """Write the checkpoint of a round and remove all but the newest few. A crash at any moment leaves the older ones whole."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"round-{server_round:06d}.safetensors"
    temporary = path.with_suffix(".partial")
    metadata = {"format": "quickbloom-1", "facts": json.dumps({**facts, "round": server_round})}
    save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, metadata=metadata)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    for old in sorted(directory.glob("round-*.safetensors"))[:-_KEEP]:
        old.unlink()
    return path


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, facts) of a checkpoint file, or of the newest one in a run directory. Raises DataError."""
    if path.is_dir():
        found = sorted(path.glob("checkpoints/round-*.safetensors")) or sorted(path.glob("round-*.safetensors"))
        if not found:
            raise DataError(f"the directory '{path}' holds no checkpoint: name a run directory or a .safetensors file")
        path = found[-1]
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise DataError(f"the checkpoint '{path}' cannot be read ({error})") from error
    try:
        facts = json.loads(metadata["facts"]) if metadata.get("format") == "quickbloom-1" else None
    except (KeyError, ValueError):
        facts = None
    if not isinstance(facts, dict):
        raise DataError(f"the file '{path}' is no checkpoint of this program")
    return tensors, facts
