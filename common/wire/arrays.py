"""Named tensors as Flower's ArrayRecord, and back.

A large tensor travels in parts of some rows each. A receiver holds three copies of an array while
Flower puts it together, so the copies are of one part and not of the whole model. A part is about
as large as the pieces in which Flower sends an array. Consecutive small tensors travel together:
each array costs its own requests at every process on the way, which for a small model is most of a
round.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from io import BytesIO
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor

from quickbloom.common.flower.names import NUMPY
from quickbloom.common.maths.params import Params
from quickbloom.common.wire.checks import WireError, reads, record_of, short

PART = 2**22
"""Largest part in bytes, unless a single row has more."""

TOGETHER = 2**20
"""Largest total in bytes of the tensors that travel as one array."""

_TOGETHER = "#together"
"""Prefix of such an array's key; the names and shapes of its tensors follow as JSON."""
_MOST, _MOST_SIDES = 2**40, 32
"""Limits on the length of a tensor's axis, and on its number of axes."""

_PART = re.compile(r"(.*)#part(\d+)", re.DOTALL)
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}

Numbers = np.ndarray[Any, Any]


def to_arrays(params: Mapping[str, Tensor]) -> ArrayRecord:
    """Return named tensors as an ArrayRecord; dtype and shape are kept."""
    values = ((name, value.detach().cpu().numpy()) for name, value in params.items())
    return ArrayRecord({name: Array(part) for name, part in _joined(values)})


def _joined(values: Iterable[tuple[str, Numbers]]) -> Iterator[tuple[str, Numbers]]:
    """Yield the arrays to send: large tensors in parts, consecutive small ones of the same dtype as one array."""
    waiting: list[tuple[str, Numbers]] = []
    for name, value in values:
        size = sum(one.nbytes for _, one in waiting) + value.nbytes
        if waiting and (size > TOGETHER or value.dtype != waiting[0][1].dtype):
            yield _together(waiting)
            waiting = []
        if value.nbytes > TOGETHER:
            yield from _parts(name, value)
        else:
            waiting.append((name, value))
    if waiting:
        yield _together(waiting)


def _together(values: list[tuple[str, Numbers]]) -> tuple[str, Numbers]:
    if len(values) == 1:
        return values[0]
    named = json.dumps([[name, *value.shape] for name, value in values])
    return _TOGETHER + named, np.concatenate([value.ravel() for _, value in values])


def _apart(listed: str, numbers: Numbers) -> Iterator[tuple[str, Numbers]]:
    """Yield the tensors of one array as views. `listed`: their names and shapes as received."""
    start, tensors = 0, json.loads(listed)
    if numbers.ndim != 1 or not isinstance(tensors, list):
        raise WireError("tensors that came together must be a list of numbers, with a list of their names and shapes")
    for tensor in tensors:
        if not isinstance(tensor, list) or not tensor or not isinstance(tensor[0], str):
            raise WireError(f"a tensor that came together with others has no name and shape: {short(tensor)}")
        name, *shape = tensor
        if any(type(side) is not int or not 0 <= side <= _MOST for side in shape) or len(shape) > _MOST_SIDES:
            raise WireError(f"the tensor `{short(name)}` has no shape: {short(shape)}")
        end = start + math.prod(shape)
        if end > len(numbers):
            break
        yield name, numbers[start:end].reshape(shape)
        start = end
    else:
        if start == len(numbers):
            return
    raise WireError(f"the shapes of tensors that came together do not fit their {len(numbers)} numbers")


def _parts(name: str, value: Numbers) -> Iterator[tuple[str, Numbers]]:
    if value.nbytes <= PART or len(value) == 1:
        yield name, value
        return
    rows = max(1, PART * len(value) // value.nbytes)
    for i, start in enumerate(range(0, len(value), rows)):
        yield f"{name}#part{i}", value[start : start + rows]


@reads
def from_arrays(record: ArrayRecord, *, take: bool = False) -> Params:
    """Return the tensors of an ArrayRecord as copies that may be changed. Raises WireError.

    Never unpickles, and allocates no more memory than was received: the claimed size of an array is
    first compared with its bytes. `take`: empty the record while reading, so that a large model is
    not in memory twice.
    """
    parts: dict[str, list[Numbers]] = {}
    for key in list(record):
        array = record.pop(key) if take else record[key]
        if key.startswith(_TOGETHER):
            for name, value in _apart(key.removeprefix(_TOGETHER), _numbers(_TOGETHER, array)):
                if parts.setdefault(name, []):
                    raise WireError(f"the tensor `{name}` is there twice")
                parts[name].append(value)
            continue
        match = _PART.fullmatch(key)
        name, number = (match[1], int(match[2])) if match else (key, 0)
        if number != len(parts.setdefault(name, [])):
            raise WireError(f"the parts of the tensor `{name}` are not in their order, or it is there twice")
        parts[name].append(_numbers(name, array))
        del array  # the view keeps the memory that is needed
    return {name: torch.from_numpy(_whole(name, parts.pop(name))) for name in list(parts)}


def _numbers(name: str, array: Array) -> Numbers:
    """Return the content of an array as a view of its bytes. Raises WireError."""
    if array.stype != NUMPY:
        raise WireError(f"the tensor `{name}` is of the kind {short(array.stype)}, expected {NUMPY}")
    stream = BytesIO(array.data)
    version = np.lib.format.read_magic(stream)  # raises unless this is a single array, such as for a pickle or an archive
    if version not in _HEADERS:
        raise WireError(f"the tensor `{name}` has the format {version}, expected 1.0 or 2.0")
    shape, by_columns, dtype = _HEADERS[version](stream)
    # Only plain numbers: any count of items without a size, such as "|S0", would fit into no bytes.
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
    while parts:  # each is freed once it is copied
        part = parts.pop()
        result[end - len(part) : end] = part
        end -= len(part)
    return result


def arrays_of(records: RecordDict, name: str, *, take: bool = False) -> Params:
    """Return the tensors of the record `name`, read by `from_arrays`. Raises WireError, or KeyError if it is missing."""
    return from_arrays(record_of(records, name, ArrayRecord), take=take)
