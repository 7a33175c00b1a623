"""A node that is refused is told why, so that its owner can read it on the device; an older node is left in peace."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loopback import LoopbackGrid

from quickbloom.client_app.owner.words import Status
from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.errors import ConfigError
from quickbloom.common.wire.refusal import REFUSED
from quickbloom.common.wire.roll_call import RollCallReply
from quickbloom.server_app.events.channel import Events
from quickbloom.server_app.events.kinds import Event, Refused
from quickbloom.server_app.federation.roll_call import call_roll


def ward(folder: Path, name: str, column: str = "age", task: str = "") -> dict[str, Any]:
    """The settings of a node with a file of its own, and a folder of its own."""
    rng = np.random.default_rng(len(name))
    rows = [f"{rng.normal():.3f},{rng.normal():.3f},{'ill' if i % 2 else 'well'}" for i in range(40)]
    (folder / f"{name}.csv").write_text("\n".join([f"{column},marker,outcome", *rows]))
    settings = {"data-path": str(folder / f"{name}.csv"), "state-dir": str(folder / f"state-{name}")}
    return settings | ({"task-name": task} if task else {})


def config(**changes: Any) -> RunConfig:
    flat = {"dataset": "own", "own.target-column": "outcome", "node-deadline": 5.0, "validation-tasks": 0, "test-tasks": 1}
    return parse_run_config(flat | {key.replace("_", "-"): value for key, value in changes.items()}).resolved()


def told(grid: LoopbackGrid) -> list[int]:
    return [message.metadata.dst_node_id for message in grid.requests if message.metadata.message_type == REFUSED]


def test_the_owner_of_a_refused_device_reads_what_does_not_fit_and_what_to_do(tmp_path: Path) -> None:
    nodes = {i: ward(tmp_path, name, "years" if name == "odd" else "age") for i, name in enumerate(("a", "b", "odd"))}
    grid = LoopbackGrid(3, config().flat(), node_configs=nodes)
    events: list[Event] = []
    assert set(call_roll(grid, config(), events=Events(events.append)).homes.values()) == {100, 101}
    assert [event for event in events if isinstance(event, Refused)] == [Refused(102, "other columns or classes")]
    assert told(grid) == [102]
    odd, fits = (Status.of(tmp_path / f"state-{name}") for name in ("odd", "a"))
    assert (odd.well, fits.well) == (False, True)
    said = " ".join(odd.lines())
    assert "the columns or classes of its file are not those of the other devices. What to do: look at your file" in said
    assert "The server says: its columns or classes are" in said
    assert "years" in said


def test_both_owners_of_one_task_read_it_before_the_run_ends(tmp_path: Path) -> None:
    nodes = {i: ward(tmp_path, name, task="ward") for i, name in enumerate(("a", "b"))}
    grid = LoopbackGrid(2, config().flat(), node_configs=nodes)
    with pytest.raises(ConfigError, match="two nodes host the task 'ward'"):
        call_roll(grid, config())
    for name in ("a", "b"):
        assert "another device takes part with a task of the same name" in " ".join(
            Status.of(tmp_path / f"state-{name}").lines()
        )


def test_a_run_that_cannot_begin_tells_its_nodes_first(tmp_path: Path) -> None:
    nodes = {i: ward(tmp_path, name, "years" if name == "odd" else "age") for i, name in enumerate(("a", "b", "odd"))}
    grid = LoopbackGrid(3, config(min_nodes=3).flat(), node_configs=nodes)
    with pytest.raises(ConfigError, match="`min-nodes` is 3, but 2 usable nodes"):
        call_roll(grid, config(min_nodes=3))
    assert not Status.of(tmp_path / "state-odd").well


def test_a_node_that_does_not_know_the_message_gets_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = {i: ward(tmp_path, name, "years" if name == "odd" else "age") for i, name in enumerate(("a", "b", "odd"))}
    of_today = RollCallReply.to_records

    def of_an_older_node(reply: RollCallReply) -> Any:
        records = of_today(reply)
        del records.config_records["roll-call"]["hears"]
        return records

    monkeypatch.setattr(RollCallReply, "to_records", of_an_older_node)
    grid = LoopbackGrid(3, config().flat(), node_configs=nodes)
    assert call_roll(grid, config()).refused.keys() == {102}
    assert told(grid) == []


def test_a_file_that_cannot_be_read_is_named_on_its_device_alone(tmp_path: Path) -> None:
    nodes = {i: ward(tmp_path, name) for i, name in enumerate(("a", "b", "bad"))}
    table = (tmp_path / "bad.csv").read_text().split("\n")
    (tmp_path / "bad.csv").write_text("\n".join([table[0], "SECRET-WORD,0.5,ill", *table[2:]]))
    grid = LoopbackGrid(3, config().flat(), node_configs=nodes)
    events: list[Event] = []
    refused = call_roll(grid, config(), events=Events(events.append)).refused
    assert refused.keys() == {102}
    assert [event for event in events if isinstance(event, Refused)] == [Refused(102, "a fault of its own")]
    assert "SECRET-WORD" not in refused[102]
    assert "SECRET-WORD" in " ".join(Status.of(tmp_path / "state-bad").lines())
