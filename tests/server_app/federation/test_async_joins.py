"""A node that comes while training is asynchronous joins it, by a virtual clock as by a real one."""

from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import Message
from loopback import LoopbackGrid

from quickbloom.common.config.run import parse_run_config
from quickbloom.common.wire.messages import TRAIN
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.runs.directory import read_history


@pytest.mark.parametrize("devices", ["", "lognormal"])
def test_a_node_that_comes_during_asynchronous_training_contributes(tmp_path: Path, devices: str) -> None:
    flat = {"mlp.hidden": "8", "min-nodes": 1, "rounds": 300, "evaluate-every": 100, "seed": 1, "mode": "async"}
    flat |= {"async-buffer": 6, "async-concurrency": 12, "devices": devices, "output-dir": str(tmp_path)}
    config = parse_run_config(flat).resolved()
    asked: list[int] = []

    def comes(message: Message, answer: Callable[[Message], Message]) -> Message:
        if message.metadata.message_type == TRAIN:
            asked.append(message.metadata.dst_node_id)
            if len(asked) > 8:
                grid.node_ids = [100, 101, 102, 103]
        return answer(message)

    grid = LoopbackGrid(4, config.flat(), dict.fromkeys(range(4), comes))
    grid.node_ids = [100, 101, 102]
    summary = run_federation(grid, config)
    rounds = read_history(tmp_path)
    (joined,) = (record["joined"] for record in rounds if "joined" in record)
    assert (joined["nodes"], summary["joined"]) == ([103], {"nodes": 1, "tasks": 14})
    assert 103 in asked
    assert any(103 in record["nodes"]["trained"] for record in rounds)
