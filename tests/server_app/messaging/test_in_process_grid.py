"""The grid without a network, and `quickbloom run` on it."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from loopback import LoopbackGrid

from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.wire.roll_call import ROLL_CALL, RollCallReply
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.cli import main
from quickbloom.server_app.launch import follow
from quickbloom.server_app.messaging import in_process_grid
from quickbloom.server_app.messaging.in_process_grid import InlineGrid
from quickbloom.server_app.messaging.polling_grid import PollingGrid
from quickbloom.server_app.runs.directory import MEASURED, read_history

SMALL = ["--rounds", "2", "--set", "mlp.hidden=8", "--set", "adapt-steps=2", "--set", "evaluate-every=1"]


def settings(folder: Path, **more: object) -> RunConfig:
    flat = {"mlp.hidden": "8", "min-nodes": 1, "rounds": 2, "adapt-steps": 2, "evaluate-every": 1, "output-dir": str(folder)}
    return parse_run_config({**flat, **more})


def result(folder: Path, summary: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Summary and history without what differs from run to run: times, and places."""
    rounds = [{key: value for key, value in record.items() if key not in MEASURED} for record in read_history(folder)]
    return {key: value for key, value in summary.items() if key not in ("seconds", "run_dir", "runtime", "workers")}, rounds


@pytest.mark.parametrize("algorithm", ["reptile", "heads", "local"])
def test_summary_and_history_are_those_of_the_grid_that_polls(tmp_path: Path, algorithm: str) -> None:
    results = []
    for name in ("inline", "polling", "packing"):
        config = settings(tmp_path / name, algorithm=algorithm)
        grid = InlineGrid(2, config.flat(), {})
        summary = run_federation(grid if name == "inline" else PollingGrid(grid, packs=name == "packing"), config)
        results.append(result(tmp_path / name, summary))
    assert results[0] == results[1] == results[2]
    assert len(results[0][1]) == 2


def roll_call(node_id: int) -> Message:
    return Message(RecordDict({"request": ConfigRecord()}), node_id, ROLL_CALL)


def test_every_reply_names_its_request_and_is_handed_out_once() -> None:
    grid = InlineGrid(3, settings(Path("/unused")).flat(), {})
    ids = list(grid.push_messages([roll_call(node_id) for node_id in (102, 100)]))
    (second,) = grid.pull_messages([ids[1], "unknown"])
    assert second.metadata.reply_to_message_id == ids[1]
    assert second.metadata.src_node_id == 100
    assert [reply.metadata.reply_to_message_id for reply in grid.pull_messages(ids)] == [ids[0]]
    assert grid.pull_messages(ids) == []


def test_nodes_share_out_the_tasks_and_take_settings_of_their_own() -> None:
    grid = InlineGrid(2, settings(Path("/unused")).flat(), {1: {"colour": "red"}})
    good, bad = grid.send_and_receive([roll_call(node_id) for node_id in grid.get_node_ids()])
    assert [task.task_id for task in RollCallReply.from_records(good.content).tasks[:2]] == ["device-00", "device-02"]
    assert "there is no node setting `colour`" in str(bad.content["error"])


def test_a_node_that_is_not_there_is_an_error_reply_and_not_an_exception() -> None:
    (reply,) = InlineGrid(1, settings(Path("/unused")).flat(), {}).send_and_receive([roll_call(777)])
    assert reply.has_error()
    assert "777" in str(reply.error.reason)


# ---- the command


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `quickbloom run`; Flower must not be started."""

    def no_start(*_: Any) -> Any:
        raise AssertionError("Flower must not be started")

    monkeypatch.setattr(follow, "_follow_flower", no_start)
    monkeypatch.setattr("sys.argv", ["quickbloom", "run", *arguments])
    handlers = list(logging.getLogger("flwr").handlers)
    with pytest.raises(SystemExit) as end:
        main.main()
    assert logging.getLogger("flwr").handlers == handlers
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return int(end.value.code or 0), captured.out, " ".join(captured.err.split())


def test_it_prints_the_summary_that_the_same_run_has_on_another_grid(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "in-process"
    small = [*SMALL, "--algorithm", "reptile", "--nodes", "2"]
    code, out, err = run(monkeypatch, capsys, *small, "--output", str(folder), "--json")
    config = settings(tmp_path / "other", **{"min-nodes": 2})
    other = run_federation(PollingGrid(LoopbackGrid(2, config.flat())), config)
    assert code == 0
    assert json.loads(out) == json.loads((folder / "summary.json").read_text())
    assert result(folder, json.loads(out)) == result(tmp_path / "other", other)
    assert "round 2/2" in err


def test_it_has_two_nodes_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    nodes: list[int] = []

    class Counting(InlineGrid):
        def __init__(self, num_nodes: int, *rest: Any) -> None:
            nodes.append(num_nodes)
            super().__init__(num_nodes, *rest)

    monkeypatch.setattr(in_process_grid, "InlineGrid", Counting)
    for name, more in (("a", []), ("b", ["--nodes", "3"])):
        assert run(monkeypatch, capsys, *SMALL, *more, "--output", str(tmp_path / name), "--json")[0] == 0
    assert nodes == [2, 3]


def test_a_run_that_diverges_ends_with_code_1_and_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    wild = ["--set", "outer-optimizer=sgd", "--set", "outer-lr=1e38", "--output", str(tmp_path)]
    code, out, err = run(monkeypatch, capsys, "--algorithm", "fomaml", *SMALL, *wild, "--json")
    assert (code, out) == (1, "")
    assert "error: round 2: no node sent a usable reply: its numbers are not finite" in err


def test_ctrl_c_ends_it_with_code_130_and_names_what_is_finished(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    answer = InlineGrid.answer

    def interrupted(self: InlineGrid, message: Message) -> Message | None:
        if message.metadata.group_id == "2":
            raise KeyboardInterrupt
        return answer(self, message)

    monkeypatch.setattr(InlineGrid, "answer", interrupted)
    code, out, err = run(monkeypatch, capsys, *SMALL, "--output", str(tmp_path), "--json")
    assert (code, out) == (130, "")
    assert f"Stopped; what was finished is in {tmp_path}." in err
    assert [record["round"] for record in read_history(tmp_path)] == [1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--runtime", "in-process", "--connection", "x"], "`--runtime in-process` and `--connection` exclude each other"),
        (["--set", "min-nodes=3"], "`min-nodes` must be at most `--nodes` (2), got 3"),
        (["--algorithm", "protonet", "--dataset", "sinusoid"], '`algorithm = "protonet"` is defined for classification'),
        (["--set", "resume-from=nowhere"], "cannot be read"),
    ],
)
def test_wrong_input_ends_with_code_2_and_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "1000")
    code, out, err = run(monkeypatch, capsys, *arguments)
    assert (code, out) == (2, "")
    assert sentence in err


def test_there_is_no_run_of_flowers() -> None:
    grid = InlineGrid(1, settings(Path("/unused")).flat(), {})
    with pytest.raises(NotImplementedError, match="belong to no run of Flower"):
        grid.set_run(1)
    with pytest.raises(NotImplementedError, match="belong to no run of Flower"):
        _ = grid.run
