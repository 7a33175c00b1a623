"""Files that are written whole or not at all."""

import fcntl
import os
import stat
import threading
from pathlib import Path

import pytest

from quickbloom.common.system.whole_files import new, replacing, whole, write_private


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


# ---- any file, by its path


def test_what_is_left_of_a_killed_process_is_no_start_for_a_new_file(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "a.partial").symlink_to(tmp_path / "precious")  # or a link that somebody has planted
    with replacing(tmp_path / "a.bin") as partial:
        assert partial == tmp_path / "a.partial"
        assert not partial.is_symlink()
        partial.write_bytes(b"new")
    assert (tmp_path / "precious").read_text() == "kept"
    assert (tmp_path / "a.bin").read_bytes() == b"new"


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_a_mode_that_is_asked_for_holds_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "a", mode=0o640) as partial:
            partial.write_text("x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_failure_at_any_moment_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    (tmp_path / "a").write_text("old")

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    def write() -> None:
        with replacing(tmp_path / "a", wait=True) as partial:
            partial.write_text("new")
            if moment == "write":
                fail()

    if moment != "write":
        monkeypatch.setattr(os if moment == "fsync" else Path, moment, fail)
    with pytest.raises(OSError, match="the disk is full"):
        write()
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_the_content_is_on_the_disk_before_the_name_and_the_name_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def sync(descriptor: int) -> None:
        done.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def rename(partial: Path, target: Path) -> Path:
        done.append("rename")
        return replace(partial, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", rename)
    for wait in (True, False):
        with replacing(tmp_path / "a", wait=wait) as partial:
            partial.write_text("x")
    assert done == ["file", "rename", "directory", "rename"]


def test_on_windows_bytes_stay_as_they_are_and_only_files_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There `os.open` takes no directory, `os.fsync` no file open for reading, and text mode is the default of `os.open`."""
    start, sync = os.open, os.fsync
    synced: list[str] = []

    def opened(path: Path, flags: int, mode: int = 0o777) -> int:
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        if flags & os.O_CREAT:
            assert flags & 1 << 30, "text mode"
        return start(path, flags & ~(1 << 30), mode)

    def waited(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        synced.append("file")
        sync(descriptor)

    monkeypatch.setattr(os, "O_BINARY", 1 << 30, raising=False)
    monkeypatch.delattr(os, "O_DIRECTORY")
    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", waited)
    with replacing(tmp_path / "a", mode=0o600, wait=True) as partial:
        partial.write_bytes(b"new")
    write_private(tmp_path / "b", "text")
    assert ((tmp_path / "a").read_bytes(), (tmp_path / "b").read_text(), synced) == (b"new", "text", ["file"])


@pytest.mark.parametrize("there", ["file", "link"])
def test_a_new_file_is_never_one_that_was_there(tmp_path: Path, there: str) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        new(tmp_path / there, 0o600)
