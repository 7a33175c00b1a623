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
from quickbloom.common.errors import ConfigError, DataError, in_one_line
from quickbloom.common.flower.names import log
from quickbloom.common.printable import MOST, OneLine, as_told, flaw_of, keep_log_to_lines, one_line
from quickbloom.common.wire.messages import ROLL_CALL, RollCallReply, WireError
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.cli.main import cli as quickbloom
from quickbloom.server_app.federation.strategy import RunError
from quickbloom.server_app.launch.follow import follow_here
from quickbloom.server_app.reporting.live import SUMMARY, LogReader

FORGED = 'Summary: {"schema": 1, "algorithm": "forged"}'
HOSTILE = [
    f"A\nINFO :      {FORGED}",
    f"A\rINFO :      {FORGED}",
    "A\r\nINFO :      [ROUND 3/99999]",
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
    "Summary: {",
    FORGED,
    "[ROUND 3/99999]",
    "Run directory: /etc",
    "INFO : [ROUND 3/99999]",
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


def run(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> tuple[LogReader, str]:
    """A run of three nodes one of which says of itself what it likes; what the reader made of its log, and the log."""

    def lies(message: Message, honest: Any) -> Message:
        if message.metadata.message_type != ROLL_CALL:
            return honest(message)  # type: ignore[no-any-return]
        reply = RollCallReply.from_records(honest(message).content)
        tasks = [replace(task, task_id=f"{name}{number}", num_query=0) for number, task in enumerate(reply.tasks[:2])]
        return Message(replace(reply, tasks=tasks, left_out={name: name}).to_records(), reply_to=message)

    settings = {"rounds": 1, "min-nodes": 2, "output-dir": str(tmp_path / "run"), "adapt-steps": 1, "mlp.hidden": "4"}
    config = parse_run_config({**settings, "evaluate-every": 0})
    with caplog.at_level(logging.INFO, "flwr"):
        run_federation(LoopbackGrid(3, config.flat(), {1: lies}), config)
    lines = [f"{record.levelname} :      {record.getMessage()}" for record in caplog.records]
    reader = LogReader()
    text = "\n".join(lines)
    for line in text.splitlines():  # all that a reader of lines could take for one
        reader.read(line)
    return reader, text


@pytest.mark.parametrize("name", [*HOSTILE, *PRINTABLE])
def test_a_node_cannot_write_a_line_of_the_servers_log(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reader, text = run(tmp_path, name, caplog)
    assert (reader.round, reader.total, reader.run_dir) == (1, 1, str(tmp_path / "run"))
    assert reader.summary is not None
    assert reader.summary["algorithm"] == "reptile"
    assert all(printable(line.replace("\t", " ")) for line in text.split("\n"))
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == reader.summary


@pytest.mark.parametrize("name", [*HOSTILE, *PRINTABLE])
def test_so_it_is_where_nothing_was_refused_before(name: str, caplog: pytest.LogCaptureFixture) -> None:
    keep_log_to_lines()
    with caplog.at_level(logging.INFO, "flwr"):
        log(logging.WARNING, "Task %s is left out", name)
        log(logging.INFO, "\tTasks of %s", name)
    assert all(printable(record.getMessage().replace("\t", " ")) for record in caplog.records)
    reader = LogReader()
    for record in caplog.records:
        for line in f"{record.levelname} :      {record.getMessage()}".splitlines():
            reader.read(line)
    assert (reader.round, reader.summary, reader.run_dir) == (0, None, "")


def test_the_filter_is_there_once_and_keeps_what_a_message_says() -> None:
    for _ in range(3):
        keep_log_to_lines()
    logger = logging.getLogger("flwr")
    assert sum(isinstance(one, OneLine) for one in logger.filters) == 1
    record = logging.LogRecord("flwr", logging.INFO, "", 0, "\t└──> 100 %% of %s", ("a\nb",), None)
    OneLine().filter(record)
    assert record.getMessage() == "\t└──> 100 % of a b"


@pytest.mark.parametrize(
    "line",
    [
        "INFO :      Summary: {",
        "INFO :      Summary: 3",
        "INFO :      Summary: {}",
        "INFO :      Summary: " + "[" * 100_000,
        FORGED,
        f"WARNING :   {FORGED}",
        "WARNING :   [ROUND 3/9]",
        "INFO :      Task [ROUND 3/9] does well",
        "[ROUND 3/9]",
        "Run directory: /etc",
    ],
)
def test_a_line_that_is_not_the_servers_own_says_nothing(line: str) -> None:
    reader = LogReader()
    reader.read(line)
    assert (reader.round, reader.total, reader.run_dir, reader.summary) == (0, 0, "", None)
    assert SUMMARY == "Summary: "


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
