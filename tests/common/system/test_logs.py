"""Log lines for machines: every line parses, says what is known, and the file is rotated by its size."""

import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from real_processes import quickbloom

from quickbloom.client_app.join import _run, name_of
from quickbloom.common.errors import ConfigError
from quickbloom.common.system import logs
from quickbloom.common.system.terminal import say, say_error
from quickbloom.server_app.deployment.secrets import create
from quickbloom.server_app.runs.directory import read_history

NEEDED = {"time", "level", "logger", "message"}


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    yield
    logs.end()


def parsed(text: str) -> list[dict[str, Any]]:
    """Every line, as JSON with what each must have."""
    found = [json.loads(line) for line in text.splitlines()]
    for line in found:
        assert line.keys() >= NEEDED, line
        assert line["time"].endswith("Z")
        assert datetime.fromisoformat(line["time"]).utcoffset() == timedelta(0)
        assert line["level"] in {"DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"}
    return found


def as_json(file: Path | None = None, megabytes: float = 10.0, **known: str | int) -> None:
    logs.begin(logs.Settings(logs.Format.JSON, file, megabytes), **known)


def test_what_a_command_says_is_a_line_of_json_on_stderr_and_in_the_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    as_json(tmp_path / "new" / "log", node="ward-7")
    say('a "quoted" [bold]line[/bold]\nof two é')
    say_error("it failed")
    out, err = capfd.readouterr()
    assert out == ""
    assert (tmp_path / "new" / "log").read_text() == err
    first, second = parsed(err)
    assert (first["level"], first["logger"], first["node"]) == ("INFO", "quickbloom", "ward-7")
    assert first["message"] == 'a "quoted" [bold]line[/bold]\nof two é'
    assert (second["level"], second["message"]) == ("ERROR", "it failed")


def test_lines_for_people_stay_and_the_file_has_them_with_their_time(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logs.begin(logs.Settings(logs.Format.TEXT, tmp_path / "log"))
    say("one")
    assert capfd.readouterr().err == "one\n"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO quickbloom: one\n", (tmp_path / "log").read_text())
    assert not logs.is_json()


def test_the_file_is_rotated_by_its_size_and_no_line_is_cut(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    as_json(tmp_path / "log", megabytes=0.001)
    for number in range(60):
        say(f"line {number}")
    capfd.readouterr()
    files = sorted(tmp_path.iterdir(), key=lambda path: -int(path.suffix[1:] or 0))
    assert [path.name for path in files] == ["log.5", "log.4", "log.3", "log.2", "log.1", "log"]
    assert all(path.stat().st_size <= 1000 for path in files)
    numbers = [int(line["message"].split()[1]) for path in files for line in parsed(path.read_text())]
    assert numbers == list(range(60 - len(numbers), 60))
    assert len(numbers) > 30


def test_a_fork_does_not_rotate_the_file_of_its_parent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    as_json(tmp_path / "log", megabytes=0.001)
    say("before")
    child = os.fork()
    if child == 0:
        for number in range(60):
            say(f"child {number}")
        os._exit(0)
    os.waitpid(child, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
    assert len(parsed((tmp_path / "log").read_text())) == 61
    say("after")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "log.1"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("\x1b[92mINFO \x1b[0m:      Round 7, training: ward-7; 0.8 s", {"level": "INFO", "round": 7, "logger": "flwr"}),
        ("\x1b[93mWARNING \x1b[0m:   [RUN 1234567890123, ROUND 3]", {"level": "WARNING", "run": 1234567890123, "round": 3}),
        ("INFO :      Activated node_id=99887766554433", {"level": "INFO", "node": 99887766554433}),
        ("round 12/100   query loss 0.1", {"round": 12}),
        ("a run 3 of many, in 5 rounds", {}),
    ],
)
def test_what_a_line_says_of_run_node_and_round_is_in_its_fields(
    line: str, expected: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    as_json()
    assert logs.relay(line + "\n")
    (found,) = parsed(capfd.readouterr().err)
    assert {name: found[name] for name in expected} == expected
    assert found.keys() - NEEDED == expected.keys() - NEEDED
    assert "\x1b" not in found["message"]


def test_what_a_node_starts_is_json_with_the_nodes_name_and_a_traceback_has_the_level_of_its_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    create(tmp_path / "secrets", ["ward-7"], [], days=1)
    as_json(node=name_of(tmp_path / "secrets" / "nodes" / "ward-7"))
    program = (
        "from logging import ERROR, INFO\n"
        "from flwr.supercore.logger import log\n"
        "log(INFO, 'Round 2, training: ward-7')\n"
        "try:\n    1 / 0\nexcept ZeroDivisionError:\n    log(ERROR, 'broken', exc_info=True)\n"
        "print('plain')\n"
    )
    assert _run([sys.executable, "-c", program], {}, say) == (False, 0)
    out, err = capfd.readouterr()
    assert out == ""
    lines = parsed(err)
    assert all(line["node"] == "ward-7" for line in lines)
    assert lines[0] | {"level": "INFO", "round": 2, "message": "Round 2, training: ward-7"} == lines[0]
    trace = next(line for line in lines if "ZeroDivisionError" in line["message"])
    assert trace["level"] == "ERROR"
    assert "plain" in {line["message"] for line in lines}


def test_warnings_of_python_and_other_loggers_are_forwarded(capfd: pytest.CaptureFixture[str]) -> None:
    as_json()
    logger = logging.getLogger("quickbloom-test")
    logger.addHandler(logging.StreamHandler(sys.stderr))
    logger.propagate = False
    logs.forward([logger])
    try:
        raise ValueError("bad")
    except ValueError:
        logger.exception("it happened in round 4")
    (line,) = parsed(capfd.readouterr().err)
    assert (line["logger"], line["level"], line["round"]) == ("quickbloom-test", "ERROR", 4)
    assert line["exception"].splitlines()[-1] == "ValueError: bad"


def test_a_file_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^`--log-file` must be a file that can be written, got '.*file/log' \("):
        as_json(tmp_path / "file" / "log")
    with pytest.raises(ConfigError, match=r"^`--log-file` must be"):
        logs.check(logs.Settings(file=tmp_path))


def test_settings_survive_the_environment(tmp_path: Path) -> None:
    asked = logs.Settings(logs.Format.JSON, tmp_path / "log", 2.5)
    assert logs.from_environment(asked.to_environment()) == asked
    assert logs.Settings().to_environment() == {}
    assert not logs.from_environment({})


@pytest.mark.parametrize(
    "runtime", ["in-process", pytest.param("simulation", marks=[pytest.mark.simulation, pytest.mark.slow])]
)
@pytest.mark.parametrize("more", [[], ["--verbose"]])
def test_every_line_of_a_run_is_json_and_rounds_have_their_number(tmp_path: Path, runtime: str, more: list[str]) -> None:
    words = ["--runtime", runtime, "--rounds", "3", "--set", "evaluate-every=1", "--output", str(tmp_path / "mine")]
    done = quickbloom("run", *words, *more, "--no-report", "--json", "--log-format", "json", "--log-file", "log", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rounds"] == 3
    lines = parsed(done.stderr)
    assert (tmp_path / "log").read_text() == done.stderr
    told = [line for line in lines if line["message"].startswith("round ")]
    assert [line["round"] for line in told] == ([] if more else [record["round"] for record in read_history(tmp_path / "mine")])
    assert all(line["run"] == "mine" for line in told)
