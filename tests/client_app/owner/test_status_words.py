"""`quickbloom-edge status`: sentences, JSON, and an exit code that says whether all is well."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quickbloom.client_app.cli import cli
from quickbloom.client_app.join import join
from quickbloom.client_app.owner import diary
from quickbloom.client_app.owner.words import REFUSALS
from quickbloom.common.errors import ConfigError, QuickbloomError
from quickbloom.common.wire.refusal import KINDS


def status(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["status", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout


def visited(state: Path) -> None:
    with diary.visiting(str(state), "fl.example.org:9092") as visit:
        visit.connected()


def test_every_kind_of_refusal_has_words_for_the_owner() -> None:
    assert REFUSALS.keys() == KINDS.keys()


def test_a_device_that_fares_well_says_what_it_did(tmp_path: Path) -> None:
    with diary.visiting(str(tmp_path), "fl.example.org:9092") as visit:
        visit.connected()
        diary.note_roll_call(str(tmp_path), 2, {"ward-9": "it has 1 row with a target"})
        for number in ("1", "2"):
            diary.note_message(str(tmp_path), "train", "77", number)
        diary.note_kept(str(tmp_path), 2, "wards")
        code, said = status("--state", str(tmp_path))
    assert code == 0
    lines = said.splitlines()
    assert lines[0] == f"Device of fl.example.org:9092, folder {tmp_path}"
    assert lines[1].startswith("It runs since 20")
    assert "number 77," in said
    assert "it trained in 2 rounds, the last of them round 2." in said
    assert "Left out: 1 task.\n  ward-9: it has 1 row with a target\n" in said
    assert "Personal models: 2, made at 20" in said
    assert status("--state", str(tmp_path))[0] == 0  # stopped by its owner


WRONG: dict[str, tuple[Callable[[str], None], str]] = {
    "columns": (
        lambda state: diary.note_refusal(state, "columns", "yours are a, b"),
        "What to do: look at your file with `quickbloom-edge check-data`",
    ),
    "unknown": (lambda state: diary.note_refusal(state, "news", "so it is"), "The server says: so it is."),
    "device": (lambda state: diary.note_message(state, "train", "1", "1", "the disk is full"), "UTC: the disk is full."),
    "tasks": (lambda state: diary.note_roll_call(state, 0, {"w": "1 row"}), "None of its tasks can be used"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_said_with_what_to_do_and_exit_code_1(tmp_path: Path, case: str) -> None:
    visited(tmp_path)
    note, words = WRONG[case]
    note(str(tmp_path))
    code, said = status("--state", str(tmp_path))
    assert (code, words in said) == (1, True), said
    (one,) = json.loads(status("--state", str(tmp_path), "--json")[1])
    assert (one["well"], one["running"], words in one["troubles"][0]) == (False, False, True)


def test_a_device_that_died_without_a_word_is_not_well(tmp_path: Path) -> None:
    visited(tmp_path)
    facts = diary.read(tmp_path)
    del facts["join"]["ended"]
    (tmp_path / diary.FILE).write_text(json.dumps(facts))
    code, said = status("--state", str(tmp_path))
    assert (code, "does not run any more, without having said why" in said) == (1, True)


def test_a_refusal_before_the_last_join_is_remembered_and_no_trouble(tmp_path: Path) -> None:
    diary.note_refusal(str(tmp_path), "task", "two nodes host the task 'ward'")
    facts = diary.read(tmp_path)
    facts["refusal"]["at"] = "2026-01-02T03:04:05+00:00"
    (tmp_path / diary.FILE).write_text(json.dumps(facts))
    visited(tmp_path)
    code, said = status("--state", str(tmp_path))
    assert (code, "at 2026-01-02 03:04 UTC, it did not take part: another device" in said) == (0, True)


def test_what_the_checks_before_joining_find_is_there_to_read_later(tmp_path: Path) -> None:
    settings = {"state-dir": str(tmp_path / "state"), "data-path": str(tmp_path / "none.csv"), "target-column": "y"}
    with pytest.raises(QuickbloomError) as caught:
        join("localhost:1", tmp_path, settings, 9094, print)
    code, said = status("--state", str(tmp_path / "state"))
    assert (code, str(caught.value).split(":")[0] in said) == (1, True), said


def test_devices_are_found_by_themselves_and_a_folder_of_none_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for arguments in ([], ["--state", str(tmp_path)]):
        result = CliRunner().invoke(cli, ["status", *arguments])
        assert isinstance(result.exception, ConfigError)
        assert str(result.exception).startswith("`--state` must ")
    for name in ("one", "two"):
        visited(tmp_path / "quickbloom" / name)
    assert len(json.loads(status("--json")[1])) == 2
    odd = {"run": {"id": "\x1b[2J"}, "rounds": [], "join": {"began": 5, "server": "\u202ehost"}}
    (tmp_path / "quickbloom" / "two" / diary.FILE).write_text(json.dumps(odd))
    said = status()[1]
    assert "Last run: number [2J" in said
    assert all(line.isprintable() for line in said.splitlines())
    (tmp_path / "quickbloom" / "two" / diary.FILE).write_text("damaged")
    assert len(json.loads(status("--json")[1])) == 1
