"""One linear layer: logistic or linear regression, and the smallest model for tests."""

from math import prod
from typing import ClassVar

from torch import nn

from quickbloom.common.models.base import Model
from quickbloom.common.models.mlp import perceptron
from quickbloom.common.options import Options


class LinearOptions(Options):
    """No settings."""


class Linear(Model):
    """Flatten, then one Linear layer to the outputs."""

    name = "linear"
    Options: ClassVar[type[Options]] = LinearOptions

    @classmethod
    def build(cls, options: LinearOptions, input_shape: tuple[int, ...], outputs: int, tokens: int = 0) -> nn.Module:
        return perceptron((prod(input_shape), outputs))
