"""Fashion-MNIST: 70,000 grey images of ten kinds of clothing, spread over simulated users; the field's usual ground.

Source: Xiao, Rasul, Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms", 2017.
The files are those of the authors, or of Debian's package dataset-fashion-mnist. The published training and test images
are one table here, as in PFLlib and most papers on personalisation: every user gets a test part of their own.
"""

import gzip
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from quickbloom.common.datasets.partitioned import PartitionedDataset, PartitionedOptions, in_memory
from quickbloom.common.errors import DataError
from quickbloom.common.partition import Partition

FOLDER = "fashion-mnist"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
SIDE = 28
_MOST = 100_000
"""Images of a file, at most."""

Array = np.ndarray[Any, Any]


class FashionMnistOptions(PartitionedOptions):
    """Settings of the data set `fashion-mnist`: it has none but the run's `partition`."""


class FashionMnist(PartitionedDataset):
    """Images [1, 28, 28] in -1..1, as PFLlib scales them; by default Dirichlet 0.1 over 20 users."""

    name = "fashion-mnist"
    Options = FashionMnistOptions
    model = "conv4"
    inner_lr = 0.03
    needs_files = True

    def __init__(self, options: FashionMnistOptions, data_dir: Path) -> None:
        by = options.partition or Partition(self.partition, self.users)
        folder = find(data_dir)
        parts = [
            (_read(folder, f"{part}-images-idx3-ubyte", 3), _read(folder, f"{part}-labels-idx1-ubyte", 1))
            for part in ("train", "t10k")
        ]
        for images, labels in parts:
            _check(folder, images, labels)
        images = np.concatenate([images for images, _ in parts])
        labels = np.concatenate([labels for _, labels in parts]).astype(np.int64)
        rows = in_memory(by, labels)

        def take(name: str, positions: Array) -> Array:
            return (images[rows[name][positions], None].astype(np.float32) / 255 - 0.5) / 0.5

        self.spread({name: labels[held] for name, held in rows.items()}, CLASSES, (1, SIDE, SIDE), take, by)


def find(data_dir: Path) -> Path:
    """Return the folder with the files: fashion-mnist in the data directory, else Debian's. Raises DataError."""
    for folder in (data_dir / FOLDER, DEBIAN):
        if folder.is_dir():
            return folder
    raise DataError(
        f"the files of Fashion-MNIST are neither in '{data_dir / FOLDER}' nor in '{DEBIAN}': put the four .gz files of its "
        "authors into the first, or run apt-get install dataset-fashion-mnist"
    )


def _read(folder: Path, name: str, axes: int) -> Array:
    """Return the bytes of an idx file, packed or not, uint8 [n, ..]. Raises DataError."""
    packed, plain = folder / f"{name}.gz", folder / name
    path = plain if plain.is_file() else packed
    try:
        with gzip.open(path) if path == packed else path.open("rb") as file:
            content = file.read(16 + _MOST * SIDE * SIDE)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"the file '{path}' cannot be read ({error}): fetch Fashion-MNIST again") from None
    return parse_idx(content, axes, path)


def parse_idx(content: bytes, axes: int, path: Path) -> Array:
    """Return the array of an idx file of bytes with so many axes: two zeros, 8, axes, each axis as 4 bytes, then the bytes."""
    start = 4 + 4 * axes
    shape = tuple(np.frombuffer(content[4:start], dtype=">u4").tolist()) if len(content) >= start else ()
    if content[:4] != bytes([0, 0, 8, axes]) or len(content) - start != int(np.prod(shape, dtype=np.float64)):
        raise DataError(
            f"the file '{path}' must be in idx format with {axes} axes of bytes, and is not: fetch Fashion-MNIST again"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def _check(folder: Path, images: Array, labels: Array) -> None:
    if images.shape != (len(labels), SIDE, SIDE):
        raise DataError(
            f"the images in '{folder}' must be [{len(labels)}, 28, 28], one for each label, got {list(images.shape)}"
        )
    if labels.max(initial=0) >= len(CLASSES):
        raise DataError(f"the labels in '{folder}' must be 0..9, got {labels.max()}: fetch Fashion-MNIST again")
