"""The hostile federation of the benchmark: honest nodes compute what real ones do, and liars send what is said of them."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.robust import ATTACKS, CLEAN, KNOWN_ROOT, RULES, WHOLE, HostileFederation, around
from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.messaging.in_process_grid import InlineGrid

SMALL = {"dataset": "gaussian", "gaussian.clients": 12, "model": "linear", "rounds": 2, "adapt-steps": 1, "min-nodes": 1}


def config(folder: Path, **more: Any) -> RunConfig:
    return parse_run_config({**SMALL, "baselines": False, "output-dir": str(folder), **more})


def test_without_an_attack_it_is_a_federation_of_real_nodes_with_one_task_each(tmp_path: Path) -> None:
    real, played = config(tmp_path / "real"), config(tmp_path / "played")
    one = run_federation(InlineGrid(12, real.flat(), {}), real)
    other = run_federation(HostileFederation(played, CLEAN, {"client-003"}), played)
    assert other["test"]["accuracy"]["mean"] == pytest.approx(one["test"]["accuracy"]["mean"], abs=1e-6)
    assert other["test"]["loss"]["mean"] == pytest.approx(one["test"]["loss"]["mean"], rel=1e-5)
    assert (other["chosen"], other["failures"]) == (one["chosen"], 0)


def lost_and_failed(folder: Path, attack: str) -> tuple[list[float], int]:
    chosen = config(folder / attack.replace(" ", "-"))
    summary = run_federation(HostileFederation(chosen, attack, {f"client-{i:03d}" for i in range(6)}), chosen)
    return summary["test"]["loss"]["mean"], summary["failures"]


@pytest.mark.parametrize("attack", ["scaling", "label flip"])
def test_an_attack_within_the_form_changes_the_result_and_goes_unnoticed(tmp_path: Path, attack: str) -> None:
    (clean, _), (spoiled, failures) = lost_and_failed(tmp_path, CLEAN), lost_and_failed(tmp_path, attack)
    assert spoiled != clean
    assert failures == 0


def test_an_attack_with_nan_costs_replies(tmp_path: Path) -> None:
    assert lost_and_failed(tmp_path, "NaN")[1] > 0


def test_attacks_by_hand() -> None:
    own, honest = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [2.0], [3.0]])
    sent = {name: attack(own, honest, 0).flatten().tolist() for name, attack in ATTACKS.items()}
    assert sent["sign flip"] == [-1.0, -2.0]
    assert sent["scaling"] == [100.0, 200.0]
    # Against the mean 2, ten times the mean length 2.
    assert sent["collusion, far"] == pytest.approx([-20.0, -20.0])
    assert sent["collusion"] == [-20.0, -20.0]
    assert sent["inner product"] == [-4.0, -4.0]
    assert all(map(math.isnan, sent["NaN"]))
    # n = 5, f = 2: one supporter is wanted, of 3 honest; z of (3 - 1) / 3 is 0.4307; the deviation of 1, 2, 3 is 1.
    assert sent["little"] == pytest.approx([2 - 0.4307] * 2, abs=1e-4)
    # m = 2 and |p| = 1: 2 - gamma is at most as far from 3 as 1 is, so that gamma = 1. Of sums: 3 gamma^2 + 2 = 5, gamma = 1.
    # The deviation, of three numbers and not of two, is sqrt(2 / 3), and gamma makes up for it.
    for name in WHOLE:
        assert sent[name] == pytest.approx([1.0, 1.0], abs=1e-6)


def reach(update: np.ndarray, honest: np.ndarray, kind: str) -> tuple[float, float]:
    """The two sides of the constraint of min-max, or min-sum, in loops over all pairs."""
    to_honest = [float(np.sum((update - one) ** 2)) for one in honest]
    pairs = [[float(np.sum((one - other) ** 2)) for other in honest] for one in honest]
    if kind == "min-max":
        return max(to_honest), max(max(row) for row in pairs)
    return sum(to_honest), max(sum(row) for row in pairs)


@pytest.mark.parametrize("name", sorted(WHOLE))
@pytest.mark.parametrize("seed", range(3))
def test_a_hidden_update_goes_as_far_as_its_constraint_lets_it(name: str, seed: int) -> None:
    honest = np.random.default_rng(seed).normal(loc=0.3, size=(9, 20)) * np.linspace(0.1, 4, 20)
    own = torch.zeros(3, 20, dtype=torch.float64)
    sent = ATTACKS[name](own, torch.from_numpy(honest), 0).numpy()
    assert (sent == sent[0]).all()
    mean = honest.mean(axis=0)
    direction = -mean / np.linalg.norm(mean) if name.endswith("unit") else -honest.std(axis=0)
    gamma = (sent[0] - mean) @ direction / (direction @ direction)
    assert sent[0] == pytest.approx(mean + gamma * direction, abs=1e-9)
    assert gamma > 0.1
    kind = name.split(",")[0]
    left, right = reach(sent[0], honest, kind)
    assert left == pytest.approx(right, rel=1e-9)
    farther, _ = reach(mean + 1.001 * gamma * direction, honest, kind)
    assert farther > right


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_where_honest_nodes_agree_there_is_nothing_to_hide_in(name: str) -> None:
    sent = ATTACKS[name](torch.zeros(2, 3), torch.ones(4, 3), 0)
    assert sent.flatten().tolist() == pytest.approx([1.0] * 6, abs=1e-6)


def test_liars_who_know_the_root_set_lie_at_half_a_right_angle_to_it_against_what_others_add() -> None:
    # The mean (3, 4) has (0, 4) beside the root's direction: (1, 0) - (0, 1), at the mean length 5.
    honest = torch.tensor([[3.0, 4.0], [3.0, 4.0]], dtype=torch.float64)
    sent = around(torch.tensor([0.1, 0.0], dtype=torch.float64), honest)
    assert sent.tolist() == pytest.approx([5 / math.sqrt(2), -5 / math.sqrt(2)])


def test_with_momentum_nodes_of_the_benchmark_send_what_real_ones_do(tmp_path: Path) -> None:
    real, played = (config(tmp_path / name, **{"node-momentum": 0.5, "rounds": 3}) for name in ("real", "played"))
    one = run_federation(InlineGrid(12, real.flat(), {}), real)
    other = run_federation(HostileFederation(played, CLEAN, set()), played)
    assert other["test"]["loss"]["mean"] == pytest.approx(one["test"]["loss"]["mean"], rel=1e-5)
    plain = config(tmp_path / "plain", rounds=3)
    without = run_federation(InlineGrid(12, plain.flat(), {}), plain)
    assert without["test"]["loss"]["mean"] != one["test"]["loss"]["mean"]


def test_liars_that_know_the_root_set_are_given_what_it_contributes(tmp_path: Path) -> None:
    chosen = config(tmp_path / "known")
    liars = {f"client-{i:03d}" for i in range(3)}
    known = run_federation(HostileFederation(chosen, KNOWN_ROOT, liars, ["client-001", "client-002"]), chosen)
    clean = run_federation(HostileFederation(config(tmp_path / "clean"), CLEAN, liars), config(tmp_path / "clean"))
    assert known["test"]["loss"]["mean"] != clean["test"]["loss"]["mean"]
    assert known["failures"] == 0


def test_a_hidden_update_is_of_all_tensors_at_once(tmp_path: Path) -> None:
    grid = HostileFederation(config(tmp_path), "min-max, unit", set())
    source = torch.Generator().manual_seed(0)
    gradients = {"a": torch.randn(7, 2, 3, generator=source), "b": 5 * torch.randn(7, 1, generator=source)}
    before = torch.cat([value.flatten(1) for value in gradients.values()], dim=1).numpy()
    lying = torch.tensor([False, True, False, False, True, False, False])
    grid._lie(gradients, lying, 0)
    after = torch.cat([value.flatten(1) for value in gradients.values()], dim=1).numpy()
    assert (after[~lying.numpy()] == before[~lying.numpy()]).all()
    for liar in after[lying.numpy()]:
        left, right = reach(liar, before[~lying.numpy()], "min-max")
        assert left == pytest.approx(right, rel=1e-4)


def test_the_settings_of_every_rule_are_valid() -> None:
    assert all(parse_run_config({**SMALL, **settings, "malicious": 0.2}) for settings in RULES.values())
