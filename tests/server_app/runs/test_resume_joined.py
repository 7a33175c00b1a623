"""A run that nodes joined and that was cut off: it goes on with their tasks, also where they are away, or were there before."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from loopback import LoopbackGrid

from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.errors import ConfigError
from quickbloom.common.personal import checkpoint as files
from quickbloom.common.wire.messages import TRAIN
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.events.file import read_events
from quickbloom.server_app.events.kinds import Joined
from quickbloom.server_app.reporting.report import write_report
from quickbloom.server_app.runs.checkpoints import load
from quickbloom.server_app.runs.directory import MEASURED, read_history

EVERYBODY = [100, 101, 102, 103]


class Killed(BaseException):
    """The end of the server in the middle of a run."""


def settings(folder: Path, **changes: Any) -> RunConfig:
    flat = {"mlp.hidden": "8", "min-nodes": 1, "rounds": 6, "adapt-steps": 3, "seed": 1, "evaluate-every": 2, "fraction": 0.5}
    flat |= {"algorithm": "maml", "output-dir": str(folder)}
    return parse_run_config({**flat, **{key.replace("_", "-"): value for key, value in changes.items()}}).resolved()


def run(folder: Path, there: list[int], comes: int = 0, dies: int = 0, **changes: Any) -> dict[str, Any]:
    """Digits in four parts. `there`: nodes at the beginning; all of them are there once round `comes` trains.

    `dies`: the round in which the server is killed.
    """
    config = settings(folder, **changes)

    def fault(message: Message, answer: Callable[[Message], Message]) -> Message:
        if message.metadata.message_type == TRAIN and comes and int(message.metadata.group_id) >= comes:
            grid.node_ids = EVERYBODY
        if message.metadata.message_type == TRAIN and message.metadata.group_id == str(dies):
            raise Killed
        return answer(message)

    grid = LoopbackGrid(4, config.flat(), dict.fromkeys(range(4), fault))
    grid.node_ids = list(there)
    return run_federation(grid, config)


def joined(folder: Path) -> dict[int, list[int]]:
    return {record["round"]: record["joined"]["nodes"] for record in read_history(folder) if "joined" in record}


def result(folder: Path, summary: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All that must be equal bit for bit: the summary and the history but for times, places and how often it was resumed."""
    rounds = [{key: value for key, value in record.items() if key not in MEASURED} for record in read_history(folder)]
    return {key: value for key, value in summary.items() if key not in ("seconds", "run_dir", "resumed")}, rounds


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run that node 103 joins: it comes in round 1, is called before round 2 and joins before round 3."""
    folder = tmp_path_factory.mktemp("joined") / "whole"
    return folder, run(folder, [100, 101, 102], comes=1)


def test_a_run_says_who_joined_wherever_it_says_something(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = whole
    (record,) = (record for record in read_history(folder) if "joined" in record)
    tasks = record["joined"]["tasks"]
    assert (record["round"], record["joined"]["nodes"], len(tasks)) == (3, [103], 14)  # of 56 tasks in four parts
    assert summary["joined"] == {"nodes": 1, "tasks": 14}
    # Of 42 tasks 6 are for validation (15 %) and 8 for the test (20 %); the 14 that came all train.
    assert summary["tasks"] == {"train": 28 + 14, "validation": 6, "test": 8}
    assert [event for event in read_events(folder) if isinstance(event, Joined)] == [Joined(103, 14, 3)]
    assert [record["train"]["tasks"] for record in read_history(folder)] == [14, 14, 21, 21, 21, 21]  # half of them
    rows = [row.split(",") for row in (folder / "per_task.csv").read_text().splitlines()]
    assert not {row[0] for row in rows if row[1] != "seen"} & set(tasks)
    facts = load(folder).facts
    assert (facts["joined"], set(tasks) <= set(facts["splits"]["train"])) == (tasks, True)
    text = re.sub(r"<[^>]*>", " ", write_report(folder, None).read_text())
    assert "1 node joined during the run with 14 tasks, in round 3." in text


@pytest.mark.parametrize("dies", [3, 4, 6])
def test_it_goes_on_with_the_joined_tasks_bit_for_bit(whole: tuple[Path, dict[str, Any]], tmp_path: Path, dies: int) -> None:
    with pytest.raises(Killed):
        run(tmp_path, [100, 101, 102], comes=1, dies=dies)
    assert joined(tmp_path) == ({} if dies == 3 else {3: [103]})
    rest = run(tmp_path, EVERYBODY, resume_from=str(tmp_path))
    assert result(tmp_path, rest) == result(*whole)
    first, second = load(whole[0]), load(tmp_path)
    assert all((value == second.tensors[name]).all() for name, value in first.tensors.items())


def test_without_the_node_it_goes_on_and_the_tasks_join_again_when_it_is_back(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, [100, 101, 102], comes=1, dies=4)
    rest = run(tmp_path, [100, 101, 102], comes=4, resume_from=str(tmp_path))
    assert joined(tmp_path) == {3: [103], 6: [103]}
    assert [record["train"]["tasks"] for record in read_history(tmp_path)] == [14, 14, 21, 14, 14, 21]
    assert rest["joined"] == {"nodes": 2, "tasks": 14}
    said = "14 tasks that joined the run before cannot be asked: they join when their nodes are back"
    assert said in (tmp_path / "events.jsonl").read_text()


def test_a_node_that_comes_while_the_run_is_down_joins_in_its_first_round(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, [100, 101, 102], dies=3)
    before = load(tmp_path).facts["splits"]
    rest = run(tmp_path, EVERYBODY, resume_from=str(tmp_path))
    assert (joined(tmp_path), rest["joined"]) == ({3: [103]}, {"nodes": 1, "tasks": 14})
    after = load(tmp_path).facts["splits"]
    assert (after["validation"], after["test"]) == (before["validation"], before["test"])
    assert len(after["train"]) == len(before["train"]) + 14


def test_with_join_off_it_stays_outside(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, [100, 101, 102], dies=3)
    rest = run(tmp_path, EVERYBODY, resume_from=str(tmp_path), join=False)
    assert (joined(tmp_path), rest["tasks"]["train"]) == ({}, 28)
    assert "Node 103 does not take part: it hosts none of the tasks of this run" in (tmp_path / "events.jsonl").read_text()


def test_tasks_of_the_beginning_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, [100, 101, 102], comes=1, dies=4)
    with pytest.raises(ConfigError, match="`resume-from` needs the tasks of the run to go on from"):
        run(tmp_path, [100, 101, 103], resume_from=str(tmp_path))


def test_a_checkpoint_of_a_release_without_joining_goes_on_with_its_tasks_alone(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, [100, 101, 102], dies=3)
    for path in (tmp_path / "checkpoints").glob("round-*"):
        kept = load(path)
        facts = {key: value for key, value in kept.facts.items() if key not in ("joined", "unused")}
        files.write(path, kept.tensors, facts, wait=False)
    with pytest.raises(ConfigError, match="`resume-from` needs the tasks of the run to go on from"):
        run(tmp_path, EVERYBODY, resume_from=str(tmp_path))
    assert run(tmp_path, [100, 101, 102], resume_from=str(tmp_path))["tasks"]["train"] == 28
