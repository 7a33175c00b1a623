"""Seconds by phase, by a clock that only nodes, the outer step, looks at the nodes and the disk move: all are known by hand."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from loopback import LoopbackGrid

from quickbloom.common.config.run import parse_run_config
from quickbloom.common.wire.messages import EVALUATE
from quickbloom.common.wire.roll_call import ROLL_CALL
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.federation import strategy
from quickbloom.server_app.federation.outer import OuterOptimizer
from quickbloom.server_app.messaging import node_status, phases
from quickbloom.server_app.messaging.exchange import Exchange
from quickbloom.server_app.messaging.polling_grid import PollingGrid
from quickbloom.server_app.runs.directory import RunDirectory, read_history

LOOK, TRAINED, STEP, SCORED, WRITTEN = 0.25, 5.0, 2.0, 3.0, 1.0
SMALL = {"dataset": "gaussian", "gaussian.clients": 21, "model": "linear", "algorithm": "fedavg", "rounds": 4, "min-nodes": 1}
SMALL |= {"adapt-steps": 2, "validation-tasks": 4, "test-tasks": 2, "evaluate-every": 2, "baselines": False}


class Clock:
    """Stands for the module time."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


class Grid(LoopbackGrid):
    """An answer takes `TRAINED` or `SCORED` seconds, and a look at who is there `LOOK`."""

    def __init__(self, clock: Clock, config: dict[str, Any]) -> None:
        self.ticks, self.answers = clock, Counter[str]()
        super().__init__(7, config)

    def answer(self, message: Message) -> Message | None:
        kind = message.metadata.message_type
        if kind != ROLL_CALL:
            scores = kind == EVALUATE
            self.answers["scoring" if scores else "training"] += 1
            self.ticks.now += SCORED if scores else TRAINED
        return super().answer(message)

    def get_node_ids(self) -> list[int]:
        self.answers["looks"] += 1
        self.ticks.now += LOOK
        return super().get_node_ids()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock, take_in, append = Clock(), OuterOptimizer.take_in, RunDirectory.append_round

    def slow_step(self: OuterOptimizer, *arguments: Any) -> None:
        clock.now += STEP
        take_in(self, *arguments)

    def slow_disk(self: RunDirectory, record: dict[str, Any]) -> None:
        clock.now += WRITTEN
        append(self, record)

    monkeypatch.setattr(OuterOptimizer, "take_in", slow_step)
    monkeypatch.setattr(RunDirectory, "append_round", slow_disk)
    monkeypatch.setattr(phases, "time", clock)
    monkeypatch.setattr(strategy, "time", clock)
    return clock


def run(path: Path, clock: Clock, **more: Any) -> tuple[list[dict[str, Any]], list[Counter[str]]]:
    """Return the lines of a run, and how many answers and looks each took."""
    config = parse_run_config(
        {**SMALL, "output-dir": str(path), **{k.replace("_", "-"): v for k, v in more.items()}}
    ).resolved()
    grid, counts = Grid(clock, config.flat()), list[Counter[str]]()
    begin, close = Exchange.begin, strategy.MetaStrategy._close_round

    def begun(self: Exchange) -> None:
        grid.answers.clear()
        begin(self)

    def closed(self: strategy.MetaStrategy) -> None:
        counts.append(Counter(grid.answers))
        close(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exchange, "begin", begun)
        patch.setattr(strategy.MetaStrategy, "_close_round", closed)
        run_federation(grid, config)
    return read_history(path), counts


@pytest.mark.parametrize("more", [{}, {"secure_aggregation": True}, {"mode": "async"}], ids=["sync", "secure", "async"])
def test_each_phase_has_its_seconds_and_all_are_those_of_the_round(tmp_path: Path, clock: Clock, more: dict[str, Any]) -> None:
    lines, counts = run(tmp_path / "run", clock, **more)
    assert len(lines) == len(counts) == 4
    assert sum(count["scoring"] for count in counts) > 0
    for number, (line, count) in enumerate(zip(lines, counts, strict=True)):
        assert line["phases"] == {
            "asking": LOOK * count["looks"],
            "waiting": TRAINED * count["training"],
            "aggregating": STEP,
            "scoring": SCORED * count["scoring"],
            "saving": WRITTEN if number else 0.0,
        }
        assert line["seconds"] == sum(line["phases"].values()) - line["phases"]["saving"]


def test_a_run_that_goes_on_has_phases_and_takes_over_lines_that_have_none(tmp_path: Path, clock: Clock) -> None:
    run(tmp_path, clock)
    (tmp_path / "summary.json").unlink()
    for number in (3, 4):
        (tmp_path / "checkpoints" / f"round-{number:06}.safetensors").unlink()
    old = [{key: value for key, value in line.items() if key not in ("phases", "memory")} for line in read_history(tmp_path)]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    lines, _ = run(tmp_path, clock, resume_from=str(tmp_path))
    assert [line["round"] for line in lines] == [1, 2, 3, 4]
    assert ["phases" in line for line in lines] == [False, False, True, True]
    assert [line["phases"]["saving"] for line in lines[2:]] == [0.0, WRITTEN]


def test_a_node_that_goes_while_others_work_is_no_longer_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Leaving(LoopbackGrid):
        def answer(self, message: Message) -> Message | None:
            if message.metadata.group_id == "2":
                self.node_ids = self.node_ids[:5]
            return super().answer(message)

    monkeypatch.setattr(node_status, "_PAUSE", 0.0)
    config = parse_run_config({**SMALL, "output-dir": str(tmp_path)}).resolved()
    run_federation(PollingGrid(Leaving(7, config.flat())), config)
    assert [line["nodes"]["connected"] for line in read_history(tmp_path)] == [7, 5, 5, 5]
