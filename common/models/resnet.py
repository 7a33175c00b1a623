"""A small residual network for small images (He, Zhang, Ren, Sun 2016, "Deep Residual Learning for Image Recognition").

A 3x3 convolution is followed by blocks of two 3x3 convolutions with a skip connection, which is a
1x1 convolution where the number of channels changes. Max-pooling halves the resolution before every
block. There is no global average pooling, because the position of a stroke distinguishes
characters.
"""

from itertools import pairwise
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from quickbloom.common.errors import ConfigError
from quickbloom.common.models.base import Model, parse_sizes
from quickbloom.common.models.norms import NORM, Norm, norm_layers
from quickbloom.common.options import Options, Text


class ResNetOptions(Options):
    channels: Text = Field(
        "32,64,128,128", description="channels of the first convolution and of every block, with commas between them"
    )
    norm: Norm = Field("group", description=NORM)


class ResNet(Model):
    """The first convolution, a residual block for every further number of channels, then Linear to the outputs."""

    name = "resnet"
    Options: ClassVar[type[Options]] = ResNetOptions

    @classmethod
    def build(cls, options: ResNetOptions, input_shape: tuple[int, ...], outputs: int, tokens: int = 0) -> nn.Module:
        channels = parse_sizes("resnet.channels", options.channels)
        if not channels:
            raise ConfigError("`resnet.channels` must have at least one number, such as '32,64', got ''")
        smallest = 2 ** max(1, len(channels) - 1)
        if len(input_shape) != 3 or min(input_shape[1:]) < smallest:
            raise ConfigError(
                f'`model = "resnet"` with {len(channels)} `channels` needs images of shape (channels, height, width) of at '
                f"least {smallest} x {smallest} pixels, got inputs of shape {input_shape}: give fewer `channels`, or choose "
                '`model = "mlp"`'
            )
        first = nn.Conv2d(input_shape[0], channels[0], 3, padding=1, bias=options.norm == "none")
        layers: list[nn.Module] = [first, *norm_layers(options.norm, channels[0]), nn.ReLU()]
        for before, after in pairwise(channels):
            layers += [nn.MaxPool2d(2, ceil_mode=True), _Block(options.norm, before, after)]
        body = nn.Sequential(*layers, nn.Flatten())
        with torch.no_grad():
            features = body(torch.zeros(2, *input_shape)).shape[1]
        return nn.Sequential(body, nn.Linear(features, outputs))


class _Block(nn.Module):
    """ReLU(x + f(x)), where f is convolution, normalisation, ReLU, convolution, normalisation."""

    def __init__(self, norm: Norm, before: int, after: int) -> None:
        super().__init__()
        bias = norm == "none"  # a normalisation layer already has a bias
        self.residual = nn.Sequential(
            nn.Conv2d(before, after, 3, padding=1, bias=bias),
            *norm_layers(norm, after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1, bias=bias),
            *norm_layers(norm, after),
        )
        self.around = nn.Identity() if before == after else nn.Conv2d(before, after, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.around(x) + self.residual(x))
