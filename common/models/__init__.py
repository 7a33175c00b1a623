"""Registry of the models by name. A new one is a file with a subclass of `Model`, and one line here."""

from functools import partial
from typing import Any

import torch
from torch import nn

from quickbloom.common import registries
from quickbloom.common.models.base import Model
from quickbloom.common.models.factory import is_own_model, own_factory
from quickbloom.common.randomness import generator

MODELS: dict[str, type[Model]] = registries.load(
    __name__,
    "mlp",
    "conv4",
    "cnn",
    "resnet",
    "sine",
    "linear",
    "residual",
    "lstm",
    "transformer",
)


def build_model(name: str, options: Any, input_shape: tuple[int, ...], outputs: int, seed: int, tokens: int = 0) -> nn.Module:
    """Return the model `name`, initialised from `seed` alone; the global random state is neither read nor changed.

    A user's model ("module:factory") has no options. Raises ConfigError if it cannot be built for
    these shapes.
    """
    with torch.random.fork_rng(devices=[]):
        # Imported before the seed is set: importing may draw numbers, and happens only once in a process.
        build = own_factory(name) if is_own_model(name) else partial(MODELS[name].build, options, tokens=tokens)
        torch.manual_seed(int(generator(seed, "model").integers(2**62)))
        return build(input_shape, outputs)


__all__ = ["MODELS", "Model", "build_model", "is_own_model"]
