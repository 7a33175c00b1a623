"""Worker processes: the same numbers, state and errors as in one process, and nothing that is left behind."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from real_processes import commands_with, curve
from safetensors.torch import load_file
from typer.testing import CliRunner

from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.errors import ConfigError, RunError
from quickbloom.common.flower.names import log
from quickbloom.common.models import MODELS
from quickbloom.common.models.base import Model
from quickbloom.common.system.processes import processes_with
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.cli import main
from quickbloom.server_app.launch.prepare import settle
from quickbloom.server_app.messaging import worker_processes
from quickbloom.server_app.messaging.in_process_grid import InlineGrid
from quickbloom.server_app.messaging.worker_processes import PAYS, WARM_UP, Workers, Worth

pytestmark = pytest.mark.skipif(bool(worker_processes.why_not()), reason="no workers here")


def settings(folder: Path, **more: object) -> RunConfig:
    flat = {"dataset": "gaussian", "gaussian.clients": 12, "mlp.hidden": "8", "min-nodes": 3, "rounds": 3, "evaluate-every": 1}
    return parse_run_config({**flat, "adapt-steps": 2, "output-dir": str(folder), **more})


def trained(folder: Path, workers: int | None, **more: object) -> dict[str, Any]:
    config = settings(folder, **more)
    with InlineGrid(3, config.flat(), {}, workers) as grid:
        return run_federation(grid, config)


def left(folder: Path) -> tuple[Any, ...]:
    """What a run leaves that must not depend on who computed it: curve, scores of every task, and the model."""
    last = max((folder / "checkpoints").glob("round-*"))
    return curve(folder), (folder / "per_task.csv").read_text(), load_file(last)


@pytest.mark.parametrize(
    "more",
    [
        {"algorithm": "reptile"},
        {"algorithm": "heads", "evaluate-users": "both"},  # tasks have a state on their nodes
        {"algorithm": "maml", "update-dtype": "int8"},  # nodes keep what coding lost
        {"algorithm": "ditto", "aggregate": "median"},
        {"algorithm": "fomaml", "mode": "async", "async-buffer": 4, "devices": "lognormal"},
        {"algorithm": "fomaml", "secure-aggregation": True, "evaluate-every": 3, "rounds": 3},
    ],
    ids=lambda more: more["algorithm"],
)
def test_workers_leave_what_one_process_leaves_bit_for_bit(tmp_path: Path, more: dict[str, Any]) -> None:
    alone = trained(tmp_path / "alone", 1, **more)
    several = trained(tmp_path / "several", 2, **more)
    assert (alone["workers"], several["workers"]) == (1, 2)
    (one, rows, model), (other, other_rows, other_model) = left(tmp_path / "alone"), left(tmp_path / "several")
    assert one == other
    assert rows == other_rows
    assert model.keys() == other_model.keys()
    assert all(torch.equal(value, other_model[name]) for name, value in model.items())


def test_a_model_that_this_process_alone_knows_is_computed_by_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    linear: Any = MODELS["linear"]

    class Counted(linear):  # type: ignore[misc]
        name = "counted"

        @classmethod
        def build(cls, *args: Any, **named: Any) -> torch.nn.Module:
            seen.append(os.getpid())
            module: torch.nn.Module = super().build(*args, **named)
            return module

    assert issubclass(Counted, Model)
    monkeypatch.setitem(MODELS, "counted", Counted)
    summary = trained(tmp_path / "own", 3, model="counted")
    assert summary["workers"] == 3
    assert set(seen) == {os.getpid()}  # the workers have what was built before
    assert trained(tmp_path / "builtin", 1, model="linear")["test"] == summary["test"]


def test_workers_are_gone_after_the_run_and_their_seconds_count(tmp_path: Path) -> None:
    config = settings(tmp_path)
    with InlineGrid(3, config.flat(), {}, 2) as grid:
        summary = run_federation(grid, config)
        pids = [worker.process.pid or 0 for worker in workers_of(grid)._workers]
        assert all(os.getpgid(pid) == pid for pid in pids)  # Ctrl-C in a terminal does not reach them
        assert grid.cpu_seconds > 0
    assert summary["seconds"]["cpu"] > grid.cpu_seconds
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def workers_of(grid: InlineGrid) -> Workers:
    assert isinstance(grid._workers, Workers)
    return grid._workers


@pytest.fixture
def grid() -> Iterator[InlineGrid]:
    """A grid of three nodes with two workers, which answer whatever they are asked with `Answers`."""

    class Answers(InlineGrid):
        def answer(self, message: Message) -> Message | None:
            if message.metadata.message_type == "train":  # the first messages are answered here
                return None
            asked: dict[str, Any] = dict(message.content["request"])
            if asked["do"] == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if asked["do"] == "warn":
                log(logging.WARNING, "Node %s has a %s", message.metadata.dst_node_id, "remark")
            if asked["do"] == "nothing":
                return None
            told: dict[str, Any] = {"pid": os.getpid(), "size": len(asked["more"]), "threads": torch.get_num_threads()}
            return Message(RecordDict({"reply": ConfigRecord(told)}), reply_to=message)

    with Answers(3, settings(Path("/unused")).flat(), {}, 2) as made:
        made.push_messages([request(node_id, kind="train") for node_id in (100, 101, 102)])
        yield made


def request(node_id: int, do: str = "tell", more: bytes = b"", kind: str = "query.x") -> Message:
    return Message(RecordDict({"request": ConfigRecord({"do": do, "more": more})}), node_id, kind)


def test_a_node_stays_with_its_worker_which_computes_on_one_thread(grid: InlineGrid) -> None:
    for _ in range(2):
        replies = grid.send_and_receive([request(node_id) for node_id in (102, 101, 100)])
        assert [reply.metadata.src_node_id for reply in replies] == [102, 101, 100]
        told = [reply.content["reply"] for reply in replies]
        assert told[0]["pid"] == told[2]["pid"] != told[1]["pid"]
        assert os.getpid() not in {one["pid"] for one in told}
        assert {one["threads"] for one in told} == {1}


def test_messages_of_many_megabytes_pass_in_both_directions(grid: InlineGrid) -> None:
    large = bytes(3 * 2**23)
    replies = grid.send_and_receive([request(100 + i % 3, more=large) for i in range(7)])
    assert [reply.content["reply"]["size"] for reply in replies] == [len(large)] * 7


def test_a_message_without_a_reply_or_to_nobody_costs_the_others_nothing(grid: InlineGrid) -> None:
    ids = grid.push_messages([request(100, "nothing"), request(777), request(101)])
    assert [reply.metadata.reply_to_message_id for reply in grid.pull_messages(ids)] == ids[1:]


def test_what_a_node_logs_in_a_worker_is_logged_here(grid: InlineGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: told.append(record.getMessage()))
    monkeypatch.setattr(logging.getLogger("flwr"), "handlers", [handler])
    grid.send_and_receive([request(101, "warn"), request(102)])
    assert told == ["Node 101 has a remark"]


def test_a_worker_that_dies_ends_the_run_with_one_sentence(grid: InlineGrid) -> None:
    with pytest.raises(RunError, match=r"has ended \(by SIGKILL, as the system does when memory is short\).* `--workers 1`"):
        grid.send_and_receive([request(100), request(101, "die")])


def test_errors_of_nodes_are_those_of_one_process(tmp_path: Path) -> None:
    failed = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        with pytest.raises(RunError) as raised:
            trained(folder, workers, **{"reptile.outer-lr": 1e38, "algorithm": "reptile"})
        failed.append(str(raised.value))
    assert failed[0] == failed[1]
    assert "not finite" in failed[0]


# ---- when


def message() -> Message:
    return Message(RecordDict({"request": ConfigRecord({"x": 1})}), 100, "train")


def test_workers_pay_once_they_would_have_saved_more_than_their_start_takes() -> None:
    worth = Worth()
    worth.note("train", [WARM_UP / 2, WARM_UP / 2], [message()] * 2)  # imports and the like
    assert not worth.proven
    worth.note("train", [0.4, 0.1], [message()] * 2)  # saves a tenth of a second, less 2 ms
    assert not worth.proven
    for _ in range(round(PAYS / 0.1)):
        worth.note("train", [0.1, 0.1], [message()] * 2)
    assert worth.proven


def test_workers_do_not_pay_before_a_round_of_training_nor_for_work_that_one_node_has() -> None:
    worth = Worth()
    for _ in range(9):
        worth.note("evaluate", [2 * PAYS, 2 * PAYS], [message()] * 2)
    assert not worth.proven  # the data of the nodes may not all be read
    worth = Worth()
    for _ in range(9):
        worth.note("train", [5.0, 0.0], [message()])
    assert not worth.proven
    assert not Worth(at_once=True).proven


def test_a_long_first_round_is_enough() -> None:
    worth = Worth()
    worth.note("train", [60.0, 60.0], [message()] * 2)
    assert worth.proven


def test_a_short_run_starts_none_and_one_node_can_have_none(tmp_path: Path) -> None:
    assert trained(tmp_path, None)["workers"] == 1
    assert worker_processes.most(1) == 1


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ((None, 2, None, 3), r"`--workers` must be at most `--nodes` \(2\), got 3"),
        ((None, 2, "simulation", 2), r"`--workers` is for runs in process, got it with the runtime simulation"),
    ],
)
def test_workers_that_cannot_be_are_refused(
    given: tuple[Any, ...], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=sentence):
        settle({"dataset": "gaussian"}, *given)


def test_there_are_none_where_a_process_cannot_be_forked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert worker_processes.most(8) == 1
    with pytest.raises(ConfigError, match="`--workers` must be 1 here, got 2: a process that can use a GPU cannot be forked"):
        settle({"dataset": "gaussian"}, None, 2, None, 2)


# ---- the command

LONG = ["--rounds", "100000", "--dataset", "gaussian", "--workers", "2", "--set", "evaluate-every=0", "--no-report"]


def started(folder: Path, **more: Any) -> "subprocess.Popen[str]":
    """A long run with two workers, which are there."""
    command = [sys.executable, "-m", "quickbloom.server_app.cli.main", "run", *LONG, "--output", str(folder / "run")]
    env = {**os.environ, "QUICKBLOOM_TEST_MARK": str(folder)}
    run = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, cwd=folder, **more)
    deadline = time.monotonic() + 120
    while len(processes_with(f"QUICKBLOOM_TEST_MARK={folder}")) < 3:
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return run


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_workers_with_the_run(tmp_path: Path, ending: int) -> None:
    run = started(tmp_path, start_new_session=True)
    os.killpg(run.pid, ending)  # as a terminal does
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "Stopped; what was finished is in" in said
    assert "Traceback" not in said
    assert commands_with(f"QUICKBLOOM_TEST_MARK={tmp_path}") == []


def test_workers_end_when_the_run_is_killed(tmp_path: Path) -> None:
    run = started(tmp_path)
    run.kill()
    run.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while processes_with(f"QUICKBLOOM_TEST_MARK={tmp_path}"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_run_in_another_thread_can_have_workers(tmp_path: Path) -> None:
    found: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: found.append(trained(tmp_path, 2)))
    thread.start()
    thread.join()
    assert [summary["workers"] for summary in found] == [2]


def test_a_run_with_workers_says_so(tmp_path: Path) -> None:
    small = ["--dataset", "gaussian", "--rounds", "2", "--set", "gaussian.clients=8", "--no-report", "--output", str(tmp_path)]
    said = CliRunner().invoke(main.cli, ["run", *small, "--workers", "2"])
    assert said.exit_code == 0, said.output
    assert "in 2 worker processes" in said.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["runtime"], summary["workers"]) == ("in-process", 2)
