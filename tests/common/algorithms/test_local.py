"""Local training: the scores of plain fine-tuning, and nothing on the wire."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loopback import LoopbackGrid
from plain_torch import LOSSES, NO_MINIBATCHES, leaves, random_episode, sgd, tanh_learner
from pydantic import ValidationError

from quickbloom.common.algorithms.local import Local
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.datasets import load_dataset
from quickbloom.common.models import build_model
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.runs.directory import read_history


def test_a_task_fine_tunes_the_initial_model_and_contributes_nothing() -> None:
    algorithm = Local(Local.Options.model_validate({"inner-lr": 0.3, "inner-steps": 4}), tanh_learner("regression"))
    support, query = random_episode("regression")
    phi = sgd(LOSSES["regression"], leaves(tanh_learner("regression").initial()), [support] * 4, 0.3)
    gradient, loss = algorithm.meta_gradient(algorithm.init(), random_episode("regression"), NO_MINIBATCHES)
    assert algorithm.init() == gradient == {}
    assert loss.item() == pytest.approx(LOSSES["regression"](phi, query).item(), abs=1e-12)


def fine_tuned(task_id: str, config_flat: dict[str, object], lr: float, steps: int) -> list[float]:
    """Test accuracy after 0..steps SGD steps from the model of the run's seed, in plain torch."""
    config = parse_run_config(config_flat).resolved()
    (data,) = load_dataset("digits", config.table("digits"), Path()).test_draws(task_id)
    module = build_model("mlp", config.table("mlp"), (1, 8, 8), 5, config.seed)
    optimizer, scores = torch.optim.SGD(module.parameters(), lr), []
    for _ in range(steps + 1):
        scores.append((module(data.test.x).argmax(1) == data.test.y).double().mean().item())
        optimizer.zero_grad()
        F.cross_entropy(module(data.support.x), data.support.y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return scores


def test_a_run_moves_no_bytes_and_scores_plain_fine_tuning_of_the_initial_model(tmp_path: Path) -> None:
    flat = {"algorithm": "local", "rounds": 2, "mlp.hidden": "8", "seed": 3, "adapt-steps": 3, "output-dir": str(tmp_path)}
    config = parse_run_config({**flat, "evaluate-every": 1, "baselines": False})  # which ask for sums
    summary = run_federation(LoopbackGrid(2, config.flat()), config)
    assert summary["bytes"] == {"up": 0, "down": 0}
    assert all(record["bytes"] == {"up": 0, "down": 0} for record in read_history(tmp_path))
    with (tmp_path / "per_task.csv").open(newline="") as file:
        held_out = [row for row in csv.DictReader(file) if row["split"] == "test"]
    scores = [fine_tuned(row["task"], config.flat(), summary["chosen"]["adapt_lr"], 3) for row in held_out]  # type: ignore[arg-type]
    for row, own in zip(held_out, scores, strict=True):
        assert [float(row[f"accuracy_step{step}"]) for step in range(4)] == pytest.approx(own, abs=1e-6)
    assert summary["test"]["accuracy"]["mean"] == pytest.approx(np.mean(scores, axis=0), abs=1e-6)


def test_rounds_change_nothing(tmp_path: Path) -> None:
    def test_scores(rounds: int) -> list[float]:
        flat = {
            "algorithm": "local",
            "rounds": rounds,
            "mlp.hidden": "8",
            "min-nodes": 1,
            "output-dir": str(tmp_path / str(rounds)),
        }
        config = parse_run_config(flat)
        mean: list[float] = run_federation(LoopbackGrid(1, config.flat()), config)["test"]["loss"]["mean"]
        return mean

    assert test_scores(1) == test_scores(4)


def test_fewer_than_one_inner_step_is_refused() -> None:
    with pytest.raises(ValidationError, match="inner-steps"):
        Local.Options.model_validate({"inner-steps": 0})
