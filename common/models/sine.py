"""The regression network of MAML's sinusoid experiment: two hidden layers of 40 ReLU units (Finn et al. 2017, s. 5.1)."""

from math import prod
from typing import ClassVar

from torch import nn

from quickbloom.common.models.base import Model
from quickbloom.common.models.mlp import perceptron
from quickbloom.common.options import Options


class SineOptions(Options):
    """No settings: the paper's network is fixed."""


class Sine(Model):
    """Linear 40, ReLU, Linear 40, ReLU, Linear to the outputs."""

    name = "sine"
    Options: ClassVar[type[Options]] = SineOptions

    @classmethod
    def build(cls, options: SineOptions, input_shape: tuple[int, ...], outputs: int, tokens: int = 0) -> nn.Module:
        return perceptron((prod(input_shape), 40, 40, outputs))
