"""What `partition` may say, and what it means."""

from typing import Any

import pytest

from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.errors import ConfigError
from quickbloom.common.partition import Partition, Scheme, read_scheme


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("dirichlet:0.1", Scheme("dirichlet", 0.1)),
        ("dirichlet:1:unbalanced", Scheme("dirichlet", 1.0, balanced=False)),
        ("pathological:2", Scheme("pathological", 2)),
        ("shards", Scheme("shards", 2)),
        ("shards:3", Scheme("shards", 3)),
        ("size:exp", Scheme("size", curve="exponential")),
        ("size:linear", Scheme("size", curve="linear")),
        ("size:10,20", Scheme("size", sizes=(10, 20))),
        ("iid", Scheme("iid")),
        ("natural:who: exactly", Scheme("natural", column="who: exactly")),
    ],
)
def test_a_scheme_is_read(text: str, scheme: Scheme) -> None:
    assert read_scheme(text) == scheme


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dirichlet:0", "must be above 0, such as 0.1, got 'dirichlet:0'"),
        ("dirichlet:-1", "must be above 0"),
        ("dirichlet:nan", "must be above 0"),
        ("dirichlet:many", "must be above 0"),
        ("dirichlet", "must be dirichlet:0.1"),
        ("dirichlet:0.1:wild", "may end in :unbalanced"),
        ("pathological:0", "classes of each user as a whole number from 1, got 'pathological:0'"),
        ("pathological:1.5", "whole number"),
        ("shards:x", "shards of each user"),
        ("size:cubic", "linear, square or exponential"),
        ("size:5", "a size for each of two users or more"),
        ("natural:", "must be dirichlet:0.1"),
        ("iid:3", "must be dirichlet:0.1"),
        ("random", "docs/partitions.md"),
    ],
)
def test_another_scheme_is_refused_in_one_sentence(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match="`partition") as caught:
        read_scheme(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_shares_are_of_all_examples_and_sum_up_to_one() -> None:
    assert Partition("iid", 2, test_share=0.2, support_share=0.25).shares == pytest.approx((0.2, 0.6, 0.2))


def settings(**values: Any) -> RunConfig:
    return parse_run_config({name.replace("_", "-"): value for name, value in values.items()})


def test_a_run_without_a_partition_has_users_of_its_own() -> None:
    assert settings(dataset="digits").spread is None
    assert settings(dataset="digits").table("digits") == settings(dataset="digits").table("digits")


def test_the_settings_of_the_run_reach_the_data_set() -> None:
    config = settings(dataset="digits", partition="iid", users=7, partition_seed=3, test_share=0.3)
    found = config.table("digits")
    assert found.partition == Partition("iid", 7, 3, test_share=0.3)  # type: ignore[attr-defined]
    assert found != settings(dataset="digits", partition="iid", users=8).table("digits")
    assert found == config.resolved().table("digits")
    assert config.table("own") == RunConfig().table("own")


def test_a_data_set_that_is_one_table_says_what_is_usual() -> None:
    found = settings(dataset="fashion-mnist").spread
    assert found is not None
    assert (found.text, found.users) == ("dirichlet:0.1", 20)
    assert settings(dataset="fashion-mnist", partition="shards").spread == Partition("shards", 20)


def test_the_name_of_a_data_set_of_the_hub_is_a_setting_of_its_own() -> None:
    config = settings(dataset="hub:ylecun/mnist")
    assert (config.dataset, config.flat()["hub.name"]) == ("hub", "ylecun/mnist")
    assert parse_run_config(config.flat()) == config


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"dataset": "omniglot", "partition": "iid"}, "which has users of its own"),
        ({"dataset": "omniglot", "users": 3}, "`users` is for the data sets digits, fashion-mnist, hub, own"),
        ({"dataset": "digits", "users": 3}, "got 3 without one"),
        ({"dataset": "digits", "partition": "iid"}, "`users` must be at least 2"),
        ({"dataset": "digits", "partition": "iid", "users": 1}, "`users` must be at least 2"),
        ({"dataset": "own", "partition": "natural:a", "users": 4}, "`users` must be 0"),
        ({"dataset": "own", "partition": "size:4,5", "users": 3}, "`users` must be 2"),
        ({"dataset": "digits", "partition": "iid", "users": 4, "test_share": 1.0}, "`test-share` must be"),
    ],
)
def test_settings_that_cannot_work_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(**values)
    assert said in str(caught.value)
