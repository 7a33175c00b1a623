"""A user's own encoder: "module:factory" names a function without arguments.

It returns a `torch.nn.Module` from pictures [n, 3, height, width] or numbers [n, columns] to features [n, size], or an object
with a method `encode(texts) -> array [n, size]`, as those of sentence-transformers are. A module may say with the attributes
`input_size` ((channels, height, width), or (columns,)), `mean` and `std` what it reads; else it reads pictures as ImageNet's.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import nn

from quickbloom.common.encoders.base import Encoder, Features, digest_of, of_probe, sources
from quickbloom.common.encoders.module import ModuleEncoder, weights_digest
from quickbloom.common.encoders.pictures import Normalising
from quickbloom.common.errors import ConfigError, in_one_line
from quickbloom.common.system.user_code import import_own

_PROBE = ("the quick brown fox jumps over the lazy dog", "turn the lamp on", "Wie wird das Wetter morgen?", "37.5 \u00b0C", "a")


class OwnTextEncoder(Encoder):
    """An object with a method `encode`."""

    kind = "text"

    def __init__(self, found: Any, what: str, factory: Any) -> None:
        self._found = found
        weights = weights_digest(found.state_dict()) if isinstance(found, nn.Module) else ""
        self.digest = digest_of({"weights": weights, "name": what}, *sources(factory, type(found)))
        try:
            self.size = int(self.encode(["a", "b"]).shape[1])
        except Exception as error:  # the user's code may raise anything
            raise ConfigError(
                f"the encoder '{what}' must have a method encode(texts) that returns an array [n, size], but it raised "
                f"{in_one_line(error)}"
            ) from error

    @cached_property
    def stored_as(self) -> str:
        return of_probe(self, _PROBE)

    def encode(self, examples: Sequence[Any]) -> Features:
        return np.asarray(self._found.encode(list(examples)), dtype=np.float32)


def load(name: str, pooling: str) -> Encoder:
    """Return the encoder that "module:factory" makes. Raises ConfigError for any failure."""
    module_name, _, attribute = name.partition(":")
    try:
        factory = getattr(import_own(module_name), attribute)
        found = factory()
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(
            f"`encoder={name}` must name a function without arguments in a module that can be imported, but that raised "
            f"{in_one_line(error)}; it may also be onnx:FILE, sentence:DIRECTORY or timm:NAME"
        ) from error
    if callable(getattr(found, "encode", None)):
        return OwnTextEncoder(found, name, factory)
    if not isinstance(found, nn.Module):
        raise ConfigError(
            f"`encoder={name}` must return a torch.nn.Module, or an object with a method `encode`, got a {type(found).__name__}"
        )
    return ModuleEncoder(found, name, pooling, _reads(found), factory)


def _reads(module: nn.Module) -> Normalising | int:
    """Return what a module reads, by its attributes."""
    size = getattr(module, "input_size", None)
    if isinstance(size, int) or (isinstance(size, tuple | list) and len(size) == 1):
        return size if isinstance(size, int) else int(size[0])
    usual = Normalising()
    if not isinstance(size, tuple | list) or len(size) != 3:
        return usual
    channels, side = int(size[0]), int(size[1])
    found = replace(usual, side=side, resize=side, channels=channels)
    mean, deviation = (tuple(map(float, getattr(module, name, None) or ())) for name in ("mean", "std"))
    if channels == 1:
        found = replace(found, mean=(0.0,), deviation=(1.0,))
    return replace(found, mean=mean or found.mean, deviation=deviation or found.deviation)
