"""A function in a process of its own: its result, its errors, and that what it imports is gone with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

PROGRAM = """
import os, signal, sys
from quickbloom.common.errors import DataError, QuickbloomError
from quickbloom.common.system.apart import apart

def heavy():
    import wave
    return os.getpid()

def wrong():
    raise DataError("the file 'x' is empty", "x")

def mixed():
    from quickbloom.common.datasets.own.columns import MixedColumnError
    raise MixedColumnError("day", "date", 3, "oops", "declare it")

print(apart(heavy) != os.getpid(), "wave" in sys.modules)
for function in (wrong, lambda: 1 / 0, lambda: os.kill(os.getpid(), signal.SIGKILL), mixed):
    try:
        apart(function)
    except Exception as error:
        print(type(error).__name__, error, getattr(error, "quoted", ""), bool(getattr(error, "__notes__", "")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is this process")
def test_results_and_errors_come_back_and_imports_do_not() -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    first, wrong, defect, killed, mixed = done.stdout.splitlines()
    assert first == "True False"
    assert wrong == "DataError the file 'x' is empty ('x',) False"
    assert mixed.startswith(
        "MixedColumnError the column `day` holds dates, but row 3 (without the header) holds the text 'oops'"
    )
    assert mixed.endswith("(\"'oops'\",) False")
    assert defect.startswith("ZeroDivisionError")
    assert defect.endswith("True")  # with the place where it happened
    assert killed.startswith("QuickbloomError a process of this program was ended from outside (exit code -9;")
