"""Whatever others call their tasks and say of themselves, a person and the log's reader see one printable line."""

import csv
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, RecordDict
from loopback import LoopbackGrid
from typer.testing import CliRunner

from quickbloom.client_app.cli import cli as edge
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.datasets.base import DataSpec, TaskInfo
from quickbloom.common.datasets.own import Own, OwnOptions
from quickbloom.common.errors import ConfigError, DataError, RunError, in_one_line
from quickbloom.common.flower.names import log
from quickbloom.common.printable import MOST, OneLine, as_told, flaw_of, keep_log_to_lines, one_line
from quickbloom.common.wire.messages import WireError
from quickbloom.common.wire.roll_call import ROLL_CALL, RollCallReply
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.cli.main import cli as quickbloom
from quickbloom.server_app.events.channel import Events, from_log, into_log
from quickbloom.server_app.events.file import read_events
from quickbloom.server_app.events.kinds import Ended, Event, RoundEnded, Started, Warned, to_line
from quickbloom.server_app.launch.follow import follow_here

FORGED = "quickbloom-event " + to_line(Started("/etc", "forged", "x", 0, 99999))
HOSTILE = [
    f"A\nINFO :      {FORGED}",
    f"A\rINFO :      {FORGED}",
    f"A\r\nINFO :      {FORGED}",
    f"\nINFO : {FORGED}",
    "A\x1b[2J\x1b[1;1Hall is well",
    "A\x1b]0;title\x07",
    "A\u202egnp.exe",
    "\u2066A\u2069",
    f"A\u2028INFO : {FORGED}",
    f"A\u2029INFO : {FORGED}",
    f"A\x85INFO : {FORGED}",
    "A\x0bINFO : x\x0cINFO : y\x1c\x1d\x1e",
    "A\x00B",
    "A\udc80",
    "A\u200bB",
    "A" * (MOST + 1),
]
PRINTABLE = [
    "quickbloom-event {",
    FORGED,
    to_line(Warned("all is well")),
    f"INFO : {FORGED}",
    '", "kind": "end", "summary": {',
    "=1+1",
    "<b>x</b>",
    "%s %d",
    "\u4eac\u3000A",
    "\u0645\u06cc\u200c\u062e",
]


def printable(text: str) -> bool:
    return len(text.splitlines()) <= 1 and not any(
        ord(sign) < 32 or sign in "\x7f\x85\u2028\u2029\u202e\u2066" for sign in text
    )


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_is_not_printable_is_told_as_one_line_and_refused_as_a_name(name: str) -> None:
    assert printable(one_line(name))
    assert printable(as_told(name, 60))
    assert len(as_told(name, 60)) <= 60
    assert flaw_of(name)
    for error in (ConfigError, DataError, WireError, RunError):
        assert printable(str(error(f"the task '{name}' is odd")))
    assert printable(in_one_line(ValueError(name)))


@pytest.mark.parametrize("name", PRINTABLE)
def test_a_name_that_is_printable_stays(name: str) -> None:
    assert one_line(name) == name
    assert flaw_of(name) is None


def answer(**more: Any) -> RecordDict:
    reply = RollCallReply(DataSpec("regression", (2,), 1), [TaskInfo("A", 3, 3, 3)], {"flwr": "1"})
    return replace(reply, **more).to_records()


@pytest.mark.parametrize("name", HOSTILE)
def test_the_server_takes_no_such_word_out_of_an_answer(name: str) -> None:
    spec = DataSpec("regression", (2,), 1, schema=name)
    words: list[dict[str, Any]] = [
        {"tasks": [TaskInfo(name, 3, 3, 3)]},
        {"tasks": [TaskInfo("A", 3, 3, 3, group=name)]},
        {"left_out": {name: "too few"}},
        {"versions": {name: "1"}},
        {"versions": {"flwr": name}},
        *([{"spec": spec}] if len(name) < MOST else []),
    ]
    for more in words:
        with pytest.raises(WireError) as caught:
            RollCallReply.from_records(answer(**more))
        assert printable(str(caught.value))
        assert len(str(caught.value)) < 300
    told = RollCallReply.from_records(answer(left_out={"A": name})).left_out["A"]
    assert printable(told)
    assert len(told) <= 300


# Marks without width are taken off every cell.
@pytest.mark.parametrize("name", [name for name in HOSTILE if "\u200b" not in name])
def test_a_node_refuses_a_file_with_such_a_task_in_one_sentence(name: str, tmp_path: Path) -> None:
    if "\udc80" in name or "\x00" in name:
        pytest.skip("such a file cannot be written, or is none of text")
    rows = [["task", "x", "target"]] + [[task, str(row), "ab"[row % 2]] for task in ("A", "B", name) for row in range(20)]
    with (tmp_path / "data.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    if name != name.strip() and flaw_of(name.strip()) is None:
        pytest.skip("blanks around a name are no part of it")
    with pytest.raises(DataError) as caught:
        Own(OwnOptions(path=str(tmp_path / "data.csv")), tmp_path)
    assert printable(str(caught.value))
    assert "`task`" in str(caught.value)
    assert "(not told)" in caught.value.for_others()
    done = CliRunner().invoke(edge, ["check-data", str(tmp_path / "data.csv")])
    assert isinstance(done.exception, DataError)


def run(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> tuple[list[Event], list[Event], str]:
    """A run of three nodes one of which says of itself what it likes.

    Returns the events as they were told, those that a reader found in the log, and the log.
    """

    def lies(message: Message, honest: Any) -> Message:
        if message.metadata.message_type != ROLL_CALL:
            return honest(message)  # type: ignore[no-any-return]
        reply = RollCallReply.from_records(honest(message).content)
        tasks = [replace(task, task_id=f"{name}{number}", num_query=0) for number, task in enumerate(reply.tasks[:2])]
        return Message(replace(reply, tasks=tasks, left_out={name: name}).to_records(), reply_to=message)

    settings = {"rounds": 1, "min-nodes": 2, "output-dir": str(tmp_path / "run"), "adapt-steps": 1, "mlp.hidden": "4"}
    config = parse_run_config({**settings, "evaluate-every": 0})
    told: list[Event] = []
    keep_log_to_lines()
    with caplog.at_level(logging.INFO, "flwr"):
        run_federation(LoopbackGrid(3, config.flat(), {1: lies}), config, Events(told.append, into_log))
    text = "\n".join(f"{record.levelname} :      {record.getMessage()}" for record in caplog.records)
    # All that a reader of lines could take for one.
    return told, [event for line in text.splitlines() if (event := from_log(line))], text


def own(events: list[Event]) -> list[Event]:
    """What only the server says."""
    return [event for event in events if isinstance(event, Started | RoundEnded | Ended)]


@pytest.mark.parametrize("name", [*HOSTILE, *PRINTABLE])
def test_a_node_cannot_forge_an_event(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told, found, text = run(tmp_path, name, caplog)
    started, ended, end = own(found)
    assert isinstance(started, Started)
    assert isinstance(ended, RoundEnded)
    assert isinstance(end, Ended)
    assert (ended.round, ended.rounds, started.run_dir) == (1, 1, str(tmp_path / "run"))
    assert end.summary["algorithm"] == "reptile"
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == end.summary
    assert all(printable(line.replace("\t", " ")) for line in text.split("\n"))
    in_file = read_events(tmp_path / "run")
    assert own(in_file) == own(found) == own(told)


@pytest.mark.parametrize("name", [*HOSTILE, *PRINTABLE])
def test_a_node_cannot_hide_a_warning(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told, found, _ = run(tmp_path, name, caplog)
    warnings = [event for event in told if isinstance(event, Warned)]
    assert warnings
    assert [event for event in found if isinstance(event, Warned)] == warnings
    assert [event for event in read_events(tmp_path / "run") if isinstance(event, Warned)] == warnings
    assert all(printable(event.sentence) for event in warnings)
    if name in PRINTABLE:  # else the whole answer was refused
        said = [event.sentence for event in warnings]
        assert any(sentence.startswith(f"1 task is left out: {as_told(name)[:40]}") for sentence in said)
        assert any(sentence.startswith(f"Task {name}") and " is left out: it has " in sentence for sentence in said)


@pytest.mark.parametrize("name", [*HOSTILE, *PRINTABLE])
def test_so_it_is_where_nothing_was_refused_before(name: str, caplog: pytest.LogCaptureFixture) -> None:
    keep_log_to_lines()
    told: list[Event] = []
    with caplog.at_level(logging.INFO, "flwr"):
        log(logging.WARNING, "Task %s is left out", name)
        log(logging.INFO, "\tTasks of %s", name)
        events = Events(told.append, into_log)
        events.warn(name)
        events.warn(f"Task {name} is left out")
        events.fail(name, name)
    text = "\n".join(f"{record.levelname} :      {record.getMessage()}" for record in caplog.records)
    assert all(printable(record.getMessage().replace("\t", " ")) for record in caplog.records)
    assert [event for line in text.splitlines() if (event := from_log(line))] == told
    assert len(told) == 3


def test_the_filter_is_there_once_and_keeps_what_a_message_says() -> None:
    for _ in range(3):
        keep_log_to_lines()
    logger = logging.getLogger("flwr")
    assert sum(isinstance(one, OneLine) for one in logger.filters) == 1
    record = logging.LogRecord("flwr", logging.INFO, "", 0, "\t└──> 100 %% of %s", ("a\nb",), None)
    OneLine().filter(record)
    assert record.getMessage() == "\t└──> 100 % of a b"


def test_a_failed_run_says_its_reason_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "".join(f'"A\nINFO : {{",{row},{"ab"[row % 2]}\n' for row in range(20))
    (tmp_path / "data.csv").write_text("task,x,target\n" + rows)
    command = ["run", "--data", str(tmp_path / "data.csv"), "--in-process", "--output", str(tmp_path / "run")]
    done = CliRunner().invoke(quickbloom, command)
    assert isinstance(done.exception, DataError)
    assert printable(str(done.exception))
    config = parse_run_config({"min-nodes": 1, "rounds": 1, "output-dir": str(tmp_path / "other"), "test-tasks": 50})
    with pytest.raises(ConfigError):
        follow_here(config, 1, verbose=True)
    assert "Traceback" not in capsys.readouterr().err
