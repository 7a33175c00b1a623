"""Frozen encoders: pretrained models that turn texts, pictures or rows of numbers into features, and are never trained.

A new kind is a file with a subclass of `Encoder`, and one line in `KINDS`. A node encodes its examples once (`encode_all`);
everything after works as it does on numbers.
"""

from functools import lru_cache
from importlib import import_module

from quickbloom.common.encoders.base import Encoder
from quickbloom.common.errors import ConfigError

KINDS = {"onnx": "onnx_file", "sentence": "sentence", "timm": "timm_model"}
"""Modules by what stands before the colon; any other name is that of a user's own module."""
POOLINGS = ("auto", "mean", "class", "last")


def is_code(setting: str) -> bool:
    """Return whether an encoder is a user's own code, and not a file of weights or a published model."""
    return setting.partition(":")[0] not in KINDS


@lru_cache(maxsize=4)
def load_encoder(setting: str, pooling: str = "auto") -> Encoder:
    """Return the encoder that a setting names: "onnx:FILE", "sentence:DIRECTORY", "timm:NAME" or "module:factory".

    It is loaded once per process. Raises ConfigError. `pooling`: see `pooling.py`.
    """
    kind, _, what = setting.partition(":")
    if not what:
        raise ConfigError(
            f"`encoder` must be onnx:FILE, sentence:DIRECTORY, timm:NAME or module:factory, got '{setting}': put one of these "
            "words before the name"
        )
    if pooling not in POOLINGS:
        raise ConfigError(f"`own.encoder-pooling` must be one of {', '.join(POOLINGS)}, got '{pooling}'")
    module = import_module(f"quickbloom.common.encoders.{KINDS.get(kind, 'own_module')}")
    found: Encoder = module.load(what if kind in KINDS else setting, pooling)
    return found


__all__ = ["Encoder", "is_code", "load_encoder"]
