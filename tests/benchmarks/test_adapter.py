"""The engine and a plain loop of torch and peft compute the same meta-gradient of an adapter."""

from pathlib import Path

import pytest
import small_encoders
import torch

from benchmarks import adapter

pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def few_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "RANK", 2)


@pytest.mark.parametrize("name", adapter.ALGORITHMS)
def test_both_sides_compute_the_same(name: str) -> None:
    engine, loop = adapter.sides(name, Path(small_encoders.directory("bert")), tasks=3, chunk=2)
    ours, plain = engine(), loop()
    assert ours.keys() == plain.keys()
    assert all("lora_" in one or one.startswith("head.") for one in plain)
    assert min(float(value.norm()) for value in plain.values()) > 0
    assert adapter.difference(ours, plain) < 1e-4
    again = loop()  # which starts from the same model
    assert all(torch.equal(again[one], value) for one, value in plain.items())


def test_another_start_is_noticed() -> None:
    engine, loop = adapter.sides("fomaml", Path(small_encoders.directory("bert")), tasks=2, chunk=2)
    plain = loop()
    assert adapter.difference({one: 1.1 * value for one, value in engine().items()}, plain) == pytest.approx(0.1, abs=1e-3)
