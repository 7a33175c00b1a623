"""`keep`: a run ends with the best model by the validation tasks, also if that is the one before the first round."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from loopback import LoopbackGrid

from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.datasets import load_dataset
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.engine.round import evaluate
from quickbloom.common.errors import DataError
from quickbloom.common.wire.messages import EVALUATE, TRAIN, EvaluateRequest
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.events.file import read_events
from quickbloom.server_app.events.kinds import Scored, Warned
from quickbloom.server_app.federation.outer import OuterOptimizer
from quickbloom.server_app.runs import resume
from quickbloom.server_app.runs.checkpoints import CheckpointWriter, load
from quickbloom.server_app.runs.directory import read_history

GAUSSIAN: dict[str, Any] = {"dataset": "gaussian", "gaussian.clients": 30, "model": "linear", "algorithm": "fomaml"}
GAUSSIAN |= {"min-nodes": 1, "rounds": 4, "evaluate-every": 1, "adapt-steps": 3, "seed": 1, "keep": "best"}
HARMFUL: dict[str, Any] = {"fomaml__outer_lr": 1000.0, "fomaml__outer_optimizer": "sgd"}
"""A rate that throws the model away."""
UNEVEN: dict[str, Any] = {"fomaml__outer_lr": 0.3, "rounds": 6}


class Killed(BaseException):
    """The end of the server in the middle of a run."""


def settings(folder: Path, **changes: Any) -> RunConfig:
    named = {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}
    return parse_run_config({**GAUSSIAN, "output-dir": str(folder), **named}).resolved()


def run(folder: Path, nodes: int = 2, faults: Any = None, **changes: Any) -> dict[str, Any]:
    config = settings(folder, **changes)
    return run_federation(LoopbackGrid(nodes, config.flat(), faults), config)


def files(folder: Path) -> list[str]:
    return sorted(path.stem for path in (folder / "checkpoints").iterdir())


def validation_curve(folder: Path) -> list[float]:
    """The validation accuracy after every round at the rate and steps that were best then, the initial model first."""
    return [event.after for event in read_events(folder) if isinstance(event, Scored)]


def by_hand(config: RunConfig, meta: dict[str, torch.Tensor], summary: dict[str, Any], split: str) -> np.ndarray[Any, Any]:
    """Mean accuracy after every step of the tasks of a split, from the engine alone."""
    dataset = load_dataset("gaussian", config.table("gaussian"), Path())
    algorithm = build_algorithm(config, dataset.spec)
    ids = load(Path(summary["run_dir"])).facts["splits"][split]
    tasks = [dataset.load(task_id, config.seed) for task_id in ids]
    lr, steps = summary["chosen"]["adapt_lr"], len(summary[split]["steps"]) - 1
    return np.asarray(evaluate(algorithm, meta, [[task] for task in tasks], [lr], steps, 64)[1])[:, 0].mean(axis=0)


# ---- which model


def test_training_that_makes_it_worse_ends_with_the_initial_model(tmp_path: Path) -> None:
    summary = run(tmp_path, **HARMFUL)
    config = settings(tmp_path, **HARMFUL)
    initial = build_algorithm(config, load_dataset("gaussian", config.table("gaussian"), Path()).spec).init()
    curve = validation_curve(tmp_path)
    assert curve[0] > max(curve[1:])
    assert summary["kept"] == pytest.approx({"round": 0, "accuracy": curve[0], "last": curve[-1]})
    for split in ("validation", "test"):
        found = by_hand(config, initial, summary, split)
        assert summary[split]["accuracy"]["mean"] == pytest.approx(found.tolist(), abs=1e-6)
    after = summary["test"]["accuracy"]["mean"][summary["chosen"]["adapt_steps"]]
    assert summary["baselines"]["scores"]["accuracy"]["after"]["mean"] == pytest.approx(after, abs=1e-6)
    meta = load(tmp_path).meta
    assert all(torch.equal(meta[name], value) for name, value in initial.items())


def test_without_it_the_last_model_is_tested(tmp_path: Path) -> None:
    summary = run(tmp_path, keep="last", **HARMFUL)
    last = by_hand(settings(tmp_path, **HARMFUL), load(tmp_path).meta, summary, "test")
    assert summary["test"]["accuracy"]["mean"] == pytest.approx(last.tolist(), abs=1e-6)
    assert summary["kept"]["round"] == 4
    assert files(tmp_path) == ["round-000002", "round-000003", "round-000004"]
    assert len(validation_curve(tmp_path)) == 4  # none before training
