"""Pictures as an encoder of images reads them: resized, cropped and normalised by its own configuration."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of pixels 0..1, as most published models of images expect them."""
_DEFAULT_SIDE = 224


@dataclass(frozen=True)
class Normalising:
    """How pictures become inputs: the shorter side is scaled to `resize`, the middle `side` x `side` is cut out.

    `channels`: 3, or 1 for grey. `mean`, `deviation`: of every channel, of pixels 0..1.
    """

    side: int = _DEFAULT_SIDE
    resize: int = _DEFAULT_SIDE
    channels: int = 3
    mean: tuple[float, ...] = IMAGENET_MEAN
    deviation: tuple[float, ...] = IMAGENET_DEVIATION

    @classmethod
    def of_config(cls, config: Mapping[str, Any], side: int = 0, channels: int = 3) -> "Normalising":
        """Return what a `preprocessor_config.json` says. `side`: what the model itself needs; 0: any."""
        crop = _side(config.get("crop_size")) if config.get("do_center_crop", True) else 0
        resize = _side(config.get("size")) or side or crop or _DEFAULT_SIDE
        side = side or crop or resize
        plain = config.get("do_normalize") is False
        mean = (0.0,) * 3 if plain else tuple(map(float, config.get("image_mean") or IMAGENET_MEAN))
        deviation = (1.0,) * 3 if plain else tuple(map(float, config.get("image_std") or IMAGENET_DEVIATION))
        if channels == 1:
            mean, deviation = (sum(mean) / len(mean),), (sum(deviation) / len(deviation),)
        return cls(side, max(resize, side), channels, mean, deviation)

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain numbers and lists."""
        return asdict(self)

    def inputs(self, pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Return float32 [n, channels, side, side] from pictures uint8 [height, width, 3]."""
        return torch.stack([self._one(picture) for picture in pictures])

    def _one(self, picture: NDArray[np.uint8]) -> Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1).float() / 255
        scale = self.resize / min(pixels.shape[1:])
        size = [max(self.side, round(length * scale)) for length in pixels.shape[1:]]
        if list(pixels.shape[1:]) != size:
            pixels = functional.interpolate(pixels[None], size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)
        top, left = ((length - self.side) // 2 for length in size)
        pixels = pixels[:, top : top + self.side, left : left + self.side]
        if self.channels == 1:
            pixels = (pixels * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=0, keepdim=True)
        mean, deviation = torch.tensor(self.mean), torch.tensor(self.deviation)
        return (pixels - mean[:, None, None]) / deviation[:, None, None]


def _side(size: Any) -> int:
    """Return the side in pixels that a configuration gives as a number, or by name; 0: it gives none."""
    if isinstance(size, Mapping):
        size = size.get("shortest_edge") or size.get("height") or 0
    return int(size) if isinstance(size, int | float) and not isinstance(size, bool) else 0
