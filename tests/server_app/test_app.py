"""A whole run from the roll call to the run directory."""

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.serverapp import Grid
from loopback import LoopbackGrid

from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.errors import ConfigError, RunError
from quickbloom.common.maths.intervals import t_quantile
from quickbloom.common.wire.baselines import SCORES, SUMS
from quickbloom.common.wire.messages import EVALUATE, TRAIN, EvaluateRequest
from quickbloom.server_app import app as server
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.runs import checkpoints
from quickbloom.server_app.runs.directory import read_history
from quickbloom.server_app.summary import _most_shots

KEYS = {
    *(
        "schema",
        "kept",
        "algorithm",
        "dataset",
        "data",
        "seed",
        "rounds",
        "run_dir",
        "runtime",
        "workers",
        "tasks",
        "chosen",
        "edge",
        "test",
        "validation",
        "shots",
        "bytes",
    ),
    *(
        "seconds",
        "failures",
        "versions",
        "resumed",
        "best_validation",
        "late",
        "joined",
        "privacy",
        "baselines",
        "async",
        "virtual_hours",
        "seen",
    ),
}


def settings(folder: Path, **changes: Any) -> RunConfig:
    flat = {"mlp.hidden": "8", "min-nodes": 1, "rounds": 3, "adapt-steps": 3, "seed": 1, "output-dir": str(folder)}
    return parse_run_config({**flat, **{key.replace("_", "-").replace("--", "."): v for key, v in changes.items()}}).resolved()


def run(folder: Path, nodes: int = 3, **changes: Any) -> tuple[dict[str, Any], LoopbackGrid]:
    config = settings(folder, **changes)
    grid = LoopbackGrid(nodes, config.flat())
    return run_federation(grid, config), grid


def test_a_run_leaves_all_its_files(tmp_path: Path) -> None:
    summary, _ = run(tmp_path / "out", checkpoint_every=2)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "history.jsonl", "events.jsonl", "summary.json", "per_task.csv", "checkpoints"}
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    given = settings(tmp_path / "out", checkpoint_every=2).flat()
    assert given["metric"] == "auto"  # what that came to is written down
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {**given, "metric": "accuracy"}
    assert [record["round"] for record in read_history(tmp_path / "out")] == [1, 2, 3]
    assert sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir()) == [
        f"round-{number:06d}.safetensors" for number in (0, 2, 3)
    ]


@pytest.mark.parametrize(("dataset", "metric"), [("digits", "accuracy"), ("sinusoid", "mse")])
def test_summary_has_exactly_the_documented_keys(tmp_path: Path, dataset: str, metric: str) -> None:
    summary, _ = run(tmp_path, dataset=dataset, sinusoid__clients=20, reptile__inner_lr=0.01)
    assert summary.keys() == KEYS
    assert (summary["schema"], summary["algorithm"], summary["dataset"]) == (1, "reptile", dataset)
    assert (summary["seed"], summary["rounds"], summary["run_dir"], summary["failures"]) == (1, 3, str(tmp_path), 0)
    assert summary["chosen"].keys() == {"adapt_lr", "adapt_steps"}
    for part in ("test", "validation"):
        assert summary[part].keys() == {"steps", metric, "loss"}
        assert summary[part]["steps"] == [0, 1, 2, 3]
        for name in (metric, "loss"):
            assert summary[part][name].keys() == {"mean", "ci95", "worst10", "sd", "weighted"}
            assert all(len(values) == 4 and np.isfinite(values).all() for values in summary[part][name].values())
    assert summary["tasks"].keys() == {"train", "validation", "test"}
    assert summary["seconds"].keys() == {"total", "cpu", "round_median"}
    assert summary["versions"].keys() == {"quickbloom", "flwr", "torch", "python"}


def test_per_task_scores_agree_with_the_summary(tmp_path: Path) -> None:
    summary, _ = run(tmp_path)
    with (tmp_path / "per_task.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for split in ("validation", "test"):
        own = [row for row in rows if row["split"] == split]
        assert len(own) == summary["tasks"][split] == len({row["task"] for row in own})
        for name in ("accuracy", "loss"):
            values = np.array([[float(row[f"{name}_step{step}"]) for step in range(4)] for row in own])
            assert values.mean(axis=0) == pytest.approx(summary[split][name]["mean"], abs=1e-6)
            half_width = t_quantile(len(own) - 1) * values.std(axis=0, ddof=1) / len(own) ** 0.5
            assert half_width == pytest.approx(summary[split][name]["ci95"], abs=1e-6)


def test_bytes_and_failures_are_those_of_all_messages(tmp_path: Path) -> None:
    summary, grid = run(tmp_path, nodes=2, evaluate_every=1, baselines=False, evaluate_users="unseen")
    kinds = [message.metadata.message_type for message in grid.requests]
    assert (kinds.count(TRAIN), kinds.count(EVALUATE)) == (2 * 3, 2 * 3 + 2)
    rounds = read_history(tmp_path)
    # A gradient has the size of the model, and every message down carries the model: 6 up; 6 + 6 + 2 down.
    up = sum(record["bytes"]["up"] for record in rounds)
    assert (summary["bytes"]["up"], summary["bytes"]["down"]) == (up, up // 6 * 14)
    assert summary["baselines"] is None


def test_baselines_cost_two_messages_to_a_node_and_the_bytes_of_sums_and_of_one_model(tmp_path: Path) -> None:
    without, first = run(tmp_path / "without", nodes=2, baselines=False, evaluate_users="unseen")
    summary, grid = run(tmp_path / "with", nodes=2, evaluate_users="unseen")
    assert [message.metadata.message_type for message in grid.requests[len(first.requests) :]] == [SUMS] * 2 + [SCORES] * 2
    # X^T X of 64 pixels and a one, X^T Y and Y^T Y of 5 classes go up; the model trained and the linear one go down.
    sums, linear = 8 * (65 * 65 + 65 * 5 + 5), 8 * (64 * 5 + 5 + 5)
    model = sum(record["bytes"]["up"] for record in read_history(tmp_path / "with")) // 6
    headers = 500  # names and shapes in a message
    assert 0 <= summary["bytes"]["up"] - without["bytes"]["up"] - 2 * sums < 2 * headers
    assert 0 <= summary["bytes"]["down"] - without["bytes"]["down"] - 2 * (model + linear) < 2 * headers
    assert (summary["test"], summary["chosen"]) == (without["test"], without["chosen"])


def test_test_and_training_tasks_are_scored_once_at_the_end_and_with_the_chosen_rate_alone(tmp_path: Path) -> None:
    summary, grid = run(tmp_path, evaluate_every=1)
    seen: list[tuple[set[str], list[float]]] = []
    for message in grid.requests:
        if message.metadata.message_type == EVALUATE:
            request = EvaluateRequest.from_records(message.content)
            seen.append((set(request.task_ids), request.lrs))
    with (tmp_path / "per_task.csv").open(newline="") as file:
        where = {row["task"]: row["split"] for row in csv.DictReader(file)}
    assert {where[task_id] for ids, _ in seen[-3:] for task_id in ids} == {"seen"}
    assert {where[task_id] for ids, _ in seen[-6:-3] for task_id in ids} == {"test"}
    assert {where[task_id] for ids, _ in seen[:-6] for task_id in ids} == {"validation"}
    assert all(lrs == [summary["chosen"]["adapt_lr"]] for _, lrs in seen[-6:])


def test_test_shots_scores_few_examples_at_the_chosen_step(tmp_path: Path) -> None:
    # Digits have two support images per class: 2 is all of them, and 3 is left out.
    summary, grid = run(tmp_path, test_shots="3,2,1", evaluate_users="unseen")
    shots, step = summary["shots"], summary["chosen"]["adapt_steps"]
    assert shots["shots"] == [1, 2]
    assert shots.keys() == {"shots", "accuracy", "loss"}
    for name in ("accuracy", "loss"):
        assert {part: values[1] for part, values in shots[name].items()} == {
            part: values[step] for part, values in summary["test"][name].items()
        }
        assert shots[name]["mean"][0] != shots[name]["mean"][1]
    asked = [message for message in grid.requests if message.metadata.message_type == EVALUATE]
    assert [EvaluateRequest.from_records(m.content).shots for m in asked[-9:]] == [0] * 3 + [1] * 3 + [2] * 3


@pytest.mark.parametrize("asked", ["", "5"])
def test_without_shots_to_score_there_is_none(tmp_path: Path, asked: str) -> None:
    assert run(tmp_path, test_shots=asked)[0]["shots"] is None


@pytest.mark.parametrize(("support", "classes", "most"), [(10, 5, 2), (11, 5, 2), (20, 76, 20), (10, 1, 10), (0, 5, 0)])
def test_where_classes_outnumber_the_examples_all_may_be_of_one_class(support: int, classes: int, most: int) -> None:
    assert _most_shots(support, classes) == most


def test_for_regression_shots_are_examples(tmp_path: Path) -> None:
    summary, _ = run(tmp_path, dataset="sinusoid", sinusoid__clients=12, test_shots="1,10,11")
    assert summary["shots"]["shots"] == [1, 10]
    assert summary["shots"]["mse"].keys() == {"mean", "ci95", "worst10", "sd", "weighted"}


@pytest.mark.parametrize("algorithm", ["reptile", "maml"])
def test_results_are_the_same_on_1_2_and_60_nodes(tmp_path: Path, algorithm: str) -> None:
    results = []
    for nodes in (1, 2, 60):
        summary, _ = run(tmp_path / str(nodes), nodes, algorithm=algorithm, rounds=10, evaluate_every=5)
        rounds = read_history(tmp_path / str(nodes))
        curve = [record["train"]["loss"] for record in rounds]
        curve += [value for record in rounds if "validation" in record for value in record["validation"]["accuracy"]]
        results.append(
            [*curve, *summary["test"]["accuracy"]["mean"], *summary["test"]["loss"]["mean"], *summary["chosen"].values()]
        )
    assert len(results[0]) == 10 + 2 * 4 + 2 * 4 + 2
    assert results[1] == pytest.approx(results[0], abs=1e-5)
    assert results[2] == pytest.approx(results[0], abs=1e-5)


def test_same_seed_same_bits_and_another_seed_another_run(tmp_path: Path) -> None:
    one, other, third = (run(tmp_path / str(i), seed=seed)[0] for i, seed in enumerate((1, 1, 2)))
    assert (one["test"], one["validation"], one["chosen"]) == (other["test"], other["validation"], other["chosen"])
    assert one["test"] != third["test"]


def test_the_last_checkpoint_holds_the_final_model_and_says_what_it_belongs_to(tmp_path: Path) -> None:
    run(tmp_path, algorithm="maml", checkpoint_every=0)
    found = checkpoints.load(tmp_path)
    tensors, facts = found.tensors, found.facts
    assert (facts["round"], facts["spec"]) == (3, ["classification", [1, 8, 8], 5])
    assert facts["config"] == {**settings(tmp_path, algorithm="maml", checkpoint_every=0).flat(), "metric": "accuracy"}
    assert {name for name in tensors if name.startswith("meta/")} == {
        f"meta/{i}.{part}" for i in (1, 3) for part in ("weight", "bias")
    }
    assert tensors["outer/step/1.weight"].item() == 3.0


def test_without_validation_tasks_the_algorithms_own_rate_is_used(tmp_path: Path) -> None:
    summary, _ = run(tmp_path, validation_tasks=0, reptile__inner_lr=0.07)
    assert summary["chosen"] == {"adapt_lr": 0.07, "adapt_steps": 3}
    assert summary["validation"] is None


def test_without_test_tasks_there_is_no_test_result(tmp_path: Path) -> None:
    summary, _ = run(tmp_path, test_tasks=0)
    assert summary["test"] is None
    assert summary["validation"] is not None


def test_a_directory_that_was_used_before_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    before = (tmp_path / "history.jsonl").read_text()
    with pytest.raises(ConfigError, match="already holds a run"):
        run(tmp_path)
    assert (tmp_path / "history.jsonl").read_text() == before


def test_a_directory_that_cannot_be_written_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = settings(tmp_path / "file" / "x")
    grid = LoopbackGrid(2, config.flat())
    with pytest.raises(ConfigError, match="`output-dir` must be a directory that can be written"):
        run_federation(grid, config)
    assert grid.requests == []


def test_a_relative_directory_is_refused() -> None:
    with pytest.raises(ConfigError, match="`output-dir` must be an absolute path"):
        settings(Path("runs"))


def test_no_usable_test_score_ends_the_run_with_a_sentence(tmp_path: Path) -> None:
    config = settings(tmp_path, validation_tasks=0)
    grid = LoopbackGrid(2, config.flat())
    broken = {
        i: lambda message, answer: None if message.metadata.message_type == EVALUATE else answer(message) for i in range(2)
    }
    grid._faults = broken
    with pytest.raises(RunError, match="no node sent a usable score of the test tasks"):
        run_federation(grid, config)
    assert not (tmp_path / "summary.json").exists()


def start(grid: Grid, **flat: Any) -> None:
    server.main(grid, Context(1, 1, {}, RecordDict(), flat))


def test_the_server_app_runs_from_flowers_flat_settings(tmp_path: Path) -> None:
    config = settings(tmp_path)
    start(LoopbackGrid(2, config.flat()), **config.flat())
    assert re.fullmatch(r"\d\.\d+\.\d+.*", json.loads((tmp_path / "summary.json").read_text())["versions"]["torch"])
    assert torch.get_num_threads() == 1


def test_a_mistake_in_the_settings_ends_the_run_without_a_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.tracebacklimit", 50, raising=False)
    with pytest.raises(ConfigError, match="did you mean `rounds`"):
        start(LoopbackGrid(1, {}), round=3)
    assert sys.tracebacklimit == 0
