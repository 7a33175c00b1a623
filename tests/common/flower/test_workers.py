"""Warm workers: the pace of looking for work, the fork in which a task runs, and when Flower's own way is taken."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from quickbloom.common.errors import ConfigError
from quickbloom.common.flower import registry, workers

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """[now], and every sleep that follows; sleeping lets the time pass."""
    history = [100.0]

    def sleep(seconds: float) -> None:
        history[0] += seconds
        history.append(seconds)

    monkeypatch.setattr(time, "monotonic", lambda: history[0])
    monkeypatch.setattr(time, "sleep", sleep)
    return history


def test_a_node_looks_again_after_a_tenth_of_the_time_without_work(clock: list[float]) -> None:
    pace = workers.Pace(3.0)
    clock[0] += 8.0
    pace.sleep(3)
    assert clock[-1] == pytest.approx(0.8)
    for _ in range(200):
        pace.sleep(3)
    assert clock[-1] == 3.0  # no longer than Flower itself
    pace.work()
    pace.sleep(3)
    assert clock[-1] == workers.SHORTEST


def test_a_server_that_is_busy_is_asked_less(clock: list[float]) -> None:
    pace = workers.Pace(3.0, spares=True)
    pauses = []
    for took in (0.1, 0.1, 0.3, 0.1, 100.0):  # the way there and back takes 0.1 s
        pace.sleep(3)
        clock[0] += took
        pauses.append(clock[-1])
    pace.sleep(3)
    assert pauses[1:] == pytest.approx([workers.SHORTEST, workers.SHORTEST, 20 * 0.2, clock[-2]])
    assert clock[-1] == workers.LONGEST_PAUSE
    # What follows a reply sends it as well, and says nothing of the server.
    pace.sleep(0.5)
    clock[0] += 50.0
    pace.sleep(3)
    assert clock[-1] == 3.0


def test_waiting_for_a_reply_is_work(clock: list[float]) -> None:
    pace = workers.Pace(3.0)
    clock[0] += 1000.0
    pace.sleep(0.5)  # Flower's pause between two looks for the reply of its ClientApp
    assert clock[-1] == workers.SHORTEST
    pace.sleep(3)
    assert clock[-1] == workers.SHORTEST
    assert pace.perf_counter is time.perf_counter  # everything else is the module's own


def test_a_superexec_that_is_told_of_work_looks_at_once_and_else_seldom() -> None:
    told, tell = os.pipe()
    pace = workers.Pace(0.4, told)
    os.write(tell, b"..")
    started = time.monotonic()
    pace.sleep(1)
    assert time.monotonic() - started < 0.3
    pace.work()
    pace.sleep(1)
    assert time.monotonic() - started >= 0.4
    os.close(tell)
    pace.sleep(1)  # sees that the node is gone, and looks by itself from now on
    for _ in range(3):
        pace.sleep(1)
    assert time.monotonic() - started >= 0.4 + 3 * workers.SHORTEST
    os.close(told)


TELL = """
import json, os, subprocess
from quickbloom.common.flower import workers
from flwr.supernode import start_client_internal as node
pushed, started = [], {}
node._push_messages = lambda **named: pushed.append(named)
workers.start_warm_superexec()
class Started:
    def __init__(self, command, env, pass_fds):
        started.update(env=env, fds=list(pass_fds))
subprocess.Popen = Started
node.subprocess.Popen(["flower-superexec", "--insecure"])
for state in range(2):
    node._push_messages(state=state)
told = int(started["env"]["QUICKBLOOM_WAKE"])
said = os.read(told, 100).decode()
os.close(told)
node._push_messages(state=2)
print(json.dumps([pushed, said, told in started["fds"]]))
"""


def test_a_node_tells_its_superexec_of_every_message_and_goes_on_without_one() -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-P", "-c", TELL], env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[{"state": 0}, {"state": 1}, {"state": 2}], "..", True]


@pytest.mark.parametrize("given", ["0", "61", "often", "nan"])
def test_a_pause_out_of_range_is_refused_in_one_sentence(given: str) -> None:
    done = subprocess.run(
        workers.command("flower-superexec", "--help"),
        env={**os.environ, "PYTHONPATH": str(ROOT), workers.POLL: given},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == f"error: {workers.POLL} must be a number of seconds between 0.01 and 60, got '{given}'\n"


def test_the_pause_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(workers.POLL, raising=False)
    assert workers.longest_pause() == workers.LONGEST
    monkeypatch.setenv(workers.POLL, "0.5")
    assert workers.longest_pause() == 0.5
    monkeypatch.setenv(workers.POLL, "")
    with pytest.raises(ConfigError):
        workers.longest_pause()


def test_without_a_fork_server_every_message_starts_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert registry.why_not("worker-forks") == ""
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert "fork server" in registry.why_not("worker-forks")
    assert registry.why_not("node-polling") == ""
    assert workers.sparing() == {}


def test_flowers_programs_are_found_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | list[str]] = []
    probe = types.SimpleNamespace(load=lambda: lambda: seen.extend([os.environ["PATH"], sys.argv]))
    monkeypatch.setattr(workers, "_entry_point", lambda program: probe)
    monkeypatch.setattr(sys, "argv", ["-c", "flower-supernode", "--insecure"])
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv(registry.SWITCH, "0")
    workers.main()
    assert seen == [f"{Path(sys.executable).parent}{os.pathsep}/nowhere", ["flower-supernode", "--insecure"]]


PROBE = """
import json, os, sys
def main():
    from flwr.supercore.inflatable import inflatable_utils
    print("said")
    facts = {"pid": os.getpid(), "argv": sys.argv, "torch": "torch" in sys.modules, "ours": "quickbloom" in sys.modules}
    from flwr.supercore.retry import grpc_retry, http_retry
    facts["retries"] = [grpc_retry.MAX_RETRY_DELAY, http_retry.MAX_RETRY_DELAY]
    facts["backoff"] = inflatable_utils.pull_objects.__kwdefaults__["initial_backoff"]
    with open(os.environ["FACTS"] + sys.argv[1], "w") as file:
        json.dump(facts, file)
"""
SERVER = """
import importlib.metadata, subprocess, sys, time
from pathlib import Path
from quickbloom.common.flower import registry, workers
workers.PRELOAD = ("torch",)
workers._entry_point = lambda program: importlib.metadata.EntryPoint(program, "probe:main", "console_scripts")
registry.apply(*workers.SUPEREXEC)
from flwr.supercore.superexec.executor import subprocess_executor
start = subprocess_executor.subprocess.Popen
start(["flwr-clientapp", "one"])
start(["flwr-serverapp", "two"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
import multiprocessing
deadline = time.monotonic() + 100
while multiprocessing.active_children() and time.monotonic() < deadline:
    time.sleep(0.05)
"""


def test_every_task_has_a_fork_of_its_own_that_knows_torch_but_not_our_code(tmp_path: Path) -> None:
    (tmp_path / "probe.py").write_text(PROBE)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "FACTS": f"{tmp_path}/"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", SERVER], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one", "two"))
    assert one["pid"] != two["pid"]
    assert one["argv"] == ["flwr-clientapp", "one"]
    for facts in (one, two):
        assert facts["torch"]
        assert not facts["ours"]
        assert facts["backoff"] < 1
        assert facts["retries"] == [5, 5]
    assert done.stdout == "said\n"  # the second was asked to be quiet


CONNECT = """
import itertools, json, grpc
seen = []
grpc.insecure_channel = lambda target, options: seen.append(dict(options))
from quickbloom.common.flower import registry, workers
registry.apply(*workers.NODE)
from flwr.supercore.grpc import create_channel
from flwr.supercore.retry import make_simple_grpc_retry_invoker, make_simple_http_retry_invoker
create_channel("127.0.0.1:9092", insecure=True)
invokers = make_simple_grpc_retry_invoker(), make_simple_http_retry_invoker()
pauses = [list(itertools.islice(invoker.wait_gen_factory(), 8)) for invoker in invokers]
from flwr.supercore.inflatable.inflatable_utils import pull_objects
print(json.dumps([seen, pauses, pull_objects.__kwdefaults__["initial_backoff"]]))
"""


def test_a_node_whose_server_was_away_tries_again_within_seconds() -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", CONNECT], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    (options,), pauses, backoff = json.loads(done.stdout)
    assert backoff < 1
    assert options["grpc.max_reconnect_backoff_ms"] == 5000
    assert options["grpc.keepalive_time_ms"] == 60_000
    assert options["grpc.max_receive_message_length"] > 1e9  # Flower's own are still there
    assert pauses == [[1, 2, 4, 5, 5, 5, 5, 5]] * 2
