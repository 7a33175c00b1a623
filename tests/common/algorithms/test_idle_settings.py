"""Every setting of an algorithm's table decides something in a run with the others as they are, or is refused there."""

import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic.fields import FieldInfo

from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.errors import ConfigError
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.messaging.in_process_grid import InlineGrid

SMALL: dict[str, Any] = {
    "dataset": "digits",
    "min-nodes": 1,
    "rounds": 3,
    "evaluate-every": 2,
    "adapt-steps": 2,
    "adapt-lrs": "0.1",
    "baselines": False,
    "personal": False,
}
NEEDED: dict[str, dict[str, Any]] = {"fedbn": {"mlp.norm": "layer"}}
TEXTS = ("head", "higher")
"""Settings that are names of parameters, which other tests look at."""


def outcome(path: Path, **settings: Any) -> Any:
    """What a run trained and scored, without its clocks. Raises ConfigError."""
    config = parse_run_config({**SMALL, "output-dir": str(path), **settings})
    run_federation(InlineGrid(1, config.flat(), {}), config)
    lines = [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]
    summary = json.loads((path / "summary.json").read_text())
    trained = [(line["train"], line.get("validation")) for line in lines]
    return json.dumps([trained, [summary.get(part) for part in ("test", "validation", "seen")]])


def others(field: FieldInfo) -> list[Any]:
    """Values that a setting may have beside its default: every one that is listed, else a number."""
    default = field.default
    if isinstance(default, bool):
        return [not default]
    if get_origin(field.annotation) is Literal:
        return [value for value in get_args(field.annotation) if value != default]
    lowest = max(bound for one in field.metadata for key in ("ge", "gt") if (bound := getattr(one, key, None)) is not None)
    if isinstance(default, int):
        return [max(default + 1, lowest)]
    return [default / 2 if default > 0 else 0.35]


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_setting_decides_something_or_is_refused(name: str, tmp_path: Path) -> None:
    algorithm = ALGORITHMS[name]
    kind = {} if "classification" in algorithm.kinds else {"dataset": "sinusoid"}
    usual = {"algorithm": name, **kind, **NEEDED.get(name, {})}
    plain = outcome(tmp_path / "plain", **usual)
    assert outcome(tmp_path / "again", **usual) == plain
    idle = []
    for key, field in algorithm.Options.model_fields.items():
        for value in [] if key in TEXTS else others(field):
            setting = f"{name}.{key.replace('_', '-')}"
            try:
                found = outcome(tmp_path / f"{key}-{value}", **{**usual, setting: value})
            except ConfigError as refused:
                if key.replace("_", "-") in str(refused):
                    continue
                raise
            if found == plain:
                idle.append(f"{setting} = {value!r}")
    assert idle == []
