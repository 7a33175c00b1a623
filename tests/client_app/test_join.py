"""What `quickbloom-edge join` does with the program that it runs, and what it refuses before."""

import signal
import sys
from pathlib import Path

import pytest

from quickbloom.client_app.join import JoinError, _run, join


def said(capfd: pytest.CaptureFixture[str]) -> list[str]:
    return capfd.readouterr().out.splitlines()


def test_it_ends_with_its_program_even_if_a_child_of_that_would_live_on() -> None:
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]); sys.exit(7)"
    # Not after ten minutes: the child holds the log's pipe.
    assert _run([sys.executable, "-c", parent], {}, print) == (False, 7)


def test_a_refusal_is_found_in_the_log_and_not_repeated(capfd: pytest.CaptureFixture[str]) -> None:
    program = "print('before'); print('Failed (code: 2004)'); print('after')"
    assert _run([sys.executable, "-c", program], {}, print) == (True, 0)
    assert said(capfd) == ["before"]


def test_a_state_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(JoinError, match=r"^`state-dir` must be a directory that user \d+ can write, got '.*file/state'"):
        join("localhost:1", tmp_path, {"state-dir": str(tmp_path / "file" / "state")}, 9094, print)


def test_a_signal_reaches_the_program_and_counts_as_a_wish(capfd: pytest.CaptureFixture[str]) -> None:
    program = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(600)"
    before = signal.getsignal(signal.SIGTERM)
    assert _run([sys.executable, "-c", program], {}, print) == (False, 0)
    assert signal.getsignal(signal.SIGTERM) is before
