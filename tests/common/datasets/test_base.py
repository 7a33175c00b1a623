"""What all data sets share: redrawing, reading files, the registry's cache."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quickbloom.common.datasets import DATASETS, load_dataset
from quickbloom.common.datasets.base import Pool, read_npz, require_below, resolve_data_dir
from quickbloom.common.errors import ConfigError, DataError
from quickbloom.common.maths.batch import Batch, TaskData

FLOAT, BYTE = np.dtype(np.float32), np.dtype(np.uint8)
EXPECTED = {"images": (BYTE, (-1, 2))}


def numbered(support: list[int], query: list[int], test: list[int]) -> TaskData:
    """A task with the given labels, in which the example at position i has the value i."""
    x = torch.split(torch.arange(float(len(support) + len(query) + len(test))), [len(support), len(query), len(test)])
    return TaskData(
        *(Batch.of(part, torch.tensor(y, dtype=torch.int64)) for part, y in zip(x, (support, query, test), strict=True))
    )


labels = st.lists(st.integers(0, 3), min_size=1, max_size=8)


@given(labels, labels, labels, st.integers(0, 1000))
def test_redraw_keeps_class_counts_and_pairs_of_x_and_y(
    support: list[int], query: list[int], test: list[int], seed: int
) -> None:
    data = numbered(support, query, test)
    drawn = Pool.of(data).draw(np.random.default_rng(seed))
    assert sorted(drawn.support.y.tolist()) == sorted(support)
    assert sorted(drawn.query.y.tolist()) == sorted(query)
    everything = support + query
    for part in (drawn.support, drawn.query):
        assert [everything[int(i)] for i in part.x] == part.y.tolist()


@given(labels, labels, labels, st.integers(0, 1000))
def test_redraw_uses_each_example_once_and_leaves_the_test_part_alone(
    support: list[int], query: list[int], test: list[int], seed: int
) -> None:
    data = numbered(support, query, test)
    drawn = Pool.of(data).draw(np.random.default_rng(seed))
    used = torch.cat([drawn.support.x, drawn.query.x]).sort().values
    assert used.tolist() == list(range(len(support) + len(query)))
    assert drawn.test is data.test


def test_redraw_of_regression_keeps_the_sizes() -> None:
    x = torch.arange(10.0)[:, None]
    part = [Batch.of(rows, 2 * rows) for rows in torch.split(x, [3, 5, 2])]
    drawn = Pool.of(TaskData(*part)).draw(np.random.default_rng(0))
    assert (len(drawn.support.x), len(drawn.query.x)) == (3, 5)
    assert torch.equal(drawn.query.y, 2 * drawn.query.x)


def test_read_npz_returns_only_what_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, images=np.ones((3, 2), BYTE), other=np.ones(1))
    assert list(read_npz(path, EXPECTED)) == ["images"]


def test_a_missing_file_names_the_setting_that_mends_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist.*`data-dir`"):
        read_npz(tmp_path / "a.npz", EXPECTED)


@pytest.mark.parametrize("keep", [0, 10, 150])
def test_a_cut_off_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, images=np.ones((3, 2), BYTE))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="not a readable"):
        read_npz(path, EXPECTED)


@pytest.mark.parametrize(
    ("array", "complaint"),
    [
        (np.ones((3, 3), BYTE), "must have shape"),
        (np.ones(2, BYTE), "must have shape"),
        (np.ones((3, 2), np.int64), "must have dtype uint8, got int64"),
    ],
)
def test_another_shape_or_dtype_is_refused(tmp_path: Path, array: np.ndarray, complaint: str) -> None:
    np.savez(tmp_path / "a.npz", images=array)
    with pytest.raises(DataError, match=complaint):
        read_npz(tmp_path / "a.npz", EXPECTED)


def test_a_missing_array_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", labels=np.ones(2))
    with pytest.raises(DataError, match=r"lacks the array `images`.*labels"):
        read_npz(tmp_path / "a.npz", EXPECTED)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_are_refused(tmp_path: Path, bad: float) -> None:
    np.savez(tmp_path / "a.npz", features=np.array([0.0, bad], FLOAT))
    with pytest.raises(DataError, match="NaN or infinite"):
        read_npz(tmp_path / "a.npz", {"features": (FLOAT, (2,))})


class Trap:
    """Unpickling one creates the file `victim`."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.victim,)


def test_a_pickled_object_is_never_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.array([Trap(tmp_path / "victim")], dtype=object))
    with pytest.raises(DataError, match="not a readable"):
        read_npz(tmp_path / "a.npz", EXPECTED)
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize("value", [-1, 3])
def test_an_index_out_of_range_is_refused(value: int) -> None:
    with pytest.raises(DataError, match=rf"values 0\.\.2, got {value}"):
        require_below(Path("a.npz"), "label", np.array([0, 2, value]), 3)


def test_the_data_folder_is_the_setting_then_the_environment_then_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    monkeypatch.setenv("QUICKBLOOM_DATA_DIR", "/env")
    assert resolve_data_dir("/setting") == Path("/setting")
    assert resolve_data_dir("") == Path("/env")
    monkeypatch.delenv("QUICKBLOOM_DATA_DIR")
    assert resolve_data_dir("") == Path("/cache/quickbloom")


def test_a_data_set_is_built_once_for_the_same_options() -> None:
    options = DATASETS["sinusoid"].Options
    first = load_dataset("sinusoid", options(), Path())
    assert load_dataset("sinusoid", options.model_validate({}), Path()) is first
    assert load_dataset("sinusoid", options.model_validate({"clients": 3}), Path()) is not first


def test_an_unknown_data_set_is_refused_with_the_known_names() -> None:
    with pytest.raises(ConfigError, match=r"digits.*got 'mnist'"):
        load_dataset("mnist", DATASETS["digits"].Options(), Path())
