"""The apps are found by Flower however its threads meet: one may import a part of the package while another begins with it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# As in a bundle, with an `__init__` that takes long; the second thread comes while the first is in the middle of it.
THREADS = """
import importlib, importlib.util, sys, threading, time
sys.path.insert(0, sys.argv[1])
first = threading.Thread(target=lambda: importlib.import_module("quickbloom.server"))
first.start()
while "quickbloom" not in sys.modules:
    time.sleep(0.001)
assert importlib.util.find_spec(sys.argv[2]) is not None
importlib.import_module(sys.argv[2])
first.join()
"""


@pytest.mark.parametrize(("module", "code"), [("quickbloom.client", 0), ("quickbloom.client_app.app", 1)])
def test_a_thread_that_comes_in_the_middle_of_the_import_finds_the_apps(tmp_path: Path, module: str, code: int) -> None:
    (tmp_path / "quickbloom").mkdir()
    slow = "import time\ntime.sleep(0.5)\n"
    text = (ROOT / "quickbloom" / "__init__.py").read_text()
    where = text.index("from importlib")
    (tmp_path / "quickbloom" / "__init__.py").write_text(text[:where] + slow + text[where:])
    for side in ("server", "client"):
        (tmp_path / "quickbloom" / f"{side}.py").write_text((ROOT / "quickbloom" / f"{side}.py").read_text())
        (tmp_path / f"{side}_app").mkdir()
        (tmp_path / f"{side}_app" / "__init__.py").touch()
        (tmp_path / f"{side}_app" / "app.py").write_text("app = 1\n")
    (tmp_path / "server_app" / "own_app.py").write_text("own_server = 1\n")
    (tmp_path / "client_app" / "own_app").mkdir()
    (tmp_path / "client_app" / "own_app" / "__init__.py").touch()
    (tmp_path / "client_app" / "own_app" / "app.py").write_text("own_trainer = 1\n")
    command = [sys.executable, "-c", THREADS, str(tmp_path), module]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
