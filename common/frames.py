"""Tables for people who work in Python: a pandas.DataFrame, or NumPy arrays where pandas is not installed."""

import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from quickbloom.common.errors import ConfigError

_PLAIN = re.compile(r"-?(0|[1-9][0-9]{0,17})(\.[0-9]+)?([eE][+-]?[0-9]{1,3})?")
"""A number without doubt: a code such as 0401 is text, and so is an id of more digits than an integer of 64 bits has."""


def frame(columns: Mapping[str, Sequence[Any]]) -> Any:
    """Return a pandas.DataFrame, or without pandas a dictionary of NumPy arrays."""
    if find_spec("pandas") is not None:
        return import_module("pandas").DataFrame(columns)
    return {name: np.array(values) for name, values in columns.items()}


def typed(cells: Sequence[str]) -> list[Any]:
    """Return the cells of a column as numbers if all but the empty ones are plain numbers, else as text; empty: NaN or None."""
    held = [cell for cell in cells if cell]
    if not held or not all(_PLAIN.fullmatch(cell) for cell in held):
        return [cell or None for cell in cells]
    if len(held) == len(cells) and not any(sign in cell for cell in held for sign in ".eE"):
        return [int(cell) for cell in cells]
    return [float(cell) if cell else float("nan") for cell in cells]


@contextmanager
def as_file(data: Any) -> Iterator[str | None]:
    """Lend the path of data: tables in memory lie in a file of this user's alone as long as this lasts.

    `data`: a path, None (gives None), a pandas or polars DataFrame, or arrays by column. Raises ConfigError for anything else.
    """
    if data is None or isinstance(data, str | os.PathLike):
        yield None if data is None else str(data)
        return
    with tempfile.TemporaryDirectory(prefix="quickbloom-data-") as folder:
        file = Path(folder) / "frame.csv"
        if hasattr(data, "to_csv"):
            data.to_csv(file, index=False)
        elif hasattr(data, "write_csv"):
            data.write_csv(file)
        elif isinstance(data, Mapping):
            file = Path(folder) / "arrays.npz"
            columns: dict[str, Any] = {str(name): np.asarray(values) for name, values in data.items()}
            np.savez(file, **columns)
        else:
            raise ConfigError(
                "`data` must be a path, a pandas or polars DataFrame, or arrays by column, "
                f"got {type(data).__name__}: make one of them"
            )
        yield str(file)
