"""Four convolution blocks, the standard network of few-shot image classification (Vinyals et al. 2016; Finn et al. 2017).

A block is a 3x3 convolution, a normalisation without running state, ReLU, and halving of the resolution by a stride of 2 (as
MAML does for Omniglot) or by max-pooling.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from quickbloom.common.errors import ConfigError
from quickbloom.common.models.base import Model
from quickbloom.common.models.norms import NORM, Norm, norm_layers
from quickbloom.common.options import Options

SMALLEST_SIDE = 8
"""Smallest height and width of an image, in pixels."""


class Conv4Options(Options):
    filters: int = Field(64, ge=1, le=1024, description="channels of every block")
    downsample: Literal["stride", "max-pool"] = Field("stride", description="how a block halves the resolution")
    norm: Norm = Field("group", description=NORM)


class Conv4(Model):
    """Four blocks, then Linear from the flattened features to the outputs."""

    name = "conv4"
    Options: ClassVar[type[Options]] = Conv4Options

    @classmethod
    def build(cls, options: Conv4Options, input_shape: tuple[int, ...], outputs: int, tokens: int = 0) -> nn.Module:
        if len(input_shape) != 3 or min(input_shape[1:]) < SMALLEST_SIDE:
            raise ConfigError(
                f'`model = "conv4"` needs images of shape (channels, height, width) of at least {SMALLEST_SIDE} x '
                f'{SMALLEST_SIDE} pixels, got inputs of shape {input_shape}: choose `model = "mlp"`'
            )
        channels = input_shape[0]
        blocks: list[nn.Module] = []
        for _ in range(4):
            blocks.append(_block(options, channels))
            channels = options.filters
        body = nn.Sequential(*blocks, nn.Flatten())
        with torch.no_grad():
            features = body(torch.zeros(2, *input_shape)).shape[1]
        return nn.Sequential(body, nn.Linear(features, outputs))


def _block(options: Conv4Options, channels: int) -> nn.Sequential:
    strided = options.downsample == "stride"
    layers: list[nn.Module] = [nn.Conv2d(channels, options.filters, 3, stride=2 if strided else 1, padding=1)]
    layers += norm_layers(options.norm, options.filters)
    layers.append(nn.ReLU())
    if not strided:
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    return nn.Sequential(*layers)
