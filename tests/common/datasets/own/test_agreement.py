"""Categories, and what nodes with files of their own agree on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quickbloom.common.datasets.own import Own, OwnOptions
from quickbloom.common.datasets.own.agreement import agree, core, fits
from quickbloom.common.datasets.own.columns import MOST_KEYS, Schema
from quickbloom.common.datasets.own.text import Text
from quickbloom.common.datasets.own.vocabulary import input_names, key, places, vocabulary
from quickbloom.common.errors import DataError


def schema(kinds: dict[str, str], classes: str = "ab", **values: list[str]) -> Schema:
    words = {name: sorted(key(name, value) for value in listed) for name, listed in values.items()}
    return Schema("y", list(classes), kinds, words)


def test_every_value_has_an_input_of_its_own_and_two_more_are_for_others_and_none() -> None:
    text = Text.of(["M", "F", "", "M"])
    keys = vocabulary("sex", text, 1, 256)
    hot = places("sex", Text.of(["M", "F", "X", ""]), keys).one_hot()
    names = input_names("sex", text, keys)
    assert hot.sum(axis=1).tolist() == [1, 1, 1, 1]
    assert [names[int(place)] for place in hot.argmax(axis=1)] == ["sex=M", "sex=F", "sex: other", "sex: missing"]
    assert key("sex", "M") not in [key("site", "M"), key("sex", "m")]


def test_rare_values_are_kept_back_and_the_most_frequent_ones_stay() -> None:
    text = Text.of(["a"] * 5 + ["b"] * 3 + ["c"] * 2 + ["d"])
    assert vocabulary("x", text, 2, 256) == sorted(key("x", value) for value in "abc")
    assert vocabulary("x", text, 1, 2) == sorted(key("x", value) for value in "ab")


def test_the_categories_of_all_nodes_are_joined_whatever_their_order() -> None:
    first, second = schema({"sex": "text"}, sex=["M", "F"]), schema({"sex": "text"}, sex=["F", "X"])
    agreed = agree([(first, 3), (second, 1)], 256)
    assert agreed == agree([(second, 1), (first, 3)], 256)
    assert agreed.vocabularies["sex"] == sorted(key("sex", value) for value in "MFX")
    assert fits(first, agreed)
    assert fits(second, agreed)
    # What most nodes have comes first.
    assert agree([(first, 3), (second, 1)], 1).vocabularies["sex"] == [key("sex", "F")]


def test_a_column_that_is_empty_on_a_node_is_what_it_is_on_the_others() -> None:
    empty, full = schema({"x": ""}), schema({"x": "number"})
    agreed = agree([(empty, 5), (full, 1)], 256)
    assert agreed.features == {"x": "number"}
    assert fits(empty, agreed)
    words = schema({"x": "text"}, x=["u"])
    assert agree([(empty, 5), (words, 1)], 256).vocabularies == {"x": [key("x", "u")]}
    assert agree([(empty, 5)], 256).features == {"x": "number"}


@pytest.mark.parametrize(
    "odd", [schema({"x": "text"}, x=["u"]), schema({"x": "number"}, classes="ac"), schema({"z": "number"})]
)
def test_the_minority_with_other_columns_does_not_fit(odd: Schema) -> None:
    most = schema({"x": "number"})
    agreed = agree([(odd, 1), (most, 2)], 256)
    assert core(agreed) == core(most)
    assert not fits(odd, agreed)


KEY = "0123456789abcdef"
FORM: dict[str, Any] = {
    "target": "y",
    "classes": ["a", "b"],
    "features": [["x", "text"]],
    "vocabularies": {"x": [KEY]},
    "cyclic": [],
}
BAD_KEYS: list[Any] = [[], {"x": [KEY, KEY]}, {"x": ["short"]}, {"x": {KEY: 1}}, {"z": [KEY]}]
ODD = [
    *("", "[]", "{", '{"target": 1}', '{"x": 1}', "null", "[" * 200_000),
    *(json.dumps({**FORM, "features": other}) for other in (3, [["x", "foo"]], [["x", 1]], [["x", "number"]])),
    *(json.dumps({**FORM, "classes": other}) for other in ("ab", ["a", "a"], [1, 2], {"a": 1})),
    *(json.dumps({**FORM, "cyclic": other}) for other in ("x", ["z"], {"x": 1})),
    *(json.dumps({**FORM, "vocabularies": other}) for other in BAD_KEYS),
    json.dumps({**FORM, "target": "\ud800"}),
    json.dumps({**FORM, "vocabularies": {"x": [f"{number:016x}" for number in range(MOST_KEYS + 1)]}}),
]


def test_the_form_of_a_schema_is_read() -> None:
    assert Schema.from_json(json.dumps(FORM)).vocabularies == {"x": [KEY]}


@pytest.mark.parametrize("text", ODD, ids=[text[:40] for text in ODD])
def test_a_schema_of_another_form_is_one_sentence(text: str) -> None:
    with pytest.raises(DataError, match="has a form that this release cannot read"):
        Schema.from_json(text)


def test_a_schema_comes_back_as_it_was() -> None:
    made: Any = schema({"x": "number", "sex": "text"}, sex=["M"])
    assert Schema.from_json(made.to_json()) == made
    assert np.array_equal(list(made.features), ["x", "sex"])


def test_many_columns_of_text_share_what_all_may_have_together(tmp_path: Path) -> None:
    """300 columns of 256 categories would be 76,800 keys, which no reader takes: each has 218."""
    number = 300
    first, second = (
        Schema("y", ["a", "b"], {f"x{i}": "text" for i in range(number)}, {f"x{i}": words(i, start) for i in range(number)})
        for start in (0, 150)
    )
    agreed = agree([(first, 1), (second, 1)], 256)
    assert {len(keys) for keys in agreed.vocabularies.values()} == {MOST_KEYS // number}
    assert Schema.from_json(agreed.to_json()) == agreed
    rows = [",".join(["A", "ab"[row % 2], *(f"v{row}" for _ in range(number))]) for row in range(256)]
    (tmp_path / "f.csv").write_text("\n".join([",".join(["task", "y", *(f"x{i}" for i in range(number))]), *rows]))
    data = Own(OwnOptions(path=str(tmp_path / "f.csv"), task_column="task"), Path())
    assert Schema.from_json(data.spec.schema) == data.schema


def words(column: int, start: int) -> list[str]:
    return sorted(key(f"x{column}", str(value)) for value in range(start, start + 200))
