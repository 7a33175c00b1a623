"""The benchmark of the intents: what it asks of the command. The weights are not needed for that."""

import json
from pathlib import Path

import pytest

from benchmarks import intents
from benchmarks.pretrained import without_place
from quickbloom.common.datasets.intents import IN_PART, IntentsOptions


@pytest.mark.parametrize("cell", list(intents.CELLS))
def test_every_variant_is_understood_and_tested_on_the_same_episodes(
    cell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intents, "minilm", lambda: tmp_path)
    plan = intents.plan(cell)
    for variant in plan.variants:
        config = plan.setup(variant).config()
        options = config.table("intents")
        assert isinstance(options, IntentsOptions)
        assert (options.ways, options.shots) == intents.CELLS[cell]
        assert (options.query_shots, options.test_clients, options.test_episodes) == (2, 40, 2)
        assert options.train_ways <= IN_PART["train"]
        # Else no model before the last could be chosen.
        assert config.rounds == 1 or 0 < config.evaluate_every < config.rounds


def test_a_result_names_no_folder_of_the_machine(tmp_path: Path) -> None:
    place = tmp_path / "all-MiniLM-L6-v2"
    found = without_place({"command": f"run --set a={place} --set b=sentence:{place}", "set": [f"a={place}"], "seed": 3}, place)
    assert found == {
        "command": "run --set a=all-MiniLM-L6-v2 --set b=sentence:all-MiniLM-L6-v2",
        "set": ["a=all-MiniLM-L6-v2"],
        "seed": 3,
    }
    assert str(tmp_path) not in json.dumps(found)
