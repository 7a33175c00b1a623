"""Other releases of Flower for tests, each in a folder of its own."""

import subprocess
import sys
from pathlib import Path

import pytest


def installed(release: str, folder: Path) -> Path:
    """`folder` with that release and nothing else; skips the test where the package index cannot be reached."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), f"flwr=={release}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"needs flwr {release} from a package index, which did not answer within two minutes")
    if done.returncode != 0:
        pytest.skip(f"needs flwr {release} from a package index: {' '.join(done.stderr.split())[-300:]}")
    return folder
