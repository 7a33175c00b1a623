"""The script for a GPU, tried on a CPU: its ways agree, and one that fails is named."""

import time
from dataclasses import replace

import pytest
import torch

from benchmarks import gpu
from benchmarks.models import CASES, difference
from quickbloom.common.maths.params import Params

CPU = torch.device("cpu")
SMALL = gpu.Work(replace(CASES[0], examples=6), "maml", 3)


def test_every_way_computes_what_the_loop_does() -> None:
    found = {way: side() for way, side in gpu.sides(SMALL, CPU, torch.float64).items()}
    assert set(found) == {"loop", "engine"}
    assert difference(found["engine"], found["loop"]) < gpu.SAME
    rough = {way: side() for way, side in gpu.sides(SMALL, CPU).items()}
    assert set(rough) == {"loop", "engine", "bf16"}
    assert 0 < difference(rough["bf16"], rough["loop"]) < 0.1
    assert "compiled" in gpu.sides(replace(SMALL, compiled=True), CPU)


def test_a_way_that_fails_or_differs_is_named_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = gpu.sides(SMALL, CPU)["loop"]

    def broken() -> Params:
        raise RuntimeError("no such device\nand more")

    def other() -> Params:
        return {name: 1.1 * value for name, value in loop().items()}

    def endless() -> Params:
        return {name: value / 0 for name, value in loop().items()}

    ways = {"loop": loop, "engine": loop, "compiled": broken, "graph": other, "bf16": endless}
    monkeypatch.setattr(gpu, "sides", lambda work, device, dtype=None: ways)
    section = gpu.measured(SMALL, CPU, 3, time.monotonic() + 60)
    assert section["repetitions"] == 3
    assert set(section["ways"]) == {"loop", "engine"}
    assert section["failures"]["compiled"] == "RuntimeError: no such device"
    assert section["failures"]["graph"].startswith("differs from the loop by 0.1")
    assert section["failures"]["bf16"] == "is not finite"
    assert "engine" in gpu.line(section)


def test_the_time_ends_the_repetitions(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = gpu.sides(SMALL, CPU)["loop"]
    monkeypatch.setattr(gpu, "sides", lambda work, device, dtype=None: {"loop": loop})
    section = gpu.measured(SMALL, CPU, 50, time.monotonic() - 1)
    assert section["repetitions"] == 1
