"""Multi-layer perceptron with ReLU, with or without layer normalisation. Inputs of any shape are flattened."""

from itertools import pairwise
from math import prod
from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from quickbloom.common.models.base import Model, parse_sizes
from quickbloom.common.options import Options, Text


class MlpOptions(Options):
    hidden: Text = Field("64,64", description="sizes of the hidden layers, with commas between them")
    norm: Literal["layer", "none"] = Field("none", description="layer: normalise every hidden layer before its ReLU")


class Mlp(Model):
    """Flatten, then Linear and ReLU for every hidden size, then Linear to the outputs."""

    name = "mlp"
    Options: ClassVar[type[Options]] = MlpOptions

    @classmethod
    def build(cls, options: MlpOptions, input_shape: tuple[int, ...], outputs: int, tokens: int = 0) -> nn.Module:
        return perceptron(
            (prod(input_shape), *parse_sizes("mlp.hidden", options.hidden), outputs), norm=options.norm == "layer"
        )


def perceptron(sizes: tuple[int, ...], *, norm: bool = False) -> nn.Sequential:
    """Return linear layers between consecutive `sizes` with ReLU between them; the input is flattened first.

    `norm`: with a layer normalisation before every ReLU.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        if i > 0:
            layers += [nn.LayerNorm(fan_in)] * norm + [nn.ReLU()]
        layers.append(nn.Linear(fan_in, fan_out))
    return nn.Sequential(*layers)
