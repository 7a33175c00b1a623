"""Features are computed once, in batches, and are found again; what cannot be encoded is said."""

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quickbloom.common.encoders.base import Encoder, Features
from quickbloom.common.encoders.encoding import Texts, encode_all
from quickbloom.common.errors import DataError


class Counting(Encoder):
    """Gives the length of a text; remembers what it was asked for."""

    kind = "text"
    size = 2
    digest = "0" * 64

    def __init__(self, most: int = 100) -> None:
        self.asked: list[str] = []
        self.batches: list[int] = []
        self._most = most

    def encode(self, examples: Sequence[Any]) -> Features:
        if len(examples) > self._most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        self.asked += examples
        self.batches.append(len(examples))
        found = np.array([[len(text), 1] for text in examples], dtype=np.float32)
        found[[text.endswith("nan") for text in examples], 0] = np.nan
        return found


def test_each_example_is_encoded_once_also_after_a_restart_and_when_rows_are_added(tmp_path: Path) -> None:
    first, second = Counting(), Counting()
    found = encode_all(first, Texts(["aa", "b", "aa"]), tmp_path)
    np.testing.assert_array_equal(found, [[2, 1], [1, 1], [2, 1]])
    assert sorted(first.asked) == ["aa", "b"]
    np.testing.assert_array_equal(encode_all(second, Texts(["b", "ccc", "aa"]), tmp_path), [[1, 1], [3, 1], [2, 1]])
    assert second.asked == ["ccc"]


def test_a_damaged_store_and_one_of_another_size_are_made_anew(tmp_path: Path) -> None:
    encode_all(Counting(), Texts(["aa"]), tmp_path)
    (file,) = tmp_path.glob("*.sqlite")
    for damage in (b"torn" * 2000, file.read_bytes()[:900]):
        file.write_bytes(damage)
        again = Counting()
        np.testing.assert_array_equal(encode_all(again, Texts(["aa"]), tmp_path), [[2, 1]])
        assert again.asked == ["aa"]
    with sqlite3.connect(file) as store:
        store.execute("update features set value = x'00'")
    again = Counting()
    np.testing.assert_array_equal(encode_all(again, Texts(["aa"]), tmp_path), [[2, 1]])
    assert again.asked == ["aa"]


def test_the_store_is_this_users_alone(tmp_path: Path) -> None:
    encode_all(Counting(), Texts(["aa"]), tmp_path)
    (file,) = tmp_path.glob("*.sqlite")
    assert file.stat().st_mode & 0o077 == 0


def test_memory_is_bounded_by_batches_which_shrink_where_they_do_not_fit(tmp_path: Path) -> None:
    texts = [f"{number}" for number in range(100)]
    folders = [tmp_path / name for name in ("wide", "narrow", "none")]
    for folder in folders:
        folder.mkdir()
    wide, narrow = Counting(), Counting(most=5)
    found = [encode_all(one, Texts(texts), folder) for one, folder in zip((wide, narrow), folders, strict=False)]
    np.testing.assert_array_equal(found[0], found[1])
    assert max(wide.batches) == Counting.at_once
    assert max(narrow.batches) == 4
    with pytest.raises(DataError, match="more memory than there is"):
        encode_all(Counting(most=0), Texts(["a"]), folders[2])


def test_features_that_are_not_finite_name_the_example(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not finite for the text 'nan'"):
        encode_all(Counting(), Texts(["a", "nan", "ccc"]), tmp_path)


def test_what_was_encoded_before_a_failure_is_kept(tmp_path: Path) -> None:
    texts = [f"{number:04}" for number in range(1100)]
    with pytest.raises(DataError):
        encode_all(Counting(), Texts([*texts, "the longest comes last: nan"]), tmp_path)
    again = Counting()
    encode_all(again, Texts(texts), tmp_path)
    assert len(again.asked) < 1100
