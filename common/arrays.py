"""Named tensors as Flower's ArrayRecord, and back.

A large tensor travels in parts, some of its rows in each: whoever receives a message holds everything of one array three times
while Flower puts it together, and so it is one part and not the whole model. A part is about as large as the pieces in which
Flower sends an array.
"""

import math
import re
from collections.abc import Iterator, Mapping
from io import BytesIO
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.common.constant import SType
from torch import Tensor

from common.params import Params
from common.reading import WireError, reads, record_of, short

PART = 2**22
"""Bytes of a part, at the most, unless a single row has more."""

_PART = re.compile(r"(.*)#part(\d+)", re.DOTALL)
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}

Numbers = np.ndarray[Any, Any]


def to_arrays(params: Mapping[str, Tensor]) -> ArrayRecord:
    """Named tensors as an ArrayRecord; dtype and shape are kept."""
    return ArrayRecord(
        {name: Array(part) for whole, value in params.items() for name, part in _parts(whole, value.detach().cpu().numpy())}
    )


def _parts(name: str, value: Numbers) -> Iterator[tuple[str, Numbers]]:
    if value.nbytes <= PART or len(value) == 1:
        yield name, value
        return
    rows = max(1, PART * len(value) // value.nbytes)
    for i, start in enumerate(range(0, len(value), rows)):
        yield f"{name}#part{i}", value[start : start + rows]


@reads
def from_arrays(record: ArrayRecord, *, take: bool = False) -> Params:
    """The tensors of an ArrayRecord, as copies that may be changed.

    Never unpickles, and takes no more memory than came: the size that an array claims is compared with its bytes first.
    `take`: empty the record meanwhile, so that a large model is not there twice.
    """
    parts: dict[str, list[Numbers]] = {}
    for key in list(record):
        array = record.pop(key) if take else record[key]
        match = _PART.fullmatch(key)
        name, number = (match[1], int(match[2])) if match else (key, 0)
        if number != len(parts.setdefault(name, [])):
            raise WireError(f"the parts of the tensor `{name}` are not in their order, or it is there twice")
        parts[name].append(_numbers(name, array))
        del array  # the view that was made of it keeps what is needed
    return {name: torch.from_numpy(_whole(name, parts.pop(name))) for name in list(parts)}


def _numbers(name: str, array: Array) -> Numbers:
    """What an array holds, as a view of its bytes."""
    if array.stype != SType.NUMPY:
        raise WireError(f"the tensor `{name}` is of the kind {short(array.stype)}, expected {SType.NUMPY}")
    stream = BytesIO(array.data)
    version = np.lib.format.read_magic(stream)  # raises for everything but a single array: a pickle, an archive
    if version not in _HEADERS:
        raise WireError(f"the tensor `{name}` has the format {version}, expected 1.0 or 2.0")
    shape, by_columns, dtype = _HEADERS[version](stream)
    # Only plain numbers: of things without a size, such as "|S0", any number would fit into no bytes at all.
    if dtype.kind not in "biuf" or dtype.itemsize == 0:
        raise WireError(f"the tensor `{name}` holds {short(dtype)}, expected numbers")
    claimed, came = math.prod(shape) * dtype.itemsize, len(array.data) - stream.tell()
    if claimed != came:
        raise WireError(f"the tensor `{name}` claims {claimed} bytes of {dtype} and has {came}")
    return np.ndarray(shape, dtype, array.data, stream.tell(), order="F" if by_columns else "C")


def _whole(name: str, parts: list[Numbers]) -> Numbers:
    if len(parts) == 1:
        return np.array(parts[0], copy=True, order="C")
    if len({(part.dtype, part.shape[1:]) for part in parts}) > 1:
        raise WireError(f"the parts of the tensor `{name}` do not fit together")
    result = np.empty((sum(len(part) for part in parts), *parts[0].shape[1:]), parts[0].dtype)
    end = len(result)
    while parts:  # each goes once it is copied
        part = parts.pop()
        result[end - len(part) : end] = part
        end -= len(part)
    return result


def arrays_of(records: RecordDict, name: str, *, take: bool = False) -> Params:
    """The tensors of the record `name`, as from `from_arrays`. Raises WireError, or KeyError where there is none."""
    return from_arrays(record_of(records, name, ArrayRecord), take=take)
