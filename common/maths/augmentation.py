"""Images that vary in training: each is shifted by some pixels and mirrored at random, once for every draw of its task.

What comes in from outside repeats the border, since only the data know which value means nothing there.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.batch import Batch, TaskData


@dataclass(frozen=True)
class Augmentation:
    """`shift`: most pixels up, down, left and right; `flip`: half of the images are mirrored from left to right."""

    shift: int = 0
    flip: bool = False

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
        return batch._replace(x=batch.x[image, :, row, column].permute(0, 3, 1, 2).contiguous())


@lru_cache(maxsize=8)
def read_augmentation(text: str) -> Augmentation | None:
    """Return what `augment` names, such as "shift:2,flip"; None for "". Raises ConfigError."""
    if not text:
        return None
    shift, flip = 0, False
    for part in (part.strip() for part in text.split(",")):
        number = re.fullmatch(r"shift:([1-9][0-9]{0,3})", part, re.ASCII)
        if number and not shift:
            shift = int(number[1])
        elif part == "flip" and not flip:
            flip = True
        else:
            raise ConfigError(f'`augment` must be "", "shift:2" for up to 2 pixels, "flip", or "shift:2,flip", got {text!r}')
    return Augmentation(shift, flip)
