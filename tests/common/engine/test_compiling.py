"""`compile = "auto"`: when it compiles, that the numbers stay, and that nothing goes wrong where it cannot."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from quickbloom.common.algorithms import ALGORITHMS, Algorithm
from quickbloom.common.engine import compiling
from quickbloom.common.engine.compiling import SEEN, Auto
from quickbloom.common.engine.round import RoundResult, TaskWork, run_round
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.maths.learner import Learner
from quickbloom.common.models.mlp import perceptron

LONG = 10**9
"""Rounds of a run that is worth the trouble."""


def build(name: str, module: nn.Module | None = None) -> Algorithm:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        module = module or nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    options = ALGORITHMS[name].Options.model_validate({"inner-lr": 0.3, "inner-steps": 2})
    return ALGORITHMS[name](options, Learner(module, "classification", 2))


def batch(size: int, seed: int) -> Batch:
    source = torch.Generator().manual_seed(seed)
    return Batch.of(torch.randn(size, 3, generator=source), torch.randint(2, (size,), generator=source))


def one_round(algorithm: Algorithm, compile: bool | Auto = False, size: int = 4) -> RoundResult:
    work = [TaskWork(TaskData(*(batch(size, seed + k) for k in range(3))), np.random.default_rng(seed)) for seed in (0, 10, 20)]
    return run_round(algorithm, algorithm.init(), work, chunk_size=8, compile=compile)


def process(status: int) -> "subprocess.Popen[bytes]":
    """One that is over, with this exit status."""
    over = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({status})"])
    over.wait()
    return over


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would have been compiled elsewhere, which is done at once and works."""
    calls: list[Any] = []

    def elsewhere(algorithm: Algorithm, args: Any) -> "subprocess.Popen[bytes]":
        calls.append(args)
        return process(0)

    monkeypatch.setattr(compiling, "compile_elsewhere", elsewhere)
    return calls


def mark(monkeypatch: pytest.MonkeyPatch, cost: Callable[[], None] = lambda: None) -> list[str]:
    """Stand-in for compiled code, the same but that its calls are noted."""
    calls: list[str] = []

    def compiled(algorithm: Algorithm) -> Any:
        def call(*args: Any) -> Any:
            calls.append("compiled")
            cost()
            return compiling.mapped(algorithm)(*args)

        return call

    monkeypatch.setattr(compiling, "_compiled", compiled)
    return calls


def test_a_run_with_little_left_to_do_is_never_compiled(started: list[Any]) -> None:
    auto, algorithm = Auto(rounds=20), build("maml")
    for number in range(1, 21):
        one_round(algorithm, auto.round(number))
    assert started == []


def test_the_next_run_in_the_same_process_counts_anew(started: list[Any]) -> None:
    auto, algorithm = Auto(rounds=60), build("maml")
    for number in range(51, 55):
        one_round(algorithm, auto.round(number))
    for shape in auto._shapes.values():
        shape.seconds = LONG
    for number in (1, 2, 3, 4, 50):
        one_round(algorithm, auto.round(number))
    assert started == []


def test_a_process_for_one_message_compiles_nothing(started: list[Any]) -> None:
    one_round(build("maml"), Auto(LONG).round(1))
    assert started == []


def test_a_long_run_goes_over_to_compiled_code_when_it_is_there(started: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls, auto, algorithm = mark(monkeypatch), Auto(LONG), build("maml")
    expected = one_round(algorithm)
    for number in range(1, SEEN + 1):
        one_round(algorithm, auto.round(number))
    assert (len(started), calls) == (0, [])
    found = one_round(algorithm, auto.round(SEEN + 1))
    assert (len(started), calls) == (1, ["compiled"])
    torch.testing.assert_close(found.gradient, expected.gradient)


def test_code_that_turns_out_slower_is_given_up(started: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def tick() -> float:
        clock[0] += 1.0
        return clock[0]

    def slow() -> None:
        clock[0] += 10.0

    monkeypatch.setattr("quickbloom.common.engine.compiling.time.process_time", tick)
    calls, auto, algorithm = mark(monkeypatch, slow), Auto(LONG), build("maml")
    for number in range(1, SEEN + 10):
        one_round(algorithm, auto.round(number))
    assert calls == ["compiled"] * (1 + compiling.TRIED)


def test_where_it_cannot_be_compiled_rounds_go_on_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise TypeError("this model cannot be pickled")

    algorithm = build("maml")
    expected = one_round(algorithm)
    ways: tuple[Callable[..., Any], ...] = (refuse, lambda *_: process(1))
    for elsewhere in ways:
        auto = Auto(LONG)
        monkeypatch.setattr(compiling, "compile_elsewhere", elsewhere)
        for number in range(1, SEEN + 4):
            assert one_round(algorithm, auto.round(number)).losses == expected.losses


def test_code_that_does_not_load_is_left(started: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("no compiler")

    calls, auto, algorithm = mark(monkeypatch, broken), Auto(LONG), build("maml")
    expected = one_round(algorithm)
    for number in range(1, SEEN + 4):
        assert one_round(algorithm, auto.round(number)).losses == expected.losses
    assert calls == ["compiled"]


def test_at_most_a_few_shapes_are_compiled(started: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    mark(monkeypatch)
    auto, algorithm = Auto(LONG), build("maml")
    for number in range(1, SEEN + 2):
        for size in range(2, 4 + compiling.SHAPES):
            one_round(algorithm, auto.round(number), size)
    assert len(started) == compiling.SHAPES


@pytest.mark.parametrize(("name", "steps"), [("reptile", 0), ("fomaml", 0), ("heads", 0), ("heads", 1)])
def test_what_is_written_out_needs_no_compiler(
    name: str, steps: int, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    mark(monkeypatch)
    algorithm = build(name, perceptron((3, 4, 2)))
    if steps:
        options = algorithm.options.model_copy(update={"head_steps": steps})
        algorithm = type(algorithm)(options, algorithm.learner)
    auto = Auto(LONG)
    for number in range(1, SEEN + 3):
        one_round(algorithm, auto.round(number))
    assert len(started) == (1 if steps else 0)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_what_another_process_compiles_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = []
    real = compiling.compile_elsewhere

    def elsewhere(algorithm: Any, args: Any) -> "subprocess.Popen[bytes]":
        processes.append(real(algorithm, args, nice=0))
        processes[0].wait()  # a run would go on meanwhile
        return processes[0]

    monkeypatch.setattr(compiling, "compile_elsewhere", elsewhere)
    auto, algorithm = Auto(LONG), build("maml")
    expected = one_round(algorithm)
    for number in range(1, SEEN + 3):
        found = one_round(algorithm, auto.round(number))
        torch.testing.assert_close(found.gradient, expected.gradient, rtol=0, atol=1e-5)
        assert found.losses == pytest.approx(expected.losses, abs=1e-5)
    assert [process.returncode for process in processes] == [0]
    (shape,) = auto._shapes.values()
    assert shape._tried != []


def test_another_process_without_a_compiler_fails_silently(
    started: list[Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    mark(monkeypatch)
    auto, algorithm = Auto(LONG), build("maml")
    for number in range(1, SEEN + 2):
        one_round(algorithm, auto.round(number))
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    assert compiling.compile_elsewhere(algorithm, started[0], nice=0).wait() != 0
    assert capfd.readouterr() == ("", "")
