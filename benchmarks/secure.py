"""Cost of secure sums beside plain rounds: bytes and seconds per round, all nodes in one process, one core.

Seconds are CPU time of all nodes and the server together. Over a network the three more messages
per node add their latency. Both runs do the same training, and end with the same loss.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Message

from benchmarks.runner import commit, finish, goal, machine, say
from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.wire.messages import TRAIN
from quickbloom.common.wire.secure.messages import KEYS, MASKED
from quickbloom.common.wire.secure.protocol import needed
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.comparing.batch import today
from quickbloom.server_app.messaging.in_process_grid import InlineGrid
from quickbloom.server_app.runs.directory import read_history

SETTINGS = {
    **{"dataset": "gaussian", "model": "mlp", "algorithm": "fedavg"},
    # With two tasks per node, at least one of which trains: every node is in every sum.
    **{"validation-tasks": 1, "test-tasks": 1, "evaluate-every": 0, "adapt-steps": 1, "checkpoint-every": 0},
}


class MeasuringGrid(InlineGrid):
    """A grid that notes when rounds begin. The first `drop_outs` nodes send their shares and then nothing."""

    drop_outs = 0

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.began: dict[str, float] = {}

    def answer(self, message: Message) -> Message | None:
        if message.metadata.message_type in (KEYS, TRAIN):
            self.began.setdefault(message.metadata.group_id, time.process_time())
        dropped = message.metadata.message_type == MASKED and message.metadata.dst_node_id < 100 + self.drop_outs
        return None if dropped else super().answer(message)


def measure(nodes: int, rounds: int, *, secure: bool, drop_outs: int = 0) -> dict[str, Any]:
    """Return the bytes of one round, and the median CPU time of `rounds` rounds; with drop-outs of the first round alone."""
    with tempfile.TemporaryDirectory() as folder:
        config = settings(nodes, rounds + 1, secure, Path(folder) / "run")
        grid = MeasuringGrid(nodes, config.flat(), {})
        grid.drop_outs = drop_outs
        run_federation(grid, config)
        records = read_history(Path(folder) / "run")
    seconds = np.diff(list(grid.began.values()))[: 1 if drop_outs else None]
    return {**records[0]["bytes"], "seconds": float(np.median(seconds)), "loss": records[-1]["train"]["loss"]}


def settings(nodes: int, rounds: int, secure: bool, folder: Path) -> RunConfig:
    flat: dict[str, Any] = {**SETTINGS, "gaussian.clients": 2 * nodes}
    return parse_run_config({**flat, "rounds": rounds, "secure-aggregation": secure, "output-dir": str(folder)})


def main() -> None:
    claim = "a round in which the server sees only the sum trains as a plain one does, for a price that is told"
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.secure", description=claim, epilog="Example: python -m benchmarks.secure --nodes 5 20 50"
    )
    parser.add_argument("--nodes", type=int, nargs="+", default=[5, 20, 50], metavar="N", help="default: 5 20 50")
    parser.add_argument("--rounds", type=int, default=6, metavar="N", help="default: %(default)s")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"schema": 1, "benchmark": "secure", "claim": claim, "goals": []}
    result |= {"rounds": arguments.rounds, "settings": SETTINGS, "sides": []}
    apart = 0.0
    for nodes in arguments.nodes:
        most = nodes - needed(RunConfig().secure_threshold, nodes)
        plain, secure = (measure(nodes, arguments.rounds, secure=secure) for secure in (False, True))
        dropped = measure(nodes, 1, secure=True, drop_outs=most)
        apart = max(apart, abs(plain["loss"] - secure["loss"]))
        for label, drop_outs, side in (("plain", 0, plain), ("secure", 0, secure), ("secure", most, dropped)):
            result["sides"].append({"nodes": nodes, "label": label, "drop-outs": drop_outs, **side})
            say(f"{nodes} nodes, {label}, {drop_outs} drop out: {side['seconds']:.2f} s")
    goal(result, "the losses of plain and secure training differ by at most 1e-4", apart, met=apart <= 1e-4)
    result |= {"machine": machine(), "versions": {"torch": torch.__version__}, "commit": commit(), "date": today()}
    finish(result, table(result))


def table(result: dict[str, Any]) -> str:
    """Return kilobytes per node, and CPU seconds of all together, as a Markdown table."""
    lines = ["| nodes | round | kB up | kB down | seconds |", "|---:|---|---:|---:|---:|"]
    for side in result["sides"]:
        up, down = (side[key] / side["nodes"] / 1000 for key in ("up", "down"))
        fell = side["drop-outs"]
        name = side["label"] + (f", {fell} drop{'s' * (fell == 1)} out" if fell else "")
        lines.append(f"| {side['nodes']} | {name} | {up:.1f} | {down:.1f} | {side['seconds']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
