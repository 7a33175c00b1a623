"""Images in arrays, from an .npz or a function: choice of the array, its channel axis, and the value of white.

The type of integers determines white: 255, 65535 for uint16, 1 for bool. Decimal pixels are 0..1 or
0..255, as the task's support part shows. A picture therefore gives the same inputs on every node,
however it was saved.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from quickbloom.common.datasets.own.files.tables import LIMIT, PIXELS, Table
from quickbloom.common.datasets.own.options import listed
from quickbloom.common.datasets.own.text import Array
from quickbloom.common.errors import DataError, as_told

NO_SCALE = (
    "the pixels of its support are neither 0 to 1 nor 0 to 255: divide them by what is white, or save whole numbers as uint8 "
    "or uint16; measurements that are no images belong into [rows, n]"
)
"""Reason why a task is unusable, in words."""
_WHITE: Mapping[str, float] = {"bool": 1.0, "uint8": 255.0, "uint16": 65535.0}
"""Value of white by type."""
_FEW_CHANNELS = 4
_MUCH = 2.0
"""Decimal pixels up to twice white are accepted as overshoot of a filter; beyond that they are clipped."""
_LEAST = 8.0
"""For pixels 0..255: a maximum between 2 and this value is ambiguous."""
_HOT = 0.01
"""Share of pixels that are ignored, so that a dead pixel does not decide about all others."""
_DARK = 8
"""Images whose brightest pixel is below white / _DARK get a remark."""


def choose_images(table: Table, features: str, agreed: Collection[str] = ()) -> str:
    """Leave one array of images in `table`, named `PIXELS`, checked and with channels first; remove the others.

    `features`: the setting `own.features`; if empty, `agreed`, the columns that other nodes agreed
    on; if that is empty too, all columns. Returns the array's original name; "" if there are no
    images among the inputs. Adds sentences to `table.remarks`. Raises DataError if several arrays
    could be meant, or if the pixels are ambiguous.
    """
    wanted = listed(features, table) or agreed
    arrays = {name: column for name, column in table.items() if isinstance(column, np.ndarray) and column.ndim > 1}
    chosen = [name for name in arrays if name in wanted]
    if not chosen and (not wanted or PIXELS in wanted):
        chosen = list(arrays)
    if len(chosen) > 1:
        raise DataError(
            f"the data '{table.path}' hold {_counted(chosen)} of images, {_all(chosen)}: name one with `own.features`, or "
            "leave the others out"
        )
    if not chosen and not set(wanted) <= table.keys():  # a name is misspelled; the later error may suggest an array
        return ""
    name = chosen[0] if chosen else ""
    if name not in ("", PIXELS) and PIXELS in table and PIXELS not in arrays:
        raise DataError(
            f"the data '{table.path}' hold the images `{name}` and a column `{PIXELS}`, as images are called: rename it"
        )
    for other in arrays:
        del table[other]
    if name:
        table[PIXELS], remarks = read_array(name, arrays[name], LIMIT)
        table.remarks += remarks
    return name


def _counted(names: list[str]) -> str:
    return {2: "two arrays", 3: "three arrays"}.get(len(names), f"{len(names)} arrays")


def _all(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:-1]) + f" and `{names[-1]}`"


def read_array(name: str, array: Array, limit: int) -> tuple[Array, list[str]]:
    """Return (images [rows, channels, height, width] of bool, uint8, uint16 or decimal numbers; remarks). Raises DataError."""
    if array.dtype.kind not in "biuf":
        raise DataError(f"the array `{name}` must hold numbers, as images do, got {array.dtype}")
    if not all(array.shape[1:]):
        raise DataError(f"the images `{name}` have no pixels, their array has the shape {array.shape}")
    if (size := array.size * np.dtype(np.float32).itemsize) > limit:
        raise DataError(
            f"the images `{name}` take {size / 1e9:.1f} GB as inputs, at most {limit / 1e9:.1f} GB are read: split or thin "
            "them out"
        )
    images, remarks = _channels_first(name, array)
    images = _whole_numbers(name, images) if array.dtype.kind in "biu" else _decimal_numbers(name, images)
    return images, remarks + _dark(name, images)


def white_of(support: Array) -> float:
    """Return the divisor of a task's decimal pixels, 1 or 255; 0 if its support [rows, ...] fits neither; 1 for integers.

    Almost all non-zero pixels decide; a single one, however bright, does not.
    """
    if support.dtype.kind != "f":
        return 1.0
    pixels = support[support != 0]
    if not pixels.size:
        return 1.0
    low, high = np.quantile(pixels, _HOT, method="higher"), np.quantile(pixels, 1 - _HOT, method="lower")
    if low < -max(high, 0.1) / 10:  # probably standardised; a filter undershoots by less
        return 0.0
    if high <= _MUCH:
        return 1.0
    return 255.0 if _LEAST <= high <= _MUCH * 255 else 0.0


def value_of_white(images: Array) -> float:
    """Return the value of white in all these images together: by the type of whole numbers, else 1 or 255; 0: it is neither."""
    return _WHITE.get(images.dtype.name) or white_of(images)


def inputs_of(images: Array, white: float) -> Array:
    """Return the images as float32 with white as 1. `white`: divisor of decimal pixels, which are clipped at twice white."""
    known = _WHITE.get(images.dtype.name)
    scaled = images / known if known else (images / white).clip(-_MUCH, _MUCH)
    return scaled.astype(np.float32)


def is_beyond_white(images: Array, white: float) -> bool:
    """Return whether decimal pixels are so far beyond white or black that they are clipped."""
    return images.dtype.kind == "f" and float(np.abs(images).max(initial=0)) > _MUCH * white


def require_same_scale(images: Array, white: float, path: str) -> None:
    """Raise DataError if decimal pixels [rows, ...] clearly have another scale than the `white` of the model's data."""
    if images.dtype.kind != "f" or not images.size:
        return
    found, pixels = white_of(images), images[images != 0]
    unit = found == 1 and pixels.size > 0 and bool((pixels != np.round(pixels)).mean() > 0.5)
    if not found or found > white or (unit and white > 1):
        seen = "0 to 1" if unit else f"{images.min():g} to {images.max():g}"
        raise DataError(
            f"the images of '{path}' have decimal pixels of {seen}, those of the model's own data 0 to {white:g}: scale them "
            "alike, or save both as uint8",
            seen,
        )


def beyond_white(tasks: Sequence[str]) -> list[str]:
    """Return a sentence on tasks with clipped pixels, in a list; [] if there are none."""
    if not tasks:
        return []
    named = ", ".join(as_told(name, 60) for name in tasks[:5]) + (f" and {len(tasks) - 5} more" if len(tasks) > 5 else "")
    return [
        f"images of {named} have pixels far beyond what is white in their support, which are taken for twice white: check how "
        "they are scaled"
    ]


def _channels_first(name: str, array: Array) -> tuple[Array, list[str]]:
    if array.ndim == 3:
        return array[:, None], _of_measurements(name, array)
    first, middle, last = array.shape[1:]
    where = _channels(first, middle, last)
    if where == 0:
        raise DataError(
            f"the axes of the images `{name}` cannot be told apart, their array has the shape {array.shape}: [rows, channels, "
            "height, width] was expected, with fewer channels than pixels a side"
        )
    if where > 0:
        return array, []
    remark = f"the last axis of the images `{name}`, {array.shape}, is taken for their channels"
    return np.ascontiguousarray(np.moveaxis(array, -1, 1)), [remark]


def _channels(first: int, middle: int, last: int) -> int:
    """Return which of three axes holds the channels: 1, the first; -1, the last; 0, undecided.

    The other two mostly have equal lengths; otherwise the channel axis is the one that is short
    enough.
    """
    if (first == middle) != (middle == last):
        return -1 if first == middle else 1
    if (first <= _FEW_CHANNELS) != (last <= _FEW_CHANNELS):
        return 1 if first <= _FEW_CHANNELS else -1
    return 1 if first < min(middle, last) and last > _FEW_CHANNELS else 0


def _of_measurements(name: str, array: Array) -> list[str]:
    height, width = array.shape[1:]
    if min(height, width) > _FEW_CHANNELS or height == width:
        return []
    return [
        f"the array `{name}` is taken for grey images of {height} x {width} pixels: if it holds measurements, save it as "
        f"[rows, n] with `{name}.reshape(len({name}), -1)`"
    ]


def _whole_numbers(name: str, images: Array) -> Array:
    """Return the images as bool, uint8 or uint16. Raises DataError if the type does not determine white."""
    if not images.size:
        return images.astype(np.uint8)
    low, high = int(images.min()), int(images.max())
    kind = images.dtype.name
    if kind not in _WHITE and (low < 0 or high > 255):
        raise DataError(
            f"the images `{name}` hold {kind} of {low} to {high}, and nothing says which is white: save them as uint8 (0 to "
            "255), as uint16 (0 to 65535), or divided by what is white",
            f"{low} to {high}",
        )
    white = _WHITE.get(kind, 255.0)
    if 0 < high <= white / 255:
        mend = "bool if 1 is white" if high == 1 else "uint8 if 255 is white"
        raise DataError(
            f"the images `{name}` hold {kind} of at most {high}, of which {white:g} is white: nothing is to be seen; save them "
            f"as {mend}, or divided by what is white",
            str(high),
        )
    return images if kind in _WHITE else images.astype(np.uint8)


def _decimal_numbers(name: str, images: Array) -> Array:
    if np.isnan(images).any():
        row = int(np.isnan(images).any(axis=(1, 2, 3)).argmax()) + 1
        raise DataError(f"the images `{name}` have missing pixels, first in row {row}: fill them, or leave such rows out")
    return images if images.dtype.itemsize in (4, 8) else images.astype(np.float32 if images.dtype.itemsize < 4 else np.float64)


def _dark(name: str, images: Array) -> list[str]:
    high = float(images.max(initial=0)) if images.dtype.kind != "b" else 1.0
    white = _WHITE.get(images.dtype.name) or (1.0 if high <= _MUCH else 255.0)
    if not 0 < high < white / _DARK:
        return []
    return [
        f"no pixel of the images `{name}` is above {high:g}, where {white:g} is white: divide them by what is white if they "
        "are not meant to be dark"
    ]
