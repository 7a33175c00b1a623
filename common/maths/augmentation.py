"""Images that vary in training: shifted by some pixels, mirrored and turned at random, once for every draw of their task.

What comes in from outside repeats the border, since only the data know which value means nothing there.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.batch import Batch, TaskData


@dataclass(frozen=True)
class Augmentation:
    """What is done to each image, in this order: mirrored from left to right, shifted, turned.

    `shift`: most pixels up, down, left and right; `flip`: half of the images are mirrored; `rotate`: most degrees either way.
    """

    shift: int = 0
    flip: bool = False
    rotate: int = 0

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise ConfigError unless examples of this shape are images [channels, height, width] that leave room for it."""
        if len(shape) != 3:
            raise ConfigError(
                f'`augment` must be "" for examples of shape {shape}, which are no images [channels, height, width]: leave it '
                "out, or see `own.encoder-views` for pictures behind an encoder"
            )
        if self.shift >= min(shape[1:]):
            raise ConfigError(
                f"the shift of `augment` must be below {min(shape[1:])}, the shorter side of these images, got {self.shift}"
            )

    def of(self, data: TaskData, rng: np.random.Generator) -> TaskData:
        """Return the draw of a training task with other support and query images; the test part stays as it is."""
        return TaskData(self._varied(data.support, rng), self._varied(data.query, rng), data.test)

    def _varied(self, batch: Batch, rng: np.random.Generator) -> Batch:
        n, (height, width) = batch.x.shape[0], batch.x.shape[2:]
        down, right = rng.integers(-self.shift, self.shift + 1, size=(2, n, 1))
        mirrored = rng.random((n, 1)) < 0.5 if self.flip else np.zeros((n, 1), dtype=bool)
        # Where each row and each column of the new image comes from.
        rows = (np.arange(height) - down).clip(0, height - 1)
        columns = (np.arange(width) - right).clip(0, width - 1)
        columns = np.where(mirrored, width - 1 - columns, columns)
        image, row, column = (
            torch.arange(n)[:, None, None],
            torch.from_numpy(rows)[:, :, None],
            torch.from_numpy(columns)[:, None],
        )
        x = batch.x[image, :, row, column].permute(0, 3, 1, 2).contiguous()
        if self.rotate:
            x = turned(x, torch.from_numpy(rng.uniform(-self.rotate, self.rotate, size=n)))
        return batch._replace(x=x)


def turned(x: Tensor, degrees: Tensor) -> Tensor:
    """Return images [n, channels, height, width], each turned about its centre, anticlockwise, by `degrees` [n].

    Pixels are interpolated linearly.
    """
    n, _, height, width = x.shape
    if not n:
        return x
    angles = degrees.to(torch.float64).deg2rad()[:, None, None]
    down = torch.arange(height, dtype=torch.float64)[None, :, None] - (height - 1) / 2
    right = torch.arange(width, dtype=torch.float64)[None, None] - (width - 1) / 2
    # Where each pixel comes from, seen from the centre; rows count downwards.
    from_right, from_down = angles.cos() * right - angles.sin() * down, angles.sin() * right + angles.cos() * down
    # The outer borders of an image are at -1 and 1.
    places = torch.stack([from_right * (2 / width), from_down * (2 / height)], dim=-1)
    return grid_sample(x, places.to(x.dtype), mode="bilinear", padding_mode="border", align_corners=False)


@lru_cache(maxsize=8)
def read_augmentation(text: str) -> Augmentation | None:
    """Return what `augment` names, such as "shift:2,flip,rotate:10"; None for "". Raises ConfigError."""
    if not text:
        return None
    found: dict[str, int] = {}
    for part in (part.strip() for part in text.split(",")):
        name = part.partition(":")[0]
        number = re.fullmatch(_NUMBERED[name], part, re.ASCII) if name in _NUMBERED else None
        if name in found or not (number or part == "flip"):
            raise ConfigError(
                '`augment` must be "", "shift:2" for up to 2 pixels, "flip", "rotate:10" for up to 10 degrees, or several with '
                f"commas between them, got {text!r}"
            )
        found[name] = int(number[1]) if number else 1
    if found.get("rotate", 0) > _HALF_TURN:
        raise ConfigError(f"the turn of `augment` must be at most {_HALF_TURN} degrees either way, got {found['rotate']}")
    return Augmentation(found.get("shift", 0), "flip" in found, found.get("rotate", 0))


_NUMBERED = {"shift": "shift:([1-9][0-9]{0,3})", "rotate": "rotate:([1-9][0-9]{0,2})"}
_HALF_TURN = 180
