"""A small frozen encoder inside a checkpoint or a personal model, so that a device needs no other file.

Only an encoder in an ONNX file is carried, with its tokenizer or its preparation of pictures: its files as plain bytes,
`encoder/NAME`. They are data: nothing of them is unpickled or run as code, names of other files and weights outside the file
are refused, and what they compute must have the SHA-256 of the training, as that of any other encoder.
"""

import hashlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from quickbloom.common.datasets.own import OwnOptions
from quickbloom.common.datasets.own.columns import Schema
from quickbloom.common.encoders import is_code, load_encoder
from quickbloom.common.encoders.base import existing
from quickbloom.common.encoders.onnx_file import MODEL, PARTS, OnnxEncoder
from quickbloom.common.errors import ConfigError, DataError, as_told, in_one_line
from quickbloom.common.personal.checkpoint import ENCODER
from quickbloom.common.personal.trust import check_encoder
from quickbloom.common.system import private
from quickbloom.common.system.whole_files import replacing

SMALL = 8 * 2**20
"""Bytes up to which an encoder is carried by itself."""
_FOLDER = "encoders"


def packed(options: OwnOptions, schema: Schema) -> dict[str, Tensor]:
    """Return the files of the encoder as tensors to write beside others; {} if it is not to be carried.

    `schema`: what all nodes agreed on; another encoder than theirs is not carried. Raises ConfigError if it is not here.
    """
    if not options.encoder.startswith("onnx:") or options.carry_encoder is False:
        return {}
    encoder = load_encoder(options.encoder, options.encoder_pooling)
    if not isinstance(encoder, OnnxEncoder) or encoder.digest != schema.encoder.get("digest"):
        return {}
    files = encoder.parts
    if options.carry_encoder == "auto" and sum(file.stat().st_size for file in files.values()) > SMALL:
        return {}
    return {
        f"{ENCODER}{name}": torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8) for name, file in files.items()
    }


def place_of(found: Mapping[str, Tensor], encoder: str, trust: Collection[str], what: str) -> str:
    """Return which encoder a file is used with: the one that it carries, put into this user's cache, else `encoder`.

    `found`: see `Checkpoint.encoder`; `what`: "the checkpoint 'a.safetensors'". Raises DataError for a file that carries
    something else than an encoder, and ConfigError if there is none, or one that is code and not in `trust`.
    """
    if found:
        return f"onnx:{_unpacked(found, what)}"
    check_encoder(encoder, trust, what)
    kind, _, path = encoder.partition(":")
    if encoder and not is_code(encoder) and kind != "timm":
        try:
            existing(encoder, path)
        except ConfigError:
            raise ConfigError(
                f"{what} carries no encoder, since only one in an ONNX file is carried, of at most {SMALL // 2**20} MB unless "
                f"`own.carry-encoder` was true in the training, and '{as_told(encoder, 200)}' is not here: say with "
                "`--encoder` where it is"
            ) from None
    return encoder


def _unpacked(found: Mapping[str, Tensor], what: str) -> Path:
    """Write the files into a folder named by their content, and return the place of the model."""
    if MODEL not in found:
        raise DataError(f"{what} carries an encoder without the file `{MODEL}`: make it anew")
    total = hashlib.sha256()
    content: dict[str, bytes] = {}
    for name in sorted(found):
        value = found[name]
        if name not in PARTS or value.dtype != torch.uint8 or value.ndim != 1:
            raise DataError(f"{what} carries a file `{as_told(name, 60)}` that no encoder has: make it anew")
        content[name] = value.numpy().tobytes()
        total.update(f"{name} {len(content[name])}\n".encode() + content[name])
    try:
        folder = private.folder(_FOLDER) / total.hexdigest()
        for name, one in content.items():
            place = folder / name
            if not place.is_file() or place.read_bytes() != one:
                place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                # Of this process alone: another one may unpack the same.
                with replacing(place, place.with_name(f"{place.name}.{os.getpid()}"), mode=0o600) as partial:
                    partial.write_bytes(one)
    except OSError as error:
        raise ConfigError(
            f"the encoder that {what} carries cannot be put into this user's cache ({in_one_line(error)}): make room there, or "
            "say with `--encoder` where it is"
        ) from None
    return folder / MODEL
