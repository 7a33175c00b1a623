"""The floor: cosine nearest neighbour on raw pixels. No training, no federation; a learned method must do better."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.runner import Plan, average
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.datasets import load_dataset
from quickbloom.common.datasets.base import Dataset, resolve_data_dir
from quickbloom.server_app.federation.splits import split_tasks

NAME = "cosine 1-nearest neighbour on pixels, support to test"


def floor(plan: Plan, seeds: Sequence[int]) -> dict[str, Any]:
    """Return the accuracy on the test tasks of a run of `plan` with each seed: {"runs", "mean", "sd"}."""
    settings = plan.setup(plan.variants[0]).effective()
    runs: list[dict[str, Any]] = []
    for seed in seeds:
        config = parse_run_config({**settings, "seed": seed})
        dataset = load_dataset(config.dataset, config.table(config.dataset), resolve_data_dir(""))
        test_ids = split_tasks(dataset.tasks(), config)["test"]
        runs.append({"seed": seed, "after": sum(score(dataset, task_id) for task_id in test_ids) / len(test_ids)})
    return {"runs": runs, **average(runs, ["after"])}


def score(dataset: Dataset, task_id: str) -> float:
    """Return the share of a task's test examples whose most similar support example has the same label; mean over its draws."""
    hits = []
    for draw in dataset.test_draws(task_id):
        support, test = (F.normalize(part.x.flatten(1), dim=1) for part in (draw.support, draw.test))
        nearest = (test @ support.T).argmax(dim=1)
        hits.append((draw.support.y[nearest] == draw.test.y).float().mean())
    return float(torch.stack(hits).mean())
