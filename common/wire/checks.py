"""Checked access to records: any flaw raises WireError with a reason in words."""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
from flwr.app import ConfigRecord, RecordDict

from quickbloom.common.errors import OneLineError, as_told

P = ParamSpec("P")
R = TypeVar("R")


class WireError(OneLineError):
    """A message does not have the form that this version expects; the message text says what is wrong with it."""


def reads(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a reader so that any exception from a malformed record becomes a WireError."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except WireError:
            raise
        except KeyError as error:
            raise WireError(f"the field {error} is missing") from None
        except Exception as error:  # for damaged bytes NumPy and zipfile raise a dozen types, MemoryError among them
            raise WireError(f"it cannot be read ({error})") from None

    return wrapped


def config_of(records: RecordDict, name: str) -> ConfigRecord:
    return record_of(records, name, ConfigRecord)


def record_of(records: RecordDict, name: str, kind: type[R]) -> R:
    record = records[name]
    if not isinstance(record, kind):
        raise WireError(f"`{name}` must be a {kind.__name__}, got a {type(record).__name__}")
    return record


def ints(values: Any, name: str, least: int = 0) -> list[int]:
    if not isinstance(values, list) or not all(isinstance(v, int) and not isinstance(v, bool) and v >= least for v in values):
        raise WireError(f"`{name}` must be whole numbers of at least {least}, got {short(values)}")
    return list(values)


def floats(values: Any, name: str, length: int | None = None, *, finite: bool = True) -> list[float]:
    if not isinstance(values, list) or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        raise WireError(f"`{name}` must be numbers, got {short(values)}")
    if length is not None and len(values) != length:
        raise WireError(f"`{name}` must have {length} entries, got {len(values)}")
    if finite and not np.isfinite(values).all():
        raise WireError(f"`{name}` must be finite, got {short(values)}")
    return [float(v) for v in values]


def nothing_else(fields: Mapping[str, Any], known: set[str]) -> None:
    if foreign := sorted(fields.keys() - known):
        raise WireError(f"there is an unexpected field `{foreign[0]}`")


def byte_strings(values: Any, name: str, size: int, length: int | None = None, *, empty: bool = False) -> list[bytes]:
    """Return `values` if they are byte strings of `size` bytes each. Raises WireError.

    `length`: required number of entries; `empty`: entries may be empty.
    """
    if not isinstance(values, list) or not all(isinstance(v, bytes) and (len(v) == size or (empty and not v)) for v in values):
        raise WireError(f"`{name}` must be a list of {size} bytes each, got {short(values)}")
    if length is not None and len(values) != length:
        raise WireError(f"`{name}` must have {length} entries, got {len(values)}")
    return list(values)


def strings(values: Any, name: str) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise WireError(f"`{name}` must be a list of texts, got {short(values)}")
    return list(values)


def truth(value: Any, name: str) -> bool:
    """Return a field that is true or false. Raises WireError for any other."""
    if not isinstance(value, bool):
        raise WireError(f"`{name}` must be true or false, got {short(value)}")
    return value


def short(values: Any) -> str:
    return as_told(repr(values[:80] if isinstance(values, list | str | bytes) else values), 80)
