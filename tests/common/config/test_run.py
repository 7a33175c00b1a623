"""Settings: what goes in comes out, and every mistake is one sentence that names the key."""

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quickbloom.common.config.parts import table_types
from quickbloom.common.config.run import NodeConfig, parse_node_config, parse_run_config
from quickbloom.common.errors import ConfigError, one_line

# A deadline per example would fail on a busy machine.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

DEFAULTS = parse_run_config({}).flat()
ANYTHING = st.one_of(
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.none(),
    st.binary(max_size=3),
    st.lists(st.integers(), max_size=2),
)


def refusal(flat: dict[str, Any], parse: Callable[[dict[str, Any]], object] = parse_run_config) -> str | None:
    """What a ConfigError says; None if the settings are taken. Any other exception goes through."""
    try:
        parse(flat)
    except ConfigError as error:
        return str(error)
    return None


GOOD = {
    "algorithm": st.sampled_from(["maml", "fedavg", "reptile", "fomaml"]),
    "dataset": st.sampled_from(["digits", "gaussian", "sinusoid"]),
    "model": st.sampled_from(["auto", "mlp", "linear"]),
    "seed": st.integers(0, 2**62),
    "rounds": st.integers(1, 10**9),
    "fraction": st.floats(0, 1, exclude_min=True),
    "test-tasks": st.floats(0, 1e6),
    "adapt-lrs": st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=4).map(lambda rates: ",".join(map(str, rates))),
    "output-dir": st.sampled_from(["", "/tmp/x", "/a b/c"]),
    "maml.inner-lr": st.floats(1e-9, 1e9),
    "reptile.outer-decay": st.booleans(),
    "gaussian.support-fraction": st.floats(0.02, 0.5),
    "mlp.hidden": st.lists(st.integers(1, 512), max_size=3).map(lambda sizes: ",".join(map(str, sizes))),
}


@given(st.fixed_dictionaries({}, optional=GOOD))
def test_flat_is_the_inverse_of_parsing(flat: dict[str, Any]) -> None:
    config = parse_run_config(flat)
    assert config.flat() == {**DEFAULTS, **flat}
    again = parse_run_config(config.flat())
    assert again.flat() == config.flat()
    assert all(again.table(name) == config.table(name) for name in table_types())


@settings(max_examples=300)
@given(st.sampled_from(sorted(DEFAULTS)), ANYTHING)
def test_any_value_is_taken_or_refused_with_the_key_named(key: str, value: Any) -> None:
    reason = refusal({key: value})
    assert reason is None or (f"`{key}`" in reason and "\n" not in reason)


@given(st.dictionaries(st.text(max_size=12) | st.sampled_from(sorted(DEFAULTS)), ANYTHING, max_size=4))
def test_any_dictionary_is_taken_or_refused(flat: dict[str, Any]) -> None:
    reason = refusal(flat)
    assert reason is None or any(one_line(key) in reason for key in flat)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("rounds", 3.0, r"`rounds` must be a valid integer, got 3\.0 \(float\)"),
        ("rounds", True, r"`rounds` must be a valid integer, got True \(bool\)"),
        ("rounds", 0, "`rounds` must be greater than or equal to 1, got 0"),
        ("fraction", "0.5", r"`fraction` must be a valid number, got '0\.5' \(str\)"),
        ("fraction", math.nan, "`fraction` must be .*finite"),
        ("device", "gpu", "`device` must be 'auto', 'cpu' or 'cuda', got 'gpu'"),
        ("maml.inner-lr", -1, r"`maml\.inner-lr` must be greater than or equal to 0, got -1"),
        ("algorithm", "mamml", "`algorithm` must be one of .*got 'mamml': did you mean `maml`"),
        ("algorithm", "decay", "got 'decay': to use one of your own run its file .*, see docs/own-algorithm.md"),
        ("dataset", "digit", "`dataset` must be one of .*did you mean `digits`"),
        ("model", "vgg", "`model` must be one of auto, "),
        ("round", 3, "there is no setting `round`: did you mean `rounds`"),
        ("adapt_steps", 3, "there is no setting `adapt_steps`: did you mean `adapt-steps`"),
        ("maml.inner-rate", 0.1, r"there is no setting `maml\.inner-rate`"),
        ("malm.inner-lr", 0.1, r"no settings table `malm` \(setting `malm\.inner-lr`\): did you mean `maml`"),
        ("linear.hidden", "3", r"there is no setting `linear\.hidden`"),
        ("adapt-lrs", "0.1;0.3", "`adapt-lrs` must be positive numbers with commas"),
        ("adapt-lrs", "", "`adapt-lrs` must be positive numbers"),
        ("adapt-lrs", "0.1,inf", "`adapt-lrs` must be positive numbers"),
        ("test-shots", "1;2", "`test-shots` must be whole numbers above 0 with commas"),
        ("test-shots", "1,0", "`test-shots` must be whole numbers above 0"),
        ("test-shots", 2.5, "`test-shots` must be whole numbers above 0"),
        ("adapt-lrs", "nan", "`adapt-lrs` must be positive numbers"),
        ("output-dir", "runs/1", "`output-dir` must be an absolute path"),
    ],
)
def test_mistakes_are_named_with_what_was_expected_and_what_came(key: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_run_config({key: value})


def test_settings_that_do_not_go_together_are_refused_in_plain_words() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_run_config({"gaussian.support-fraction": 0.9, "gaussian.query-fraction": 0.5})
    text = str(caught.value)
    assert text.startswith("`gaussian`: `support-fraction` + `query-fraction` must be at most 0.98")
    assert text.count("got") == 1


@pytest.mark.parametrize(
    ("key", "value", "others", "words"),
    [
        ("local.local-epochs", 3, {"algorithm": "local"}, "does nothing without `local.keep`, because .*, got 3: leave it out"),
        ("local.batch-size", 5, {"algorithm": "local"}, "does nothing without `local.keep`"),
        ("local.inner-optimizer", "adam", {"algorithm": "local"}, "without `local.keep`, .*, got 'adam'"),
        ("local.outer-lr", 0.1, {"algorithm": "local", "local.keep": True}, "because no weights travel"),
        ("fedproto.outer-lr", 0.1, {"algorithm": "fedproto"}, "because no weights travel that the server could move, got 0.1"),
        ("fedproto.outer-optimizer", "sgd", {"algorithm": "fedproto"}, "because no weights travel"),
        ("fedproto.outer-decay", True, {"algorithm": "fedproto"}, "because no weights travel"),
        ("fedavg.inner-momentum", 0.5, {"algorithm": "fedavg"}, 'with `inner-optimizer = "sgd"`, got 0.5'),
        ("partition-seed", 1, {}, "without a `partition`, because .*, got 1: leave it out"),
        ("least-per-user", 4, {"dataset": "gaussian"}, "without a `partition`"),
        ("test-share", 0.5, {"dataset": "own"}, "without a `partition`"),
        ("support-share", 0.2, {"dataset": "sinusoid"}, "without a `partition`, .*, got 0.2"),
        ("least-per-user", 4, {"partition": "iid", "users": 5}, 'with `partition = "iid"`, because dirichlet alone'),
        ("seen-users", 7, {"evaluate-users": "unseen"}, 'with `evaluate-users = "unseen"`, got 7: leave it out'),
        (
            "seen-users",
            7,
            {"dataset": "sinusoid", "sinusoid.fresh-tasks": True},
            "for the data set `sinusoid`, whose training tasks have no test examples",
        ),
        ("seen-users", 7, {"secure-aggregation": True}, "with `secure-aggregation`, because"),
        ("maml.outer-momentum", 0.5, {"algorithm": "maml"}, 'with `outer-optimizer = "adam"`, whose own beta1 is 0.9, got 0.5'),
        ("fedavg.inner-steps", 3, {"algorithm": "fedavg", "fedavg.local-epochs": 2}, "with `local-epochs`, .*, got 3"),
        ("pfedme.local-steps", 3, {"algorithm": "pfedme", "pfedme.local-epochs": 2}, "with `local-epochs`, .*, got 3"),
        ("async-buffer", 3, {}, 'with `mode = "sync"`, whose rounds wait for their tasks, got 3: leave it out'),
        ("async-staleness", 0.0, {"algorithm": "scaffold"}, 'with `mode = "sync"`'),
        ("malicious", 0.3, {}, 'with `aggregate = "mean"`, which leaves nobody out'),
        ("update-share", 0.3, {"update-dtype": "int8"}, 'with `update-dtype = "int8"`, which sends all numbers'),
        ("secure-threshold", 0.9, {}, "without `secure-aggregation`, got 0.9"),
    ],
)
def test_what_decides_nothing_in_this_run_is_refused(key: str, value: Any, others: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"^`{key}` does nothing .*{words.removeprefix('does nothing ')}"):
        parse_run_config({**others, key: value})
    parse_run_config({**others, key: DEFAULTS[key]})


@pytest.mark.parametrize(
    "settings",
    [
        {
            "algorithm": "local",
            "local.keep": True,
            "local.local-epochs": 3,
            "local.inner-optimizer": "adam",
            "local.batch-size": 5,
        },
        {"algorithm": "reptile", "local.local-epochs": 3, "fedproto.outer-lr": 0.1, "scaffold.inner-optimizer": "adam"},
        {"algorithm": "fedavg", "fedavg.inner-optimizer": "momentum", "fedavg.inner-momentum": 0.5},
        {"partition": "dirichlet:0.5", "users": 5, "least-per-user": 4, "partition-seed": 1, "test-share": 0.5},
        {"dataset": "fashion-mnist", "least-per-user": 4, "support-share": 0.2},
        {"dataset": "digits", "evaluate-users": "both", "seen-users": 7},
        {"dataset": "digits", "seen-users": 7},
        {"algorithm": "maml", "maml.outer-optimizer": "sgd", "maml.outer-momentum": 0.5, "fomaml.outer-momentum": 0.5},
        {"algorithm": "pfedme", "pfedme.inner-steps": 3, "pfedme.local-epochs": 2},
        {"mode": "async", "async-buffer": 3, "async-staleness": 0.1, "async-fairness": 0.0},
        {"aggregate": "median", "malicious": 0.3, "update-dtype": "top-k", "update-share": 0.3},
        {"secure-aggregation": True, "secure-threshold": 0.9},
    ],
)
def test_what_decides_something_is_taken_and_so_are_tables_of_other_algorithms(settings: dict[str, Any]) -> None:
    flat = parse_run_config(settings).flat()
    assert {key: flat[key] for key in settings} == settings


def test_an_optimizer_that_the_algorithm_has_no_steps_of_is_refused_with_the_settings() -> None:
    with pytest.raises(ConfigError, match=r'`scaffold.inner-optimizer` must be "sgd".*got "adam": leave it out'):
        parse_run_config({"algorithm": "scaffold", "scaffold.inner-optimizer": "adam"})


def test_a_whole_number_is_taken_where_a_number_or_a_list_of_numbers_is_expected() -> None:
    config = parse_run_config({"fraction": 1, "mlp.hidden": 32, "adapt-lrs": 0.5})
    assert (config.fraction, config.lrs) == (1.0, (0.5,))
    assert config.flat()["mlp.hidden"] == "32"


def test_auto_takes_the_model_that_the_data_set_recommends() -> None:
    assert parse_run_config({"dataset": "sinusoid"}).resolved().model == "sine"
    assert parse_run_config({"dataset": "sinusoid", "model": "linear"}).resolved().model == "linear"


def test_settings_cannot_be_changed_afterwards() -> None:
    config = parse_run_config({})
    with pytest.raises(ValueError, match="frozen"):
        config.__setattr__("rounds", 3)


def test_node_settings_have_defaults_and_keep_what_is_named() -> None:
    assert parse_node_config({}) == NodeConfig.model_validate({})
    config = parse_node_config({"partition-id": 2, "num-partitions": 3, "threads": 4})
    assert (config.partition_id, config.num_partitions, config.threads, config.chunk_size) == (2, 3, 4, 0)


@pytest.mark.parametrize(
    ("flat", "words"),
    [
        ({"partition-id": 3, "num-partitions": 3}, r"`partition-id` must be below `num-partitions` \(3\), got 3"),
        ({"partition-id": "0"}, "node setting `partition-id` must be a valid integer"),
        ({"num-partitions": 0}, "node setting `num-partitions` must be greater than or equal to 1"),
        ({"data_dir": "/x"}, "there is no node setting `data_dir`: did you mean `data-dir`"),
        ({"device": "tpu"}, "node setting `device` must be"),
    ],
)
def test_mistakes_in_node_settings_are_named(flat: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_node_config(flat)


@given(
    st.dictionaries(
        st.sampled_from(["partition-id", "num-partitions", "data-dir", "device", "chunk-size", "threads"]), ANYTHING
    )
)
def test_any_node_settings_are_taken_or_refused(flat: dict[str, Any]) -> None:
    reason = refusal(flat, parse_node_config)
    assert reason is None or any(one_line(key) in reason for key in flat)
