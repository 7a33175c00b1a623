"""Files that are written whole or not at all, and names that are not UTF-8."""

import os
import stat
import threading
from pathlib import Path

import pytest

from quickbloom.common.errors import DataError
from quickbloom.common.files import check_name, is_text, shown, whole


def test_a_file_that_is_not_written_to_its_end_stays_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("old")

    def write() -> None:
        with whole(file) as out:
            out.write("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_the_old_file_is_there_until_the_new_one_is_whole_and_keeps_its_mode(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("old")
    file.chmod(0o640)
    with whole(file, newline="") as out:
        out.write("größer\r\n")
        out.flush()
        assert file.read_text() == "old"
    assert file.read_bytes() == "größer\r\n".encode()
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_a_new_file_has_the_mode_that_the_user_wants(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with whole(tmp_path / ("n" * 250)) as out:  # hardly shorter than a name can be
            out.write("x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / ("n" * 250)).stat().st_mode) == 0o640


def test_a_link_keeps_its_place(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "link", tmp_path / "there" / "file"
    link.symlink_to(target)
    for text in ("first", "second"):  # the link leads nowhere at first
        with whole(link) as out:
            out.write(text)
        assert link.is_symlink()
        assert target.read_text() == text


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    pipe, came = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: came.append(pipe.read_text()))
    reader.start()
    with whole(pipe) as out:
        out.write("rows")
    reader.join(10)
    assert came == ["rows"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_what_utf8_has_no_place_for_is_an_escape(tmp_path: Path) -> None:
    with whole(tmp_path / "a") as out:
        out.write("d\udce9p\ud800")
    assert (tmp_path / "a").read_text() == "d\\udce9p\\ud800"


@pytest.mark.parametrize(("name", "text"), [("d\udce9p", False), ("dép", True), ("", True)])
def test_names_that_are_not_utf8_are_shown_and_refused(name: str, text: bool) -> None:
    assert is_text(name) is text
    if text:
        check_name("the folder", name)
        assert shown(name) == name
    else:
        with pytest.raises(DataError, match=r"^the folder 'd\\xe9p' has a name that is not UTF-8: rename it"):
            check_name("the folder", name, DataError)
