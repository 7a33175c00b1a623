"""Digits of 56 devices: scikit-learn's 8x8 handwritten digits, with a vocabulary and a distortion per device.

A device knows five of the ten digits, under its own labels, and sees all its images rotated and
sheared by its own amounts. No single model fits all devices, and ten labelled images must reveal a
device's labels and distortion. Source: "Optical Recognition of Handwritten Digits" (Alpaydin,
Kaynak 1998), 1,797 images as shipped with scikit-learn.

With the setting `partition` the images are one table instead, undistorted and of ten classes, which is spread over simulated
users.
"""

import gzip
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from quickbloom.common.datasets.base import DataSpec, generator
from quickbloom.common.datasets.partitioned import PartitionedDataset, PartitionedOptions, in_memory
from quickbloom.common.errors import DataError
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.partition import Partition
from quickbloom.common.system.extras import needs

CLIENTS = 56
DIGITS = 10
WAYS = 5
PER_PART = 2
"""Images per class in each of support, query and test. The 28 devices of a digit take 168 of its 174 or more images."""
SIDE = 8
WHITE = 16.0

Array = np.ndarray[Any, Any]


class DigitsOptions(PartitionedOptions):
    """Settings of the data set `digits`."""

    rotation: float = Field(30.0, ge=0, le=180, description="largest rotation of a device's images, in degrees either way")
    shear: float = Field(0.2, ge=0, le=1, description="largest shear of a device's images, as a factor either way")
    data_seed: int = Field(0, ge=0, description="seed of the devices, apart from the seed of the run")


class Digits(PartitionedDataset):
    """56 devices with disjoint images; five classes with 2 support, 2 query and 2 test images each."""

    name = "digits"
    Options = DigitsOptions
    model = "mlp"
    algorithm = "ridge"
    inner_lr = 0.3
    partition = ""  # the devices
    users = 0

    def __init__(self, options: DigitsOptions, data_dir: Path) -> None:
        images, targets = _read()
        if options.partition is not None:
            self._spread_plain(images, targets, options.partition)
            return
        vocabularies = _vocabularies(generator(options.data_seed, "digits", "vocabulary"))
        rng = generator(options.data_seed, "digits", "images")
        pools = [iter(rng.permutation(np.flatnonzero(targets == digit))) for digit in range(DIGITS)]
        self._data: dict[str, TaskData] = {}
        for k, vocabulary in enumerate(vocabularies):
            chosen = [[next(pools[digit]) for _ in range(3 * PER_PART)] for digit in vocabulary]
            warped = _warp(images[np.ravel(chosen)], generator(options.data_seed, "digits", "device", k), options)
            self._data[f"device-{k:02d}"] = _split(warped.reshape(WAYS, 3, PER_PART, 1, SIDE, SIDE))

    @property
    def spec(self) -> DataSpec:
        return super().spec if self.is_spread else DataSpec("classification", (1, SIDE, SIDE), WAYS)

    def _spread_plain(self, images: Array, digits: Array, by: Partition) -> None:
        """Spread all images over users, each with the ten digits as its classes."""
        rows = in_memory(by, digits)

        def take(name: str, positions: Array) -> Array:
            return images[rows[name][positions], None]

        names = [str(digit) for digit in range(DIGITS)]
        self.spread({name: digits[held] for name, held in rows.items()}, names, (1, SIDE, SIDE), take, by)


def _read() -> tuple[Array, Array]:
    """Return images [1797, 8, 8] in 0..1 and their digits from scikit-learn's file.

    The file is read directly, since importing scikit-learn would take 60 MB and a second.
    """
    needs("datasets", "sklearn", "the data set `digits`", error=DataError, load=False)
    package = importlib.util.find_spec("sklearn")
    (folder, *_) = (package and package.submodule_search_locations) or [""]
    file = Path(folder, "datasets", "data", "digits.csv.gz")
    try:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            table = np.loadtxt(lines, delimiter=",")
    except OSError as error:
        raise DataError(
            f"scikit-learn's file of digits '{file}' cannot be read ({error}): install scikit-learn anew"
        ) from error
    images = table[:, :-1].reshape(-1, SIDE, SIDE) / WHITE
    return images.astype(np.float32), table[:, -1].astype(np.int64)


def _vocabularies(rng: np.random.Generator) -> list[Array]:
    """Return five digits per device, ordered by label.

    The two devices of a pair share the ten digits, so all digits are equally frequent.
    """
    pairs = [np.split(rng.permutation(DIGITS), 2) for _ in range(CLIENTS // 2)]
    return [half for pair in pairs for half in pair]


def _warp(images: Array, rng: np.random.Generator, options: DigitsOptions) -> Array:
    """Apply one random rotation and shear about the centre to all images [n, 8, 8] of a device."""
    from scipy.ndimage import affine_transform  # comes with scikit-learn

    angle = np.deg2rad(rng.uniform(-options.rotation, options.rotation))
    shear = rng.uniform(-options.shear, options.shear)
    rotate = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    plane = rotate @ np.array([[1.0, shear], [0.0, 1.0]])
    # The identity on the first axis lets one call warp the whole stack.
    matrix = np.eye(3)
    matrix[1:, 1:] = plane
    centre = np.full(2, (SIDE - 1) / 2)
    offset = np.concatenate([[0.0], centre - plane @ centre])
    return np.asarray(affine_transform(images, matrix, offset=offset, order=1), dtype=np.float32)


def _split(images: Array) -> TaskData:
    """Return the task of images [class, part, image, 1, 8, 8], whose parts are support, query and test."""
    labels = torch.arange(WAYS).repeat_interleave(PER_PART)
    support, query, test = (Batch.of(torch.from_numpy(images[:, part].reshape(-1, 1, SIDE, SIDE)), labels) for part in range(3))
    return TaskData(support, query, test)
