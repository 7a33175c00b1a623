"""Large tensors travel in parts and arrive whole; parts that are no whole are refused."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord

from common import arrays
from common.arrays import from_arrays, to_arrays
from common.reading import WireError


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "PART", 48)  # two rows of six float32


@pytest.mark.usefixtures("small_parts")
def test_a_large_tensor_is_cut_by_rows_and_comes_back() -> None:
    params = {"w": torch.arange(30.0).reshape(5, 6), "b": torch.ones(3), "row": torch.zeros(1, 99), "t": torch.rand(9, 7).T}
    record = to_arrays(params)
    assert [(key, array.shape) for key, array in record.items()][:4] == [
        ("w#part0", (2, 6)),
        ("w#part1", (2, 6)),
        ("w#part2", (1, 6)),
        ("b", (3,)),
    ]
    back = from_arrays(record)
    assert list(back) == list(params)
    assert all(torch.equal(back[name], value) for name, value in params.items())


def part(*shape: int, dtype: Any = torch.float32) -> Array:
    return Array(torch.zeros(shape, dtype=dtype).numpy())


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"w#part1": part(2, 3)}, "are not in their order"),
        ({"w#part0": part(2, 3), "w#part2": part(2, 3)}, "are not in their order"),
        ({"w#part0": part(2, 3), "w": part(2, 3)}, "it is there twice"),
        ({"w#part0": part(2, 3), "w#part1": part(2, 4)}, "do not fit together"),
        ({"w#part0": part(2, 3), "w#part1": part(2, 3, dtype=torch.float64)}, "do not fit together"),
    ],
)
def test_parts_that_make_no_tensor_are_refused(found: dict[str, Array], words: str) -> None:
    with pytest.raises(WireError, match=words):
        from_arrays(ArrayRecord(found))


@pytest.mark.parametrize("kind", ["|S0", "<U0", "|V0", "|O", "<M8[s]", "<c8", "|S4"])
def test_an_array_of_anything_but_numbers_is_refused_before_memory_is_taken_for_it(kind: str) -> None:
    header = io.BytesIO()
    shape = (2**40,) if kind[-1] == "0" else (0,)  # of things without a size any number fits into no bytes
    np.lib.format.write_array_header_1_0(header, {"descr": kind, "fortran_order": False, "shape": shape})
    array = Array("float32", shape, "numpy.ndarray", header.getvalue())
    with pytest.raises(WireError, match="expected numbers"):
        from_arrays(ArrayRecord({"w": array}))


def test_an_array_of_another_kind_is_refused() -> None:
    array = part(2)
    array.stype = "pickle"
    with pytest.raises(WireError, match="is of the kind"):
        from_arrays(ArrayRecord({"w": array}))


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("take", [False, True])
def test_tensors_share_nothing_with_the_message_that_they_came_in(take: bool) -> None:
    params = {"w": torch.rand(5, 6), "b": torch.ones(3)}
    record = to_arrays(params)
    kept = ArrayRecord(dict(record))
    back = from_arrays(record, take=take)
    assert len(record) == (0 if take else len(kept))
    for value in back.values():
        value.fill_(7.0)
    assert all(torch.equal(value, params[name]) for name, value in from_arrays(kept).items())
