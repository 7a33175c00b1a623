"""TMPDIR that is too long, missing, read-only or full, and what is told of it."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from quickbloom.common.errors import ConfigError
from quickbloom.common.system import temporary


@pytest.fixture(autouse=True)
def anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)  # what Python has once found it keeps


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)]
    if os.getuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs to mount a small file system")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_directory_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    with pytest.raises(
        ConfigError, match=r"`TMPDIR` must be a directory that can be written .*none' \(No such file or directory\)"
    ):
        temporary.check()


def test_a_file_is_no_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"\(Not a directory\)"):
        temporary.check()


def test_a_full_directory_is_refused(monkeypatch: pytest.MonkeyPatch, full: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(full))
    with pytest.raises(ConfigError, match=r"No space left on device\): make it, free some space there, or name another one"):
        temporary.check()


def test_a_directory_that_can_be_used_is_left_empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    temporary.check()
    assert temporary.short(len(str(tmp_path))) == str(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_directory_serves_where_the_path_is_too_long(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = tmp_path / ("ü" * 30)  # 60 bytes
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    assert temporary.short(59) in ("/tmp", "/var/tmp", "/dev/shm")
    monkeypatch.setattr(temporary, "_SHORT", (str(tmp_path / "none"),))
    monkeypatch.setenv("HOME", str(long))
    with pytest.raises(ConfigError, match=r"path has at most 20 bytes, and none of .* can be written: name a shorter one"):
        temporary.short(20)


def test_a_relative_directory_is_named_whole_for_processes_that_run_elsewhere() -> None:
    assert temporary.absolute({"TMPDIR": "tmp"}) == {"TMPDIR": str(Path.cwd() / "tmp")}
    assert temporary.absolute({}) == {}
