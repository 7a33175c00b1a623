"""Scores by another metric than the engine's: a few tasks at once are held, and the numbers do not depend on how many."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loopback import LoopbackGrid

from quickbloom.client_app import measuring
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.engine.predicting import predict_path
from quickbloom.server_app.app import run_federation


def losses(folder: Path) -> list[float]:
    flat: dict[str, Any] = {
        "dataset": "gaussian",
        "gaussian.clients": 12,
        "test-tasks": 8,
        "validation-tasks": 2,
        "model": "linear",
        "algorithm": "fedavg",
        "rounds": 2,
    }
    flat |= {"min-nodes": 1, "metric": "log_loss", "evaluate-every": 0, "adapt-steps": 3, "output-dir": str(folder)}
    config = parse_run_config({**flat, "baselines": False}).resolved()
    return list(run_federation(LoopbackGrid(1, config.flat()), config)["test"]["log_loss"]["mean"])


@pytest.mark.parametrize("most", [1, 4000])
def test_scores_do_not_depend_on_how_many_tasks_are_held_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    at_once: list[int] = []
    whole = losses(tmp_path / "whole")

    def counted(algorithm: Any, meta: Any, draws: Any, *rest: Any) -> Any:
        at_once.append(len(draws))
        return predict_path(algorithm, meta, draws, *rest)

    monkeypatch.setattr(measuring, "predict_path", counted)
    monkeypatch.setattr(measuring, "_MOST_OUTPUTS", most)
    np.testing.assert_allclose(losses(tmp_path / "pieces"), whole, rtol=1e-5)
    assert max(at_once) == 1 if most == 1 else 1 < max(at_once) < 8
