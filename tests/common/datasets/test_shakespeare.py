"""Shakespeare by role, checked against the file's own text."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from quickbloom.common.datasets import shakespeare
from quickbloom.common.datasets.shakespeare import CHARACTERS, FILE, TOKENS, Shakespeare, ShakespeareOptions
from quickbloom.common.errors import DataError
from quickbloom.common.maths.batch import Batch, TaskData


@pytest.fixture(scope="session")
def plays(data_dir: Path) -> Any:
    return json.loads(gzip.decompress((data_dir / FILE).read_bytes()))


@pytest.fixture(scope="session")
def dataset(data_dir: Path) -> Shakespeare:
    return Shakespeare(ShakespeareOptions(), data_dir)


def written(folder: Path, content: Any) -> Path:
    """A folder with a data file of this content; bytes are written as they are."""
    data = content if isinstance(content, bytes) else gzip.compress(json.dumps(content).encode())
    (folder / FILE).write_bytes(data)
    return folder


def play(*speeches: tuple[str, str]) -> dict[str, Any]:
    return {"title": "A Play", "speeches": [list(speech) for speech in speeches]}


def text_of(batch: Batch) -> list[str]:
    """Every example as text: the context and the character to predict."""
    rows = torch.cat([batch.x, batch.y[:, None]], dim=1).tolist()
    return ["".join((CHARACTERS + "#")[i] for i in row) for row in rows]


def numbered(length: int) -> str:
    """A text in which every three characters tell where they stand."""
    digits = CHARACTERS[10:]
    places = (digits[n // 60] + digits[n % 60] for n in range(length // 2 + 1))
    return "".join(places)[:length]


def test_the_characters_are_those_of_the_file(plays: Any) -> None:
    used = {character for content in plays.values() for speech in content["speeches"] for character in speech[1]}
    assert "".join(sorted(used)) == CHARACTERS
    assert TOKENS == 77


def test_the_default_keeps_the_448_roles_of_at_least_2000_characters(dataset: Shakespeare) -> None:
    names = [task.task_id for task in dataset.tasks()]
    assert len(names) == 448
    assert {"hamlet-hamlet", "romeo-juliet-nurse", "1henryiv-falstaff"} <= set(names)


def test_examples_are_what_the_role_says(dataset: Shakespeare, plays: Any) -> None:
    said = "".join(text + "\n" for role, text in plays["hamlet"]["speeches"] if role == "HAMLET")
    for draw in (dataset.train_draw("hamlet-hamlet", np.random.default_rng(1)), *dataset.test_draws("hamlet-hamlet")):
        for part in (draw.support, draw.query, draw.test):
            assert all(len(example) == 21 and example in said for example in text_of(part))


def test_labels_have_the_frequency_of_the_characters(dataset: Shakespeare, plays: Any) -> None:
    said = Counter("".join(text + "\n" for role, text in plays["hamlet"]["speeches"] if role == "HAMLET"))
    draws = [dataset.train_draw("hamlet-hamlet", np.random.default_rng(seed)) for seed in range(150)]
    drawn = Counter(CHARACTERS[i] for draw in draws for i in draw.support.y.tolist())
    for character in " et":
        assert drawn[character] / drawn.total() == pytest.approx(said[character] / said.total(), abs=0.03)


def reach(batch: Batch, text: str) -> tuple[int, int]:
    """The first place of a text that examples of a batch touch, and the one after the last."""
    places = [text.index(example) for example in text_of(batch)]
    return min(places), max(places) + len(text_of(batch)[0])


@given(
    context=st.integers(2, 12),
    support=st.integers(1, 12),
    query=st.integers(1, 12),
    test=st.integers(1, 12),
    more=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_no_character_is_in_two_parts_and_the_test_part_is_the_last_fifth(
    tmp_path_factory: pytest.TempPathFactory, context: int, support: int, query: int, test: int, more: int, seed: int
) -> None:
    least = max(4 * (context + max(support, query)), 5 * (context + test))
    counts = {"support-examples": support, "query-examples": query, "test-examples": test}
    options = ShakespeareOptions.model_validate({"context": context, "min-characters": least, **counts})
    text = numbered(least + more - 1)
    folder = written(tmp_path_factory.mktemp("data"), {"p": play(("A", text))})
    draw = Shakespeare(options, folder).train_draw("p-a", np.random.default_rng(seed))
    parts = [reach(part, text + "\n") for part in (draw.support, draw.query, draw.test)]
    first, second, last = sorted(parts)
    assert first[1] <= second[0]
    assert second[1] <= round(0.8 * (least + more)) <= last[0]
    assert last == parts[2]
    assert [len(set(text_of(part))) for part in (draw.support, draw.query, draw.test)] == [support, query, test]


def test_the_cut_moves_and_either_side_is_support(tmp_path: Path) -> None:
    text = numbered(2000)
    dataset = Shakespeare(ShakespeareOptions(), written(tmp_path, {"p": play(("A", text))}))
    draws = [dataset.train_draw("p-a", np.random.default_rng(seed)) for seed in range(60)]
    support_first = sum(reach(draw.support, text + "\n") < reach(draw.query, text + "\n") for draw in draws)
    assert 15 < support_first < 45
    ends = [min(reach(draw.support, text + "\n")[1], reach(draw.query, text + "\n")[1]) for draw in draws]
    assert max(ends) > 900
    assert min(ends) < 700


def test_a_role_is_one_task_over_all_its_speeches_and_spellings(tmp_path: Path) -> None:
    speeches = [("First Lord", "ab" * 20), ("OTHER", "x"), ("FIRST LORD:", "cd" * 30)]
    options = ShakespeareOptions.model_validate(
        {"context": 2, "min-characters": 100, "support-examples": 5, "query-examples": 5, "test-examples": 5}
    )
    dataset = Shakespeare(options, written(tmp_path, {"a_play": play(*speeches), "b": play(("First Lord", "z" * 200))}))
    assert [task.task_id for task in dataset.tasks()] == ["a-play-first-lord", "b-first-lord"]
    draws: list[TaskData] = [dataset.train_draw("a-play-first-lord", np.random.default_rng(seed)) for seed in range(40)]
    seen = {example for draw in draws for part in (draw.support, draw.query) for example in text_of(part)}
    assert {"aba", "bab", "b\nc", "cdc"} <= seen
    assert not any("x" in example or "z" in example for example in seen)


def test_characters_outside_the_vocabulary_share_the_last_id(tmp_path: Path) -> None:
    text = "\x7f#\u00e9\u4e2d\U0001f600\ud800" * 400
    dataset = Shakespeare(ShakespeareOptions(), written(tmp_path, {"p": play(("A", text))}))
    draw = dataset.train_draw("p-a", np.random.default_rng(0))
    assert set(draw.support.x.flatten().tolist()) == {TOKENS - 1}


def test_test_draws_follow_the_data_seed(data_dir: Path, dataset: Shakespeare) -> None:
    again, other = (Shakespeare(ShakespeareOptions(data_seed=seed), data_dir) for seed in (0, 1))
    (one,) = dataset.test_draws("hamlet-hamlet")
    assert torch.equal(one.test.x, again.test_draws("hamlet-hamlet")[0].test.x)
    assert not torch.equal(one.test.x, other.test_draws("hamlet-hamlet")[0].test.x)


@pytest.mark.parametrize(
    "changes", [{"context": 400}, {"min-characters": 349}, {"support-examples": 500}, {"test-examples": 400}], ids=str
)
def test_roles_too_short_for_the_examples_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match=r"`shakespeare\.min-characters` must be at least"):
        ShakespeareOptions.model_validate(changes)
    ShakespeareOptions.model_validate({"min-characters": 350})  # 5 * (20 + 50)


def test_no_role_that_says_enough_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"`min-characters` must be at most 6,.*got 2000: lower it"):
        Shakespeare(ShakespeareOptions(), written(tmp_path, {"p": play(("A", "hello"))}))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"shakespeare_by_role\.json\.gz' does not exist.*QUICKBLOOM_DATA_DIR"):
        Shakespeare(ShakespeareOptions(), tmp_path)


# Without the time in its header: the bytes are part of tests' names, which are the same in every process that collects them.
GOOD = gzip.compress(json.dumps({"p": play(("A", "x" * 3000))}).encode(), mtime=0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not readable JSON"),
        (b"no gzip", "is not readable JSON"),
        (GOOD[:-5], "is not readable JSON"),
        (GOOD[:20] + b"\xff\xff" + GOOD[22:], "is not readable JSON"),
        (gzip.compress(b"{", mtime=0), "is not readable JSON"),
        (gzip.compress(b"\xff\xfe\xfa", mtime=0), "is not readable JSON"),
        (gzip.compress(b"[" * 200_000, mtime=0), "is not readable JSON"),
        (["p"], "must hold an object with a key for every play, got a list"),
        ({"p": []}, r"must hold `speeches` as a list of \[role, text\].*play 'p'"),
        ({"p": {"title": "A Play"}}, "must hold `speeches`"),
        ({"p": {"speeches": "text"}}, "must hold `speeches`"),
        ({"p": {"speeches": [["A", 1]]}}, "must hold `speeches`"),
        ({"p": {"speeches": [["A"]]}}, "must hold `speeches`"),
        ({"p": {"speeches": ["AB"]}}, "must hold `speeches`"),
    ],
)
def test_a_damaged_or_different_file_is_refused_with_one_sentence(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        Shakespeare(ShakespeareOptions(), written(tmp_path, content))
    assert str(tmp_path / FILE) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shakespeare, "MAX_BYTES", 1000)
    with pytest.raises(DataError, match="must unpack to at most 1000 bytes"):
        Shakespeare(ShakespeareOptions(), written(tmp_path, GOOD))


def test_task_ids_are_plain(dataset: Shakespeare) -> None:
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", task.task_id) for task in dataset.tasks())
