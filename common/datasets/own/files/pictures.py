"""Pictures for an encoder, which reads them in its own size and in colour: they are decoded only when they are encoded."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quickbloom.common.datasets.own.text import Array
from quickbloom.common.encoders.encoding import Examples, hash_of

Picture = NDArray[np.uint8]


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
