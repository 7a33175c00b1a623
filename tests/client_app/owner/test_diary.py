"""What a device notes of itself: a small private file that only ever helps."""

import json
import stat
from pathlib import Path

import pytest

from quickbloom.client_app.owner import diary
from quickbloom.common.errors import DataError


def test_rounds_are_counted_once_each_by_run_and_in_all(tmp_path: Path) -> None:
    for run, kind, number in [
        ("1", "query.roll_call", ""),
        ("1", "train", "1"),
        ("1", "train", "1"),  # again after a loss
        ("1", "evaluate", "1"),
        ("1", "train.masked", "2"),
        ("2", "train", "1"),
    ]:
        diary.note_message(str(tmp_path), kind, run, number)
    facts = diary.read(tmp_path)
    assert (facts["rounds"], facts["run"]["id"], facts["run"]["rounds"], facts["run"]["round"]) == (3, "2", 1, "1")
    assert facts["message"]["what"] == "train"


def test_a_refusal_of_the_server_stays_until_the_device_takes_part(tmp_path: Path) -> None:
    state = str(tmp_path)
    diary.note_refusal(state, "columns", "other columns")
    diary.note_message(state, "query.roll_call", "2", "")
    assert diary.read(tmp_path)["refusal"]["reason"] == "other columns"
    diary.note_message(state, "train", "2", "1")
    assert "refusal" not in diary.read(tmp_path)


def test_a_fault_of_the_device_is_over_with_the_next_message_that_it_answers(tmp_path: Path) -> None:
    state = str(tmp_path)
    diary.note_message(state, "query.roll_call", "1", "", "the file has no column `age`")
    assert diary.read(tmp_path)["refusal"]["by"] == diary.DEVICE
    diary.note_message(state, "query.roll_call", "2", "")
    assert "refusal" not in diary.read(tmp_path)


def test_the_file_is_private_and_small_whatever_it_is_told(tmp_path: Path) -> None:
    state = str(tmp_path / "new" / "state")
    diary.note_roll_call(state, 1, {f"task {i} \x1b[2J" + "x" * 10_000: "y" * 10_000 for i in range(1000)})
    diary.note_refusal(state, "k" * 10**6, "r" * 10**6)
    file = tmp_path / "new" / "state" / diary.FILE
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    # 50 tasks of 300 characters each for name and reason
    assert file.stat().st_size < 50 * 700 + 5000
    assert "\\u001b" not in file.read_text()
    assert diary.read(file.parent)["tasks"]["left-out-in-all"] == 1000


@pytest.mark.parametrize(
    "content", ["", "[1]", '{"rounds": "many", "run": 5, "tasks": [], "refusal": 1}', "[" * 10**5, "\udcff"]
)
def test_a_damaged_file_is_begun_anew_or_read_as_far_as_it_goes(tmp_path: Path, content: str) -> None:
    (tmp_path / diary.FILE).write_text(content, errors="surrogateescape")
    diary.note_message(str(tmp_path), "train", "1", "1")
    assert diary.read(tmp_path)["rounds"] == 1


def test_a_device_works_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with diary.visiting(str(tmp_path / "file" / "state"), "host:1") as visit:
        visit.connected()
    diary.note_refusal("", "form", "no folder, nothing to note")


def test_the_end_of_a_visit_is_noted_with_its_reason(tmp_path: Path) -> None:
    with diary.visiting(str(tmp_path), "host:1"):
        assert diary.is_there(tmp_path)
    assert not diary.is_there(tmp_path)
    assert json.loads((tmp_path / diary.FILE).read_text())["join"]["why"] == ""
    with pytest.raises(DataError), diary.visiting(str(tmp_path), "host:1"):
        raise DataError("the file 'ward.csv' is empty")
    assert diary.read(tmp_path)["join"]["why"] == "the file 'ward.csv' is empty"
    with diary.visiting(str(tmp_path), "host:1") as visit:
        visit.code = 7
    assert "exit code 7" in diary.read(tmp_path)["join"]["why"]
