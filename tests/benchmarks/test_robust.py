"""The hostile federation of the benchmark: honest nodes compute what real ones do, and liars send what is said of them."""

import math
from pathlib import Path

import pytest
import torch

from benchmarks.robust import ATTACKS, CLEAN, HostileFederation
from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.messaging.in_process_grid import InlineGrid

SMALL = {"dataset": "gaussian", "gaussian.clients": 12, "model": "linear", "rounds": 2, "adapt-steps": 1, "min-nodes": 1}


def config(folder: Path) -> RunConfig:
    return parse_run_config({**SMALL, "baselines": False, "output-dir": str(folder)})


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
