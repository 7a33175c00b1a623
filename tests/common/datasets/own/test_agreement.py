"""Categories, and what nodes with files of their own agree on."""

from typing import Any

import numpy as np
import pytest

from common.datasets.own.agreement import agree, core, fits
from common.datasets.own.columns import Schema
from common.datasets.own.text import Text
from common.datasets.own.vocabulary import input_names, key, places, vocabulary
from common.errors import DataError


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


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"target": 1}', '{"target": "y", "classes": ["a"], "features": 3}', '{"x": 1}', "null"]
)
def test_a_schema_of_another_form_is_one_sentence(text: str) -> None:
    with pytest.raises(DataError, match="not said in a form that this release reads"):
        Schema.from_json(text)


def test_a_schema_comes_back_as_it_was() -> None:
    made: Any = schema({"x": "number", "sex": "text"}, sex=["M"])
    assert Schema.from_json(made.to_json()) == made
    assert np.array_equal(list(made.features), ["x", "sex"])
