"""Real workers that are killed by signal 9, as the kernel does when memory runs out, and what their SuperExec makes of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quickbloom.common.flower import lean as lean_node

ROOT = Path(__file__).resolve().parents[3]

PROBE = """
import os, signal
def main():
    most = int(os.environ.get("QUICKBLOOM_AT_ONCE", "16"))
    if most > int(os.environ["ROOM"]):
        if os.environ["NOTES"] == "1":
            with open(os.environ["QUICKBLOOM_AT_ONCE_FILE"], "w") as file:
                file.write(str(most))
        os.kill(os.getpid(), signal.SIGKILL)
    print("computed", most, flush=True)
    open(os.environ["DONE"], "w").close()
"""
SUPEREXEC = """
import importlib.metadata, json, os, sys, threading
from quickbloom.common.flower import killed, registry, workers
workers.PRELOAD = ()
workers._entry_point = lambda program: importlib.metadata.EntryPoint(program, "probe:main", "console_scripts")
assert "worker-forks" in registry.apply(*workers.SUPEREXEC)
from flwr.supercore.superexec.executor import subprocess_executor
told, more = [], threading.Semaphore(0)
def finish(arguments, details):
    told.append(details)
    more.release()
killed.finish = finish
start = subprocess_executor.subprocess.Popen
command = [sys.argv[1], "--runtime-api-address", "127.0.0.1:1", "--token", "t"]
while True:
    start(command)
    while not (killed_again := more.acquire(timeout=0.1)) and not os.path.exists(os.environ["DONE"]):
        pass
    if not killed_again or not told[-1].startswith("again: "):
        break
print(json.dumps(told))
"""


def killed_until(
    room: int, tmp_path: Path, program: str = "flwr-clientapp", *, notes: bool = True, lean: bool = False
) -> list[str]:
    """What a SuperExec says of workers that are killed while they compute more than `room` tasks at once, and its log."""
    (tmp_path / "probe.py").write_text(PROBE)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "ROOM": str(room), "NOTES": str(int(notes))}
    env |= {lean_node.LEAN: str(int(lean)), "DONE": str(tmp_path / "done")}
    command = [sys.executable, "-P", "-c", SUPEREXEC, program]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    *computed, told = done.stdout.splitlines()
    assert computed == ([f"computed {room}"] if room else [])
    return [*json.loads(told), done.stderr]


@pytest.mark.parametrize("lean", [False, True])
def test_a_killed_worker_is_followed_by_one_that_computes_half_as_much_at_once(lean: bool, tmp_path: Path) -> None:
    *told, log = killed_until(4, tmp_path, lean=lean)
    assert [line.partition(" while ")[2] for line in told] == [
        f"it computed {n} tasks at once, most likely because memory ran out" for n in (16, 8)
    ]
    assert all(line.startswith("again: this node's worker was killed (signal 9)") for line in told)
    assert "trying again with 8 tasks at once" in log
    assert "`--chunk-size 4` keeps it so after a restart" in log


def test_one_that_is_killed_with_one_task_is_given_up_in_one_sentence(tmp_path: Path) -> None:
    *told, log = killed_until(0, tmp_path)
    assert [line.partition(": ")[0] for line in told] == ["again"] * 4 + ["over"]
    assert told[-1].endswith("while it computed 1 task at once, most likely because memory ran out")
    assert "give it more memory" in log


def test_one_that_is_killed_before_it_computes_gets_one_more_attempt(tmp_path: Path) -> None:
    *told, _ = killed_until(0, tmp_path, notes=False)
    assert [line.partition(": ")[0] for line in told] == ["again", "over"]
    assert "before it computed anything" in told[0]


def test_a_killed_server_of_a_run_is_told_of_at_once(tmp_path: Path) -> None:
    told, log = killed_until(0, tmp_path, "flwr-serverapp")
    assert told == "the process was killed (signal 9), most likely because memory ran out"
    assert f"flwr-serverapp: {told}" in log
