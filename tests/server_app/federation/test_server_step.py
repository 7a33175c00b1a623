"""Algorithms whose server does more than one step along the mean: in a federation, over a stop, coded, and refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from loopback import LoopbackGrid

from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.params import Params, norm, subtract
from quickbloom.common.personal import checkpoint
from quickbloom.common.wire.messages import TRAIN
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.federation.outer import OuterOptimizer
from quickbloom.server_app.runs.checkpoints import load
from quickbloom.server_app.runs.resume import restore_model

NAMES = ("scaffold", "feddyn", "fedproto", "fedpac")


class Killed(BaseException):
    """The end of the server in the middle of a run."""


def settings(folder: Path, name: str, **changes: Any) -> RunConfig:
    flat = {
        "mlp.hidden": "6",
        "min-nodes": 1,
        "rounds": 4,
        "adapt-steps": 2,
        "seed": 1,
        "evaluate-every": 0,
        "baselines": False,
    }
    flat |= {"algorithm": name, "tasks-per-round": 9, "output-dir": str(folder), "personal": False}
    return parse_run_config({**flat, **{key.replace("_", "-"): v for key, v in changes.items()}}).resolved()


def run(folder: Path, name: str, state: Path, killed_in: int = 0, **changes: Any) -> None:
    """One node with all tasks, whose state is in the folder `state`; the server dies before round `killed_in`."""

    def fault(message: Message, answer: Callable[[Message], Message]) -> Message:
        if message.metadata.message_type == TRAIN and message.metadata.group_id == str(killed_in):
            raise Killed
        return answer(message)

    config = settings(folder, name, **changes)
    run_federation(LoopbackGrid(1, config.flat(), {0: fault}, {0: {"state-dir": str(state)}}), config)


def tensors(folder: Path, number: int = 4) -> Params:
    return load(folder / "checkpoints" / f"round-{number:06}.safetensors").tensors


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_was_cut_off_goes_on_with_the_state_of_server_and_nodes(tmp_path: Path, name: str) -> None:
    run(tmp_path / "whole", name, tmp_path / "one")
    with pytest.raises(Killed):
        run(tmp_path / "parts", name, tmp_path / "two", killed_in=3)
    run(tmp_path / "parts", name, tmp_path / "two", resume_from=str(tmp_path / "parts"))
    whole, parts = (tensors(tmp_path / folder) for folder in ("whole", "parts"))
    ours = [key for key in whole if key.startswith(("meta/", "server/"))]
    assert any(key.startswith("server/") for key in ours) == (name == "feddyn")
    assert all(torch.equal(whole[key], parts[key]) for key in ours)
    assert not all(torch.equal(whole[key], tensors(tmp_path / "whole", 3)[key]) for key in ours)


@pytest.mark.parametrize("name", NAMES)
def test_coded_contributions_lead_to_nearly_the_same_model(tmp_path: Path, name: str) -> None:
    models = []
    for kind in ("float32", "int8"):
        run(tmp_path / kind, name, tmp_path / f"{kind}-state", update_dtype=kind)
        models.append({key: value for key, value in tensors(tmp_path / kind).items() if key.startswith("meta/")})
    whole, coded = models
    assert 0 < norm(subtract(whole, coded)) < 0.1 * norm(whole)


def test_the_state_of_the_server_must_be_in_a_checkpoint_and_fit(tmp_path: Path) -> None:
    run(tmp_path / "run", "feddyn", tmp_path / "state", rounds=1)
    path = tmp_path / "run" / "checkpoints" / "round-000001.safetensors"
    found = load(path)
    outer = OuterOptimizer(
        settings(tmp_path, "feddyn").table("feddyn"),  # type: ignore[arg-type]
        found.meta,
        4,
        {key.removeprefix("server/"): torch.zeros_like(value) for key, value in found.tensors.items() if "server/" in key},
    )
    restore_model(found, outer)
    assert torch.equal(outer.beside["1.bias"], found.tensors["server/1.bias"])
    assert found.tensors["server/1.bias"].abs().sum() > 0
    facts = found.facts
    checkpoint.write(path, {key: value for key, value in found.tensors.items() if key != "server/1.bias"}, facts, wait=True)
    with pytest.raises(ConfigError, match=r"another server's state: the tensor `1.bias` is missing"):
        restore_model(load(path), outer)
