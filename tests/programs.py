"""Programs outside of Python that tests ask for a second opinion."""

import shutil
import subprocess
from pathlib import Path

import pytest


def program(name: str, *arguments: str | Path, fails: bool = False) -> str:
    """What a program prints on stdout and stderr; skips the test where it is not installed, fails it on a wrong exit code."""
    if shutil.which(name) is None:
        pytest.skip(f"needs the program `{name}`")
    done = subprocess.run([name, *map(str, arguments)], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr
