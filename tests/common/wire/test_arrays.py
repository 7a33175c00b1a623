"""Large tensors travel in parts and arrive whole; parts that are no whole are refused."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord

from quickbloom.common.wire import arrays
from quickbloom.common.wire.arrays import from_arrays, to_arrays
from quickbloom.common.wire.checks import WireError


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "PART", 48)  # two rows of six float32
    monkeypatch.setattr(arrays, "TOGETHER", 48)


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


def test_small_tensors_that_follow_each_other_travel_as_one_array() -> None:
    params = {
        "w": torch.rand(9, 7).T,
        "scale": torch.tensor(3.0),
        "none": torch.zeros(0, 4),
        "ids": torch.arange(6).reshape(2, 3),
        "b": torch.rand(5),
        "large": torch.rand(2**19),
        "last": torch.ones(2),
    }
    record = to_arrays(params)
    first, *others = record
    assert (first.startswith("#together"), others) == (True, ["ids", "b", "large", "last"])
    assert record[first].shape == (64,)
    back = from_arrays(record)
    assert list(back) == list(params)
    for name, value in params.items():
        assert (back[name].dtype, back[name].shape) == (value.dtype, value.shape)
        assert torch.equal(back[name], value)
    back["w"] += 1.0  # a copy
    assert torch.equal(from_arrays(record)["w"], params["w"])


def test_no_array_of_small_tensors_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "TOGETHER", 32)
    params = {str(i): torch.full((3,), float(i)) for i in range(5)}
    record = to_arrays(params)
    assert [array.shape for array in record.values()] == [(6,), (6,), (3,)]
    assert all(torch.equal(value, params[name]) for name, value in from_arrays(record).items())


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        ('[["a", 2], ["b", 3]]', "do not fit their 6 numbers"),
        ('[["a", 2], ["b", 5]]', "do not fit their 6 numbers"),
        ('[["a", 1099511627777, 0], ["b", 6]]', "has no shape"),
        ('[["a", -2, -3]]', "has no shape"),
        ('[["a", true, 6]]', "has no shape"),
        ('[["a", 6.0]]', "has no shape"),
        (f'[["a", 6{", 1" * 40}]]', "has no shape"),
        ('[["a", 3], ["a", 3]]', "`a` is there twice"),
        ('[["w", 6]]', "`w` is there twice"),
        ("[[], [6]]", "no name and shape"),
        ('{"a": [6]}', "must be a list"),
        ("[" * 100_000, "cannot be read"),
        ("", "cannot be read"),
    ],
)
def test_tensors_that_did_not_come_together_are_refused(listed: str, words: str) -> None:
    with pytest.raises(WireError, match=words):
        from_arrays(ArrayRecord({"w": part(2), f"#together{listed}": part(6)}))


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
