"""The convolutional network of federated averaging (McMahan et al. 2017, section 3), which papers on personalisation share.

Two 5x5 convolutions of 32 and 64 channels, each with ReLU and 2x2 max-pooling, a layer of 512 units, and the outputs. The
benchmarks of personalised federated learning (PFLlib, Zhang et al. 2025, its 4-layer CNN) leave the images unpadded.
"""

from typing import ClassVar

import torch
from pydantic import Field
from torch import nn

from quickbloom.common.errors import ConfigError
from quickbloom.common.models.base import Model
from quickbloom.common.options import Options


class CnnOptions(Options):
    filters: int = Field(32, ge=1, le=512, description="channels of the first convolution; the second has twice as many")
    units: int = Field(512, ge=1, le=8192, description="units of the layer before the outputs")
    padding: int = Field(0, ge=0, le=2, description="pixels of zeros around the images and the channels; 2 keeps their size")


class Cnn(Model):
    """Two convolutions with pooling, one hidden layer, then Linear to the outputs."""

    name = "cnn"
    Options: ClassVar[type[Options]] = CnnOptions

    @classmethod
    def build(cls, options: CnnOptions, input_shape: tuple[int, ...], outputs: int, tokens: int = 0) -> nn.Module:
        smallest = 16 - 6 * options.padding
        if len(input_shape) != 3 or min(input_shape[1:]) < smallest:
            raise ConfigError(
                f'`model = "cnn"` needs images of shape (channels, height, width) of at least {smallest} x {smallest} pixels '
                f"with `cnn.padding = {options.padding}`, got inputs of shape {input_shape}: set `cnn.padding` to 2, or choose "
                '`model = "mlp"`'
            )
        first, second = options.filters, 2 * options.filters
        convolutions = nn.Sequential(
            nn.Conv2d(input_shape[0], first, 5, padding=options.padding),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(first, second, 5, padding=options.padding),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        with torch.no_grad():
            features = convolutions(torch.zeros(1, *input_shape)).shape[1]
        return nn.Sequential(
            convolutions, nn.Sequential(nn.Linear(features, options.units), nn.ReLU()), nn.Linear(options.units, outputs)
        )
