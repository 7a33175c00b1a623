"""What secure sums cost beside plain rounds: bytes and seconds per round, all nodes in one process, one core.

    python -m benchmarks.secure --nodes 5 20 50

Seconds are CPU time of all nodes and the server together. Over a network the three more messages per node add their way. Both
runs do the same training, and end with the same loss.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message

from common.config import RunConfig, parse_run_config
from common.secure.messages import KEYS, MASKED
from common.secure.protocol import needed
from common.wire import TRAIN
from server_app.app import run_federation
from server_app.history import read_history
from server_app.inline import InlineGrid


class MeasuringGrid(InlineGrid):
    """Notes when rounds begin. The first `drop_outs` nodes send their shares and then nothing."""

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
    """Bytes of one round, and the median CPU time of `rounds` rounds; with drop-outs of the first round alone."""
    with tempfile.TemporaryDirectory() as folder:
        config = settings(nodes, rounds + 1, secure, Path(folder) / "run")
        grid = MeasuringGrid(nodes, config.flat(), {})
        grid.drop_outs = drop_outs
        run_federation(grid, config)
        records = read_history(Path(folder) / "run")
    seconds = np.diff(list(grid.began.values()))[: 1 if drop_outs else None]
    return {**records[0]["bytes"], "seconds": float(np.median(seconds)), "loss": records[-1]["train"]["loss"]}


def settings(nodes: int, rounds: int, secure: bool, folder: Path) -> RunConfig:
    flat: dict[str, Any] = {"dataset": "gaussian", "gaussian.clients": 2 * nodes, "model": "mlp", "algorithm": "fedavg"}
    # Two tasks per node, one of which trains: every node is in every sum.
    flat |= {"validation-tasks": 1, "test-tasks": 1, "evaluate-every": 0, "adapt-steps": 1, "checkpoint-every": 0}
    return parse_run_config({**flat, "rounds": rounds, "secure-aggregation": secure, "output-dir": str(folder)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[5, 20, 50])
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()
    rows = []
    for nodes in arguments.nodes:
        plain, secure = (measure(nodes, arguments.rounds, secure=secure) for secure in (False, True))
        most = nodes - needed(RunConfig().secure_threshold, nodes)
        dropped = measure(nodes, 1, secure=True, drop_outs=most)
        assert abs(plain["loss"] - secure["loss"]) < 1e-4, (plain, secure)
        for name, result in (("plain", plain), ("secure", secure), (f"secure, {most} drop out", dropped)):
            up, down = (result[key] / nodes / 1000 for key in ("up", "down"))
            rows.append(f"| {nodes} | {name} | {up:.1f} | {down:.1f} | {result['seconds']:.2f} |")
    print(
        "\n".join(["| nodes | round | kB up, per node | kB down, per node | CPU seconds |", "|---:|---|---:|---:|---:|", *rows])
    )


if __name__ == "__main__":
    main()
