"""Small data sets in the layout of the hub, in local folders: no network is needed to read them."""

import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from quickbloom.common.flower.partitioners import load

CLASSES = ("ant", "bee", "cat", "dog")


def datasets() -> Any:
    """The package `datasets`, whose cache is a temporary folder."""
    module = load("datasets")
    module.config.HF_DATASETS_CACHE = Path(_cache())
    return module


@lru_cache(maxsize=1)
def _cache() -> str:
    return tempfile.mkdtemp(prefix="quickbloom-hub-cache-")


@lru_cache(maxsize=1)
def images() -> str:
    """A folder with train.parquet and test.parquet: 800 grey images of 6 x 5 pixels, of four classes, and who drew them."""
    package = datasets()
    rng, folder = np.random.default_rng(0), Path(tempfile.mkdtemp(prefix="quickbloom-hub-"))
    form = package.Features(
        image=package.Image(), label=package.ClassLabel(names=list(CLASSES)), writer=package.Value("string")
    )
    for split, number in (("train", 600), ("test", 200)):
        pixels = rng.integers(0, 256, (number, 6, 5), dtype=np.uint8)
        columns = {
            "image": list(pixels),
            "label": [k % 4 for k in range(number)],
            "writer": [f"w{k % 7}" for k in range(number)],
        }
        package.Dataset.from_dict(columns, features=form).to_parquet(str(folder / f"{split}.parquet"))
    return str(folder)


@lru_cache(maxsize=1)
def numbers() -> str:
    """A folder with train.parquet: 90 rows of two numbers, a word, and a class as text, one of them empty."""
    folder = Path(tempfile.mkdtemp(prefix="quickbloom-hub-"))
    columns = {
        "a": np.arange(90) / 10,
        "b": np.arange(90),
        "said": ["word"] * 90,
        "kind": [None, *("xyz"[k % 3] for k in range(89))],
    }
    datasets().Dataset.from_dict(columns).to_parquet(str(folder / "train.parquet"))
    return str(folder)
