"""Small modules built as pretrained ones are: batch norm with running statistics, dropout, a frozen body."""

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """The basic block of ResNet-18."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.downsample(x)
        result: Tensor = self.relu(out)
        return result


class Inverted(nn.Module):
    """The block of EfficientNet-Lite: expansion, depthwise convolution, projection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 2 * channels
        self.expand = nn.Sequential(nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(inplace=True))
        self.depth = nn.Sequential(
            nn.Conv2d(wide, wide, 3, 1, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.SiLU(inplace=True)
        )
        self.project = nn.Sequential(nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.project(self.depth(self.expand(x)))
        return result


def _pretrained(body: nn.Sequential, features: int, outputs: int) -> nn.Module:
    """A frozen body with statistics of its own, and a head that is trained."""
    draw = torch.Generator().manual_seed(5)
    for layer in body.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.normal_(0, 0.3, generator=draw)
            layer.running_var.uniform_(0.5, 1.5, generator=draw)
    body.requires_grad_(False)
    return nn.Sequential(body, nn.Dropout(0.2), nn.Linear(features, 8), nn.Tanh(), nn.Linear(8, outputs))


def resnet(input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    """Like ResNet-18: `model = "pretrained_like:resnet"`."""
    stem = [nn.Conv2d(input_shape[0], 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
    body = nn.Sequential(*stem, Residual(4, 4, 1), Residual(4, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return _pretrained(body, 8, outputs)


def efficientnet(input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    """Like EfficientNet-Lite0: `model = "pretrained_like:efficientnet"`."""
    stem = [nn.Conv2d(input_shape[0], 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU6(inplace=True)]
    body = nn.Sequential(*stem, Inverted(4), Inverted(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return _pretrained(body, 4, outputs)
