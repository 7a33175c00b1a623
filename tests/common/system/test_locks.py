"""Locks keep other processes out, and nobody where a system has none."""

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from quickbloom.common.system import locks
from quickbloom.common.system.locks import is_locked, locked


def test_a_lock_is_not_opened_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"), locked(tmp_path / "lock", create=True):
        pytest.fail("it was opened")
    assert (tmp_path / "precious").read_text() == "kept"
    with locked(tmp_path / "other", create=True, wait=True):
        assert stat.S_IMODE((tmp_path / "other").stat().st_mode) == 0o600
        asked = (
            "import pathlib, sys; from quickbloom.common.system.locks import locked\n"
            "with locked(pathlib.Path(sys.argv[1]), wait=True): print('in')"
        )
        waiting = subprocess.Popen([sys.executable, "-c", asked, str(tmp_path / "other")], stdout=subprocess.PIPE)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(3)
    assert waiting.communicate(timeout=30)[0] == b"in\n"


def test_a_lock_that_is_held_is_told_at_once(tmp_path: Path) -> None:
    assert not is_locked(tmp_path)
    with locked(tmp_path):
        assert is_locked(tmp_path)
        with pytest.raises(BlockingIOError), locked(tmp_path):
            pytest.fail("two hold it")
    assert not is_locked(tmp_path)


def test_without_locks_everybody_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "fcntl", None)
    with locked(tmp_path), locked(tmp_path, wait=True):
        assert not is_locked(tmp_path)
