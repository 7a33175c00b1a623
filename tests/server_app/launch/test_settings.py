"""Settings as they are typed, and what is checked with the data at hand."""

from pathlib import Path

import pytest

from quickbloom.common.config.run import parse_run_config
from quickbloom.common.errors import ConfigError
from quickbloom.server_app.launch.settings import check_with_data, parse_assignments


def test_assignments_are_numbers_truth_values_or_text_and_may_leave_out_the_algorithms_table() -> None:
    given = ["rounds=7", "inner-lr=0.5", "outer-decay=false", "dataset=uji", "mlp.hidden=32,16", 'model="mlp"', "data-dir=/a=b"]
    assert parse_assignments(given, "maml") == {
        "rounds": 7,
        "maml.inner-lr": 0.5,
        "maml.outer-decay": False,
        "dataset": "uji",
        "mlp.hidden": "32,16",
        "model": "mlp",
        "data-dir": "/a=b",
    }


def test_an_assignment_without_a_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="must look like key=value"):
        parse_assignments(["=3"], "maml")


@pytest.mark.parametrize("seed", [0, 1])
def test_all_algorithms_of_a_seed_share_their_tasks(seed: int) -> None:
    configs = [parse_run_config({"algorithm": name, "seed": seed}) for name in ("fedavg", "maml", "protonet", "local")]
    first, *others = (check_with_data(config, Path())[0] for config in configs)
    assert all(other == first for other in others)
    assert [len(first[name]) for name in ("train", "validation", "test")] == [37, 8, 11]


def test_an_algorithm_that_the_data_do_not_suit_is_refused() -> None:
    with pytest.raises(ConfigError, match="protonet"):
        check_with_data(parse_run_config({"algorithm": "protonet", "dataset": "sinusoid"}), Path())
