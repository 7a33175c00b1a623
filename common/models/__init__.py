"""The models by name."""

from typing import Any

import torch
from torch import nn

from common.models.base import Model
from common.models.conv4 import Conv4
from common.models.linear import Linear
from common.models.lstm import Lstm
from common.models.mlp import Mlp
from common.models.sine import Sine
from common.randomness import generator

MODELS: dict[str, type[Model]] = {model.name: model for model in (Mlp, Conv4, Sine, Linear, Lstm)}


def build_model(name: str, options: Any, input_shape: tuple[int, ...], outputs: int, seed: int) -> nn.Module:
    """The model `name`, initialised from `seed` alone: the global random state is neither read nor changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(generator(seed, "model").integers(2**62)))
        return MODELS[name].build(options, input_shape, outputs)
