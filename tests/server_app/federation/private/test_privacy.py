"""Differential privacy: the account agrees with published figures, the noise is what it says, and nothing escapes it."""

import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict
from loopback import Fault, LoopbackGrid
from scipy.stats import kstest, norm

from quickbloom.common.config.privacy import PrivacyOptions
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.errors import ConfigError, DataError
from quickbloom.common.maths.params import Params
from quickbloom.common.personal.checkpoint import write
from quickbloom.common.wire.messages import TRAIN, TrainReply, TrainRequest, from_arrays, to_arrays
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.federation.private.privacy import Ledger, TaskPrivacy, epsilon, normal, uniform
from quickbloom.server_app.runs.checkpoints import load
from quickbloom.server_app.runs.directory import read_history
from quickbloom.server_app.runs.resume import noisy_steps

pytest.importorskip("dp_accounting")

SMALL: dict[str, Any] = {"dataset": "gaussian", "gaussian.clients": 24, "model": "linear", "min-nodes": 1, "evaluate-every": 0}
SMALL |= {"rounds": 3, "adapt-steps": 1, "privacy.noise-multiplier": 1.0, "privacy.clip": 0.5, "privacy.delta": 0.01}


def privacy(train: int = 100, per_round: int = 20, released: Ledger | None = None, **settings: Any) -> TaskPrivacy:
    options = PrivacyOptions(**{"noise_multiplier": 1.0, "clip": 2.0, "noise_seed": 0, **settings})
    return TaskPrivacy(options, train, per_round, released)


def run(folder: Path, faults: Mapping[int, Fault] | None = None, nodes: int = 3, **settings: Any) -> tuple[dict[str, Any], Any]:
    flat = {**SMALL, "output-dir": str(folder), **{key.replace("__", ".").replace("_", "-"): v for key, v in settings.items()}}
    config = parse_run_config(flat)
    grid = LoopbackGrid(nodes, config.flat(), faults)
    return run_federation(grid, config), grid


# ---- the account


@pytest.mark.parametrize(
    ("noise", "epochs", "published"),
    [(1.3, 15, 1.19), (1.1, 60, 3.01), (0.7, 45, 7.10)],
)
def test_account_agrees_with_the_published_table_of_the_mnist_tutorial(noise: float, epochs: int, published: float) -> None:
    # TensorFlow Privacy's tutorials/README.md: 60,000 images, batches of 256, delta 1e-5. Its figures turn Renyi divergences
    # into epsilon by Mironov 2017, Proposition 3; the account here by the tighter bound of Canonne, Kamath, Steinke 2020. With
    # the old formula the table comes out, from the same divergences.
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    steps, q = epochs * 60_000 // 256, 256 / 60_000
    accountant = RdpAccountant()
    accountant.compose(dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(noise)), steps)
    by_order = zip(accountant._orders, accountant._rdp, strict=True)
    assert min(rdp + math.log(1e5) / (a - 1) for a, rdp in by_order if a > 1) == pytest.approx(published, abs=0.005)
    assert 0.75 * published < epsilon(noise, q, steps, 1e-5) < published


def test_account_without_sampling_is_at_most_a_little_above_the_exact_one() -> None:
    # T Gaussian mechanisms are one with noise z / sqrt(T), whose delta(epsilon) is known exactly (Balle, Wang 2018, Theorem 8).
    for z, steps in ((1.0, 1), (5.0, 10), (20.0, 100)):
        mu = math.sqrt(steps) / z
        eps = epsilon(z, 1.0, steps, 1e-5)
        exact = norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu)
        assert exact <= 1e-5
        smaller = 0.85 * eps
        assert norm.cdf(mu / 2 - smaller / mu) - math.exp(smaller) * norm.cdf(-mu / 2 - smaller / mu) > 1e-5


def test_account_grows_with_steps_and_sampling_and_shrinks_with_noise() -> None:
    assert epsilon(1.0, 0.1, 0, 1e-5) == 0.0
    assert epsilon(1.0, 0.1, 10, 1e-5) < epsilon(1.0, 0.1, 20, 1e-5) < epsilon(1.0, 0.2, 20, 1e-5) < epsilon(0.8, 0.2, 20, 1e-5)


def test_budget_is_used_up_but_not_exceeded() -> None:
    one = privacy(epsilon=3.0, delta=1e-3)
    steps = one.steps_within_budget(1000)
    assert 0 < steps < 1000
    assert one.epsilon(steps) <= 3.0 < one.epsilon(steps + 1)
    assert one.steps_within_budget(steps - 1) == steps - 1
    assert privacy(epsilon=0.0).steps_within_budget(7) == 7
    assert privacy(epsilon=1e-6, delta=1e-3).steps_within_budget(7) == 0


# ---- noise and sampling


def test_noise_is_standard_normal() -> None:
    values = normal(200_000, np.random.default_rng(1).bytes)
    assert kstest(values, "norm").pvalue > 0.01
    assert kstest(uniform(200_000, np.random.default_rng(2).bytes), "uniform").pvalue > 0.01
    # Neighbours are unrelated: the correlation of so many pairs has deviation 1 / sqrt(n).
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / math.sqrt(len(values))


def replies(*rows: tuple[float, float, float], size: int = 1) -> list[TrainReply]:
    """(mean, weight, within) of nodes whose meta-gradient is the same number everywhere."""
    return [TrainReply({"w": torch.full((size,), mean)}, weight, [0.1], within) for mean, weight, within in rows]


def test_mean_is_the_sum_over_the_expected_number_of_tasks_and_noise_in_every_number() -> None:
    size, like = 100_000, {"w": torch.zeros(100_000)}
    noisy = privacy(noise_multiplier=1.5).mean(replies((0.3, 4.0, 0), (-0.1, 2.0, 0), size=size), like)["w"]
    # Sum 0.3 * 4 - 0.1 * 2 = 1, over 20 expected tasks, though only 6 came. Deviation 1.5 * 2 / 20 = 0.15.
    assert noisy.dtype == torch.float32
    assert float(noisy.mean()) == pytest.approx(0.05, abs=4 * 0.15 / math.sqrt(size))
    assert float(noisy.std()) == pytest.approx(0.15, rel=4 / math.sqrt(2 * size))
    assert kstest((noisy.double().numpy() - 0.05) / 0.15, "norm").pvalue > 0.01


def test_noise_follows_the_norm_that_adapts() -> None:
    one, like = privacy(noise_multiplier=1.5, clip_quantile=0.5, clip=2.0), {"w": torch.zeros(100_000)}
    for clip in (0.5, 8.0):
        one.clip = clip
        noisy = one.mean([], like)["w"]
        assert float(noisy.std()) == pytest.approx(one.noise_multiplier * clip / 20, rel=4 / math.sqrt(2 * 100_000))
        assert one.clip != clip  # it adapts after the noise is made


def test_every_tensor_and_every_round_has_noise_of_its_own() -> None:
    one, like = privacy(), {"v": torch.zeros(40_000), "w": torch.zeros(40_000)}
    drawn = [value.double().numpy() for _ in range(2) for value in one.mean([], like).values()]
    # The correlation of so many pairs has deviation 1 / sqrt(n).
    assert abs(np.corrcoef(drawn) - np.eye(4)).max() < 5 / math.sqrt(40_000)


def test_seeded_noise_is_another_once_steps_were_released(tmp_path: Path) -> None:
    ledger, like = Ledger(tmp_path / "l"), {"w": torch.zeros(8)}
    first = privacy(released=ledger).mean([], like)["w"]
    again, fresh = privacy(released=ledger).mean([], like)["w"], privacy().mean([], like)["w"]
    assert torch.equal(first, fresh)
    assert not torch.equal(again, first)


def test_a_step_is_in_the_ledger_before_its_noise_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    monkeypatch.setattr("quickbloom.server_app.federation.private.privacy.normal", lambda *_: 1 / 0)
    ledger = Ledger(tmp_path / "l")
    with pytest.raises(ZeroDivisionError):
        privacy(released=ledger).mean([], {"w": torch.zeros(1)})
    assert ledger.released() == 1
    assert len(synced) == 1


def test_uniform_numbers_lie_strictly_between_0_and_1() -> None:
    # Their logarithm is taken: the least and the largest that bytes can say.
    least, most = (float(uniform(1, lambda count, byte=byte: bytes([byte]) * count)[0]) for byte in (0, 255))  # type: ignore[misc]
    assert 0 < least == 2.0**-53
    assert most < 1


def test_a_round_of_nobody_is_noise_alone() -> None:
    noisy = privacy(noise_multiplier=1.5).mean([], {"w": torch.zeros(50_000), "s": torch.zeros(())})
    assert float(noisy["w"].std()) == pytest.approx(0.15, rel=0.02)
    assert noisy["s"].shape == ()


def test_noise_is_new_in_every_run_unless_it_is_seeded() -> None:
    like = {"w": torch.zeros(8)}
    fresh = [privacy(noise_seed=-1).mean([], like)["w"] for _ in range(2)]
    seeded = [privacy(noise_seed=3).mean([], like)["w"] for _ in range(2)]
    assert not torch.equal(*fresh)
    assert torch.equal(*seeded)


def test_every_task_is_drawn_by_itself_with_the_rate_of_sampling() -> None:
    one, names = privacy(train=40, per_round=10), [str(i) for i in range(40)]
    drawn = np.array([[name in chosen for name in names] for chosen in (one.choose(names) for _ in range(4000))])
    assert drawn.mean(axis=0) == pytest.approx(np.full(40, 0.25), abs=5 * math.sqrt(0.25 * 0.75 / 4000))
    # Independent: the number in a sample is binomial, with variance 40 q (1 - q) = 7.5, not fixed.
    assert drawn.sum(axis=1).var() == pytest.approx(7.5, rel=5 * math.sqrt(2 / 4000))
    assert privacy(train=40, per_round=40).choose(names) == names


# ---- the clipping norm


def test_norm_follows_the_quantile_and_both_together_cost_what_the_setting_says() -> None:
    one = privacy(train=1000, per_round=500, clip=10.0, clip_quantile=0.5, noise_multiplier=2.0)
    # sigma_b = 500 / 20 = 25; z_delta = (1/4 - 1/2500)^-1/2.
    assert one.noise_multiplier == pytest.approx((1 / 4 - 1 / 2500) ** -0.5)
    norms = np.random.default_rng(0).lognormal(size=1000)  # median 1
    for _ in range(60):
        chosen = norms[[int(name) for name in one.choose([str(i) for i in range(1000)])]]
        one.mean(replies((0.0, float(len(chosen)), float((chosen <= one.clip).sum()))), {"w": torch.zeros(1)})
    assert one.clip == pytest.approx(1.0, abs=0.35)


def test_norm_moves_as_in_the_paper_by_hand() -> None:
    one = privacy(train=100, per_round=100, clip=2.0, clip_quantile=0.5, clip_rate=0.2, noise_multiplier=1e-9)
    one.count_noise = 0.0
    # 90 of 100 tasks within the norm: C exp(-0.2 (0.9 - 0.5)).
    one._adapt(replies((0.0, 60.0, 55.0), (0.0, 40.0, 35.0)))
    assert one.clip == pytest.approx(2.0 * math.exp(-0.08))


def test_the_bits_have_noise_of_their_own_that_is_never_small() -> None:
    # m / 20 for many tasks, for few at least the noise multiplier: else the meta-gradient would have to pay for it.
    assert privacy(per_round=20, clip_quantile=0.5).count_noise == 1.0
    assert privacy(per_round=20, clip_quantile=0.5, noise_multiplier=3.0).count_noise == 3.0
    assert privacy(train=900, per_round=400, clip_quantile=0.5).count_noise == 20.0
    one = privacy(train=400, per_round=400, clip_quantile=0.5, clip_rate=0.2)
    moved = []
    for _ in range(4000):
        one.clip = 1.0
        one._adapt(replies((0.0, 400.0, 200.0)))
        moved.append(math.log(one.clip) / 0.2)
    # Half of the tasks are within it, so all that moves it is noise of deviation 20 / 400.
    assert np.std(moved) == pytest.approx(0.05, rel=4 / math.sqrt(2 * 4000))
    assert abs(np.mean(moved)) < 4 * 0.05 / math.sqrt(4000)


def test_the_account_of_a_norm_that_adapts_is_that_of_the_setting() -> None:
    # Theorem 1 of Andrew et al.: with z_delta raised, both queries together are one mechanism of noise multiplier z.
    one, plain = privacy(clip_quantile=0.5), privacy()
    assert one.noise_multiplier > plain.noise_multiplier
    both = one.noise_multiplier**-2 + (2 * one.count_noise) ** -2
    assert both == pytest.approx(plain.noise_multiplier**-2)
    assert one.epsilon(7) == plain.epsilon(7) == epsilon(1.0, 0.2, 7, 1e-5)


def test_what_was_spent_before_counts_in_the_budget(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    whole = privacy(epsilon=3.0, delta=1e-3).steps_within_budget(1000)
    ledger.at_least(3)
    assert privacy(released=ledger, epsilon=3.0, delta=1e-3).steps_within_budget(1000) == whole - 3
    ledger.at_least(whole + 5)
    assert privacy(released=ledger, epsilon=3.0, delta=1e-3).steps_within_budget(1000) == 0


def test_without_a_quantile_the_norm_stays() -> None:
    one = privacy(clip=2.0)
    one.mean(replies((0.0, 10.0, 10.0)), {"w": torch.zeros(1)})
    assert (one.clip, one.noise_multiplier) == (2.0, 1.0)


# ---- whole runs


def test_a_run_reports_its_account_in_every_round_and_in_the_summary(tmp_path: Path) -> None:
    summary, _ = run(tmp_path)
    records = read_history(tmp_path)
    assert [record["privacy"]["steps"] for record in records] == [1, 2, 3]
    for record in records:
        # All 17 training tasks in every round.
        assert record["privacy"]["epsilon"] == pytest.approx(epsilon(1.0, 1.0, record["round"], 0.01))
    assert summary["privacy"] == records[-1]["privacy"]
    assert summary["privacy"]["sampling"] == 1.0
    assert len((tmp_path / "privacy.jsonl").read_text().splitlines()) == 3


def test_a_run_without_privacy_has_no_account(tmp_path: Path) -> None:
    off: dict[str, Any] = {"privacy__noise_multiplier": 0.0, "privacy__clip": 0.0}
    summary, _ = run(tmp_path, **off)
    assert summary["privacy"] is None
    assert not (tmp_path / "privacy.jsonl").exists()


def test_training_ends_at_the_budget(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("flwr").propagate = True
    budget = epsilon(1.0, 1.0, 2, 0.01) + 0.01
    summary, _ = run(tmp_path, rounds=50, privacy__epsilon=budget)
    assert summary["rounds"] == len(read_history(tmp_path)) == summary["privacy"]["steps"] == 2
    assert summary["privacy"]["epsilon"] <= budget < epsilon(1.0, 1.0, 3, 0.01)
    assert "so training ends after round 2" in caplog.text
    with pytest.raises(ConfigError, match=r"`privacy.epsilon` must be at least"):
        run(tmp_path / "poor", privacy__epsilon=0.001)


def test_steps_that_a_crash_made_the_server_forget_stay_in_the_account(tmp_path: Path) -> None:
    run(tmp_path / "first", checkpoint_every=1, rounds=3)
    with (tmp_path / "first" / "privacy.jsonl").open("a") as file:
        file.write('{"step": 4, "epsi')  # a fourth step was released, and the line of it is torn
    checkpoint = load(tmp_path / "first" / "checkpoints" / "round-000002.safetensors")
    config = parse_run_config(
        {**SMALL, "rounds": 3, "output-dir": str(tmp_path / "second"), "resume-from": str(checkpoint.path)}
    )
    summary = run_federation(LoopbackGrid(3, config.flat()), config)
    assert summary["privacy"]["steps"] == 5
    assert summary["privacy"]["epsilon"] == pytest.approx(epsilon(1.0, 1.0, 5, 0.01))


def resumed(source: Path, target: Path | None, **settings: Any) -> dict[str, Any]:
    """The summary of the run that goes on from `source`, in `target` or in place."""
    flat = {**SMALL, **{key.replace("__", ".").replace("_", "-"): v for key, v in settings.items()}}
    config = parse_run_config({**flat, "output-dir": str(target or source), "resume-from": str(source)})
    return run_federation(LoopbackGrid(3, config.flat()), config)


def cut_run(folder: Path, done: int, **settings: Any) -> Path:
    """A run of more rounds whose server died after `done` of them; returns its newest checkpoint."""
    run(folder, **settings)
    (folder / "summary.json").unlink()
    for file in (folder / "checkpoints").glob("round-*"):
        if int(file.stem.removeprefix("round-")) > done:
            file.unlink()
    return folder / "checkpoints" / f"round-{done:06d}.safetensors"


def test_a_checkpoint_that_was_copied_without_its_ledger_knows_what_was_spent(tmp_path: Path) -> None:
    budget = epsilon(1.0, 1.0, 5, 0.01) + 0.01
    more: dict[str, Any] = {"rounds": 20, "privacy__epsilon": budget}
    last = cut_run(tmp_path / "first", 4, **more)
    alone = tmp_path / "elsewhere" / "model.safetensors"
    alone.parent.mkdir()
    shutil.copy(last, alone)
    more["rounds"] = 5  # as the first run said once its budget was known
    summary = resumed(alone, tmp_path / "second", **more)
    # Four steps before and one now: by the ledger alone it would be the first, with the budget all there.
    assert (summary["privacy"]["steps"], summary["rounds"]) == (5, 5)
    assert summary["privacy"]["epsilon"] == pytest.approx(epsilon(1.0, 1.0, 5, 0.01))
    assert Ledger(tmp_path / "second" / "privacy.jsonl").released() == 5
    assert read_history(tmp_path / "second")[-1]["privacy"]["steps"] == 5


def test_the_larger_of_ledger_and_checkpoint_counts(tmp_path: Path) -> None:
    last = cut_run(tmp_path / "first", 2, rounds=4)
    ledger = tmp_path / "first" / "privacy.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    assert len(lines) == 4  # the rounds 3 and 4 were released, though their checkpoints are gone
    assert resumed(last, tmp_path / "newer-ledger", rounds=4)["privacy"]["steps"] == 6
    ledger.write_text(lines[0])  # a backup from after round 1
    assert resumed(last, tmp_path / "older-ledger", rounds=4)["privacy"]["steps"] == 4
    ledger.unlink()
    assert resumed(tmp_path / "first", None, rounds=4)["privacy"]["steps"] == 4
    assert Ledger(ledger).released() == 4


def test_a_copied_checkpoint_does_not_draw_the_noise_of_its_first_rounds_again(tmp_path: Path) -> None:
    last = cut_run(tmp_path / "first", 2, rounds=3, privacy__noise_seed=7)
    alone = tmp_path / "model.safetensors"
    shutil.copy(last, alone)
    with_ledger = resumed(last, tmp_path / "with", rounds=3, privacy__noise_seed=7)
    without = resumed(alone, tmp_path / "without", rounds=3, privacy__noise_seed=7)
    assert with_ledger["privacy"]["steps"] == 4  # round 3 was released twice
    assert without["privacy"]["steps"] == 3
    first = load(tmp_path / "first" / "checkpoints" / "round-000002.safetensors").facts["so-far"]
    assert first["noisy-steps"] == 2


def test_a_checkpoint_that_does_not_count_steps_has_cost_its_rounds(tmp_path: Path) -> None:
    checkpoint = load(cut_run(tmp_path / "first", 2, rounds=3))
    assert noisy_steps(checkpoint) == 2
    for nothing in ({}, {"noisy-steps": "7"}):
        assert noisy_steps(replace(checkpoint, facts={**checkpoint.facts, "so-far": nothing})) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"privacy__noise_multiplier": 2.0},
        {"privacy__noise_multiplier": 0.0, "privacy__clip": 0.0, "privacy__delta": 1e-5},
        {"privacy__clip": 5.0},
        {"tasks_per_round": 3},
        {"fraction": 0.5},
        {"privacy__epsilon": 100.0},
        {"privacy__delta": 1e-3},
    ],
)
def test_a_private_run_does_not_go_on_with_what_its_account_is_not_of(tmp_path: Path, changes: dict[str, Any]) -> None:
    last = cut_run(tmp_path / "first", 2, rounds=3)
    with pytest.raises(ConfigError, match="as in the run to go on from"):
        resumed(last, tmp_path / "second", rounds=3, **changes)


def test_a_run_does_not_become_private_on_the_way(tmp_path: Path) -> None:
    off: dict[str, Any] = {"privacy__noise_multiplier": 0.0, "privacy__clip": 0.0}
    last = cut_run(tmp_path / "first", 2, rounds=3, **off)
    with pytest.raises(ConfigError, match="as in the run to go on from"):
        resumed(last, tmp_path / "second", rounds=3)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", 0),
        ('{"step": 1}\n{"step": 2}\n', 2),
        ('{"step": 1}\n{"st', 2),  # torn: it was released, perhaps
        ('{"step": 7, "from": "checkpoint"}\n', 7),
        ('{"step": 7}\n{"step": 8}\n{"step": 8}\n', 9),  # two servers wrote the same step
        ('[]\n{"step": null}\n\n', 3),
    ],
)
def test_steps_of_a_ledger(tmp_path: Path, text: str, steps: int) -> None:
    (tmp_path / "l").write_text(text)
    ledger = Ledger(tmp_path / "l")
    assert ledger.released() == steps
    ledger.add(0.5)
    assert ledger.released() == steps + 1
    ledger.at_least(steps)
    assert ledger.released() == steps + 1
    ledger.at_least(steps + 9)
    assert ledger.released() == steps + 9
    ledger.add(0.5)
    assert ledger.released() == steps + 10


def test_a_ledger_does_not_take_over_fewer_steps_than_it_has(tmp_path: Path) -> None:
    one, other = Ledger(tmp_path / "one"), Ledger(tmp_path / "other")
    one.at_least(3)
    other.at_least(2)
    one.take_over(other)
    assert one.released() == 3
    other.take_over(one)
    assert other.released() == 3


def test_the_norm_that_adapts_goes_on_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapting: dict[str, Any] = {"privacy__clip_quantile": 0.5, "checkpoint_every": 1, "rounds": 4}
    last = cut_run(tmp_path / "first", 3, **adapting)
    clips = [record["privacy"]["clip"] for record in read_history(tmp_path / "first")]
    assert len(set(clips)) == 4
    assert load(last).facts["so-far"]["clip"] == clips[2]
    asked: list[float] = []
    real = TaskPrivacy._adapt

    def watch(self: TaskPrivacy, replies: list[TrainReply]) -> None:
        asked.append(self.clip)
        real(self, replies)

    monkeypatch.setattr(TaskPrivacy, "_adapt", watch)
    summary = resumed(last, tmp_path / "second", **adapting)
    assert asked == [clips[2]]  # and not the 0.5 of the settings
    moved = read_history(tmp_path / "second")[-1]["privacy"]["clip"]
    assert summary["privacy"]["clip"] == moved != clips[2]


@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan, math.inf, 1e300, "1", None])
def test_a_norm_of_a_checkpoint_with_which_nobody_would_clip_is_refused(tmp_path: Path, clip: Any) -> None:
    last = cut_run(tmp_path / "first", 2, rounds=3, privacy__clip_quantile=0.5)
    checkpoint = load(last)
    so_far = {**checkpoint.facts["so-far"], "clip": clip}
    forged = tmp_path / "forged.safetensors"
    write(forged, checkpoint.tensors, {**checkpoint.facts, "so-far": so_far}, wait=False)
    with pytest.raises(
        (ConfigError, DataError), match=r"whose clipping norm is none|`so-far\.clip` is not|number that is not finite"
    ):
        resumed(forged, tmp_path / "second", rounds=3, privacy__clip_quantile=0.5)


def test_a_norm_that_does_not_adapt_is_that_of_the_settings_whatever_a_checkpoint_says(tmp_path: Path) -> None:
    checkpoint = load(cut_run(tmp_path / "first", 2, rounds=3))
    forged = tmp_path / "forged.safetensors"
    write(forged, checkpoint.tensors, {**checkpoint.facts, "so-far": {**checkpoint.facts["so-far"], "clip": 0.0}}, wait=False)
    assert resumed(forged, tmp_path / "second", rounds=3)["privacy"]["clip"] == 0.5


def test_nodes_clip_to_the_norm_that_has_adapted_and_are_held_to_it(tmp_path: Path) -> None:
    asked: list[float] = []

    def watch(message: Message, answer: Any) -> Message:
        if message.metadata.message_type == TRAIN:
            asked.append(TrainRequest.from_records(message.content).clip)
        reply: Message = answer(message)
        return reply

    # Far too small at first, so that it grows at once; who clipped to the new norm is not refused for the old one.
    more: dict[str, Any] = {"privacy__clip": 1e-3, "privacy__clip_quantile": 0.9, "privacy__clip_rate": 2.0, "rounds": 4}
    summary, _ = run(tmp_path, {0: watch}, algorithm="fedavg", **more)
    after = [record["privacy"]["clip"] for record in read_history(tmp_path)]
    assert asked == [1e-3, *after[:-1]]
    assert after[-1] > 10 * asked[0]
    assert summary["failures"] == 0


def test_nodes_clip_every_task_and_weigh_all_alike(tmp_path: Path) -> None:
    seen: list[tuple[float, int, Params]] = []

    def watch(message: Message, answer: Any) -> Message:
        reply: Message = answer(message)
        if message.metadata.message_type == TRAIN:
            request = TrainRequest.from_records(message.content)
            assert request.clip == 0.5
            got = TrainReply.from_records(reply.content, len(request.task_ids))
            seen.append((got.weight, len(request.task_ids), got.gradient))
        return reply

    run(tmp_path, dict.fromkeys(range(24), watch), nodes=24, algorithm="fedavg")
    assert len(seen) == 3 * 17
    for weight, tasks, gradient in seen:
        assert (weight, tasks) == (1.0, 1)
        assert math.sqrt(sum(float(value.double().square().sum()) for value in gradient.values())) <= 0.5 * (1 + 1e-6)


def test_a_node_that_does_not_clip_is_of_no_use(tmp_path: Path) -> None:
    def unclipped(message: Message, answer: Any) -> Message:
        reply: Message = answer(message)
        if message.metadata.message_type != TRAIN:
            return reply
        records = RecordDict(dict(reply.content))
        gradient = from_arrays(reply.content.array_records["gradient"])
        records["gradient"] = to_arrays({name: value * 0 + 1.0 for name, value in gradient.items()})
        return Message(records, reply_to=message)

    run(tmp_path, {1: unclipped})
    reasons = [failure["reason"] for record in read_history(tmp_path) for failure in record["failures"]]
    assert len(reasons) == 3
    assert all("its meta-gradient has norm" in reason and "above the 0.5 that is allowed" in reason for reason in reasons)


def test_a_round_in_which_nobody_is_drawn_goes_on(tmp_path: Path) -> None:
    # One of 17 tasks a round: in 20 rounds some sample is empty, and with this seed several are.
    summary, _ = run(tmp_path, rounds=20, tasks_per_round=1, privacy__noise_seed=1)
    tasks = [record["train"]["tasks"] for record in read_history(tmp_path)]
    assert 0 in tasks
    assert max(tasks) > 1
    assert summary["privacy"]["steps"] == 20
    assert summary["privacy"]["epsilon"] == pytest.approx(epsilon(1.0, 1 / 17, 20, 0.01))


def test_noise_does_not_move_a_head_that_stays_zero(tmp_path: Path) -> None:
    more: dict[str, Any] = {"model": "mlp", "mlp__hidden": "4", "algorithm": "reptile", "reptile__zero_head": True}
    run(tmp_path, rounds=1, **more)
    meta = {name: value for name, value in load(tmp_path).tensors.items() if name.startswith("meta/")}
    assert [bool(meta[f"meta/{name}"].any()) for name in ("1.weight", "3.weight", "3.bias")] == [True, False, False]


def test_seeded_noise_and_a_large_delta_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("flwr").propagate = True
    run(tmp_path, rounds=1, privacy__noise_seed=4, privacy__delta=0.3)
    assert "Privacy noise is seeded" in caplog.text
    assert "Privacy delta is 0.3, above 1 / 17 training tasks" in caplog.text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"privacy.clip": 1.0}, "`privacy.clip` does nothing without noise"),
        ({"privacy.epsilon": 1.0}, "`privacy.epsilon` does nothing without noise"),
        ({"privacy.noise-multiplier": 1.0}, "`privacy.clip` must be above 0"),
        ({"privacy.noise-multiplier": 1.0, "privacy.clip": 1.0, "aggregate": "median"}, "`aggregate` must be 'mean'"),
        ({"privacy.noise-multiplier": 1.0, "privacy.clip": 1.0, "over-select": 1.5}, "`over-select` must be 1"),
        ({"privacy.noise-multiplier": 1.0, "privacy.clip": 1.0, "min-replies": 2.0}, "`min-replies` must be 0"),
        ({"privacy.noise-multiplier": -1.0}, "`privacy.noise-multiplier` must be greater than or equal to 0"),
        ({"privacy.noize": 1.0}, "there is no setting `privacy.noize`"),
    ],
)
def test_settings_that_protect_nobody_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_run_config(settings)
    assert words in str(caught.value)


def test_random_bytes_come_from_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def urandom(count: int) -> bytes:
        asked.append(count)
        return bytes(count)

    monkeypatch.setattr(os, "urandom", urandom)
    privacy(noise_seed=-1).mean([], {"w": torch.zeros(3)})
    assert sum(asked) == 4 * 2 * 3 * 8


def test_the_ledger_is_json(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "privacy.jsonl")
    one = privacy(released=ledger)
    one.mean([], {"w": torch.zeros(1)})
    one.mean([], {"w": torch.zeros(1)})
    lines = [json.loads(line) for line in (tmp_path / "privacy.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[1]["epsilon"] == one.epsilon(2)
    assert privacy(released=ledger).released == 2
