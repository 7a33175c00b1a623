"""Pictures for an encoder, which reads them in its own size and in colour: they are decoded only when they are encoded."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quickbloom.common.datasets.own.text import Array
from quickbloom.common.encoders.encoding import Examples, hash_of

Picture = NDArray[np.uint8]
_LEAST_AREA = 0.5
"""Least share of a picture's area that a cut of it shows."""


class Pictures(ABC):
    """A column of pictures."""

    ndim = 1

    @abstractmethod
    def __len__(self) -> int:
        """Return their number."""

    @abstractmethod
    def key(self, at: int) -> bytes:
        """Return a hash of a picture's content: 16 bytes."""

    @abstractmethod
    def get(self, at: int, shorter: int) -> Picture:
        """Return a picture as uint8 [height, width, 3], its shorter side at most about `shorter` pixels. Raises DataError."""

    @abstractmethod
    def place(self, at: int) -> str:
        """Return where a picture stands, for a message."""

    @abstractmethod
    def take(self, rows: Array) -> "Pictures":
        """Return the column restricted to `rows`."""


class PictureFiles(Pictures):
    """Pictures in files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def key(self, at: int) -> bytes:
        return hash_of(self._files[at].read_bytes())

    def get(self, at: int, shorter: int) -> Picture:
        from quickbloom.common.datasets.own.files.images import read_picture

        return read_picture(self._files[at], shorter)

    def place(self, at: int) -> str:
        return f"'{self._files[at]}'"

    def take(self, rows: Array) -> "PictureFiles":
        return PictureFiles([self._files[int(row)] for row in rows])


class ArrayPictures(Pictures):
    """Pictures in an array [n, channels, height, width] as `choose_images` leaves it. `white`: the value of white pixels."""

    def __init__(self, pixels: Array, white: float) -> None:
        self._pixels, self._white = pixels, white

    def __len__(self) -> int:
        return len(self._pixels)

    def key(self, at: int) -> bytes:
        pixels = self._pixels[at]
        form = f"{pixels.dtype} {pixels.shape} {self._white}"
        return hash_of(form.encode() + np.ascontiguousarray(pixels).tobytes())

    def get(self, at: int, shorter: int) -> Picture:
        pixels = np.asarray(self._pixels[at], dtype=np.float32) / self._white
        shown = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
        channels = shown if len(shown) == 3 else np.repeat(shown[:1], 3, axis=0)
        return np.ascontiguousarray(channels.transpose(1, 2, 0))

    def place(self, at: int) -> str:
        return f"of row {at + 1}"

    def take(self, rows: Array) -> "ArrayPictures":
        return ArrayPictures(self._pixels[rows], self._white)


class Cuts(Examples):
    """One further view of each picture: a part with half of its area or more, perhaps mirrored, in the shape of the picture.

    What is cut depends on the picture and on the number of the view alone, so a view is encoded once, on every machine alike.
    The encoder then prepares it as any other picture.
    """

    what = "picture"

    def __init__(self, pictures: Pictures, shorter: int, view: int, *, flips: bool) -> None:
        """`shorter`: pixels of the shorter side that the encoder reads; `view`: from 1."""
        self._pictures, self._view, self._flips = pictures, view, flips
        self._shorter = math.ceil(shorter / math.sqrt(_LEAST_AREA))

    def __len__(self) -> int:
        return len(self._pictures)

    def key(self, at: int) -> bytes:
        return hash_of(self._pictures.key(at) + f"cut {self._view} {self._flips} {_LEAST_AREA}".encode())

    def get(self, at: int) -> Any:
        picture = self._pictures.get(at, self._shorter)
        rng = np.random.default_rng(list(self.key(at)))
        share = math.sqrt(rng.uniform(_LEAST_AREA, 1))
        sides = [max(1, round(length * share)) for length in picture.shape[:2]]
        top, left = (int(rng.integers(length - side + 1)) for length, side in zip(picture.shape, sides, strict=False))
        cut = picture[top : top + sides[0], left : left + sides[1]]
        return np.ascontiguousarray(cut[:, ::-1] if self._flips and rng.random() < 0.5 else cut)

    def place(self, at: int) -> str:
        return self._pictures.place(at)


class Sized(Examples):
    """Pictures as examples for an encoder, none much larger than it needs them."""

    what = "picture"

    def __init__(self, pictures: Pictures, shorter: int) -> None:
        self._pictures, self._shorter = pictures, shorter

    def __len__(self) -> int:
        return len(self._pictures)

    def key(self, at: int) -> bytes:
        return self._pictures.key(at)

    def get(self, at: int) -> Any:
        return self._pictures.get(at, self._shorter)

    def place(self, at: int) -> str:
        return self._pictures.place(at)
