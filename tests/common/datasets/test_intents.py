"""Intents as personal vocabularies: parts never share an intent, and a sentence is never in support and query."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_encoders
import torch

from quickbloom.common.datasets.base import generator
from quickbloom.common.datasets.intents import FILE, Intents, IntentsOptions
from quickbloom.common.errors import ConfigError, DataError

pytest.importorskip("tokenizers")


def written(folder: Path, change: Any = lambda content: content) -> Path:
    """A file of the form of CLINC150, whose sentences tell their intent and number in words of the tokenizer."""
    words = small_encoders.WORDS[4:]

    def spelled(number: int) -> str:
        return f"{words[number // len(words) ** 2]} {words[number // len(words) % len(words)]} {words[number % len(words)]}"

    intents = {f"intent_{i}": {"domain": "d", "sentences": [spelled(150 * i + k) for k in range(150)]} for i in range(150)}
    content = {"intents": intents, "out_of_scope": [f"zebra {spelled(k)}" for k in range(1200)]}
    with gzip.open(folder / FILE, "wt") as file:
        json.dump(change(content), file)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("intents"))


def load(folder: Path, **options: Any) -> Intents:
    return Intents(IntentsOptions.model_validate({"tokenizer": small_encoders.directory(), "max_length": 6, **options}), folder)


def intent_of(data: Intents, row: torch.Tensor) -> int:
    """The place in `names` of the intent that a sentence of made-up words is of."""
    base = len(small_encoders.WORDS) - 4
    a, b, c = (int(token) - 4 for token in row[1:4])
    return data.names.index(f"intent_{(a * base**2 + b * base + c) // 150}")


def test_sentences_are_ids_between_marks_with_padding_on_the_right(folder: Path) -> None:
    data = load(folder)
    first = small_encoders.WORDS.index("what")
    assert data.encode(["what is the", "what what what what what what what"]).tolist() == [
        [2, first, first + 1, first + 2, 3, 0],
        [2, first, first, first, first, 3],  # cut, with its end mark
    ]
    assert data.spec.tokens == small_encoders.VOCABULARY
    assert data.out_of_scope.shape == (1200, 6)
    assert data.out_of_scope[0, 1] == 1  # [UNK]


def test_users_of_different_parts_share_no_intent_and_each_draw_has_different_sentences(folder: Path) -> None:
    data = load(folder, ways=12, train_ways=15, shots=2, query_shots=3, test_episodes=3)
    seen: dict[str, set[int]] = {"train": set(), "validation": set(), "test": set()}
    for task in data.tasks():
        draws = [data.train_draw(task.task_id, generator(0, task.task_id)), *data.test_draws(task.task_id)]
        for draw in draws:
            for part, shots in ((draw.support, 2), (draw.query, 3)):
                labels = [[intent_of(data, row) for row in part.x[part.y == label]] for label in range(part.y.max() + 1)]
                assert all(len(set(of_label)) == 1 and len(of_label) == shots for of_label in labels)
                assert len({of_label[0] for of_label in labels}) == len(labels)
                seen[task.split] |= {of_label[0] for of_label in labels}
            rows = torch.cat([draw.support.x, draw.query.x])
            assert len(set(map(tuple, rows.tolist()))) == len(rows)
    assert seen["train"] <= set(range(100))
    assert seen["validation"] == set(range(100, 110))  # 12 ways, and there are 10
    assert seen["test"] <= set(range(110, 150))
    assert len(seen["train"]) > 90


def test_the_parts_are_fixed_by_the_names_alone(folder: Path, tmp_path: Path) -> None:
    def turned(content: Any) -> Any:
        return {**content, "intents": dict(reversed(content["intents"].items()))}

    assert load(folder).names == load(written(tmp_path, turned)).names
    assert load(folder).names[:2] == ("intent_124", "intent_64")  # by SHA-256, computed with sha256sum


def test_users_may_have_own_intents_which_do_not_change(folder: Path) -> None:
    data = load(folder, ways=5, own_intents=8)
    assert len(data.intents_of("train-000")) == 8
    assert data.intents_of("train-000") != data.intents_of("train-001")
    own = set(data.intents_of("test-003"))
    drawn = {data.names[intent_of(data, row)] for draw in data.test_draws("test-003") for row in draw.query.x}
    assert drawn <= own
    assert len(load(folder, ways=5, own_intents=20).intents_of("validation-000")) == 10
    assert load(folder, ways=5, own_intents=8, data_seed=1).intents_of("train-000") != data.intents_of("train-000")


def test_test_draws_are_the_same_in_every_run_and_train_draws_differ_by_round(folder: Path) -> None:
    one, other = load(folder, ways=5), load(folder, ways=5)
    for a, b in zip(one.test_draws("test-000"), other.test_draws("test-000"), strict=True):
        assert torch.equal(a.support.x, b.support.x)
        assert torch.equal(a.test.x, b.test.x)
    rounds = [one.train_draw("train-000", generator(0, number, "train-000")) for number in (1, 1, 2)]
    assert torch.equal(rounds[0].support.x, rounds[1].support.x)
    assert not torch.equal(rounds[0].support.x, rounds[2].support.x)


def test_what_cannot_work_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"`intents\.tokenizer` must name a directory with a tokenizer\.json, got ''"):
        load(folder, tokenizer="")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(folder, tokenizer=str(tmp_path))
    with pytest.raises(DataError, match=r"`shots` \+ `query-shots` must be below 150"):
        load(folder, shots=75, query_shots=75)
    with pytest.raises(DataError, match="`own-intents` must be 0 or at least 15"):
        load(folder, train_ways=15, own_intents=10)
    with pytest.raises(DataError, match="does not exist"):
        load(tmp_path)


@pytest.mark.parametrize("flaw", ["few", "short", "number", "list"])
def test_a_file_of_another_form_is_refused(tmp_path: Path, flaw: str) -> None:
    def change(content: Any) -> Any:
        if flaw == "few":
            content["intents"].popitem()
        elif flaw == "short":
            content["intents"]["intent_7"]["sentences"].pop()
        elif flaw == "number":
            content["out_of_scope"][3] = 5
        return [content] if flaw == "list" else content

    with pytest.raises(DataError, match="must hold `intents`, 150 of them with 150 `sentences` each"):
        load(written(tmp_path, change))


def test_a_sentence_that_occurs_twice_is_drawn_once(tmp_path: Path) -> None:
    def change(content: Any) -> Any:
        for one in content["intents"].values():
            one["sentences"] = [one["sentences"][k % 75] for k in range(150)]
        return content

    data = load(written(tmp_path, change), ways=2, shots=40, query_shots=35)
    draw = data.train_draw("train-000", np.random.default_rng(0))
    assert len(set(map(tuple, torch.cat([draw.support.x, draw.query.x]).tolist()))) == 150
