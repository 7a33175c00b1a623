"""What works where there is no Linux: macOS and Windows lack some of what this project uses, and so do these processes."""

import subprocess
import sys
from pathlib import Path

# As on Windows: no locks of files, no user ids, no affinity, no fork server, two signals fewer, no links that are refused.
BARE = """
import multiprocessing, os, signal, sys
import torch  # libraries have their own ways there
for module in ("fcntl", "pwd", "grp", "resource", "termios"):
    sys.modules[module] = None
for name in ("sched_getaffinity", "getuid", "geteuid", "fork", "killpg", "O_NOFOLLOW", "O_DIRECTORY"):
    delattr(os, name)
for name in ("SIGHUP", "SIGKILL"):
    delattr(signal, name)
multiprocessing.get_all_start_methods = lambda: ["spawn"]
"""
USE = """
import numpy as np
import quickbloom
x = np.random.default_rng(0).normal(size=160)
data = {"x": x, "target": np.where(x > 0, "up", "down"), "task": np.array([f"t{i % 8}" for i in range(160)])}
np.savez("data.npz", **data)
done = quickbloom.run("fomaml", data="data.npz", rounds=2, output="run", progress=False)
models = quickbloom.adapt("run", "data.npz", "mine")
print(len(models), len(quickbloom.predict("mine", "data.npz").rows), quickbloom.load("mine/t3.safetensors").task)
"""


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=180, check=False)


def test_runs_in_one_process_adapting_and_predicting_need_nothing_of_linux(tmp_path: Path) -> None:
    done = python(BARE + USE, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["8", "160", "t3"]


def test_the_commands_of_one_process_need_nothing_of_linux(tmp_path: Path) -> None:
    arguments = ["run", "--in-process", "--dataset", "gaussian", "--rounds", "1", "--no-report", "--output", "run", "--json"]
    code = f"sys.argv = ['quickbloom', *{arguments}]\nfrom quickbloom.server_app.cli.main import main\nmain()"
    done = python(BARE + code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "summary.json").is_file()
