"""Seen users: training tasks, scored once on test examples of their own, from what they keep on their nodes."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from loopback import LoopbackGrid
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.datasets import load_dataset
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.errors import ConfigError, RunError
from quickbloom.common.maths.batch import TaskData
from quickbloom.common.metric import ACCURACY, MSE
from quickbloom.common.wire.baselines import SCORES, ScoresRequest
from quickbloom.common.wire.messages import EVALUATE, EvaluateRequest, error_records
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.reporting.report import write_report
from quickbloom.server_app.reporting.result_table import baseline_tables, result_lines, users_rows
from quickbloom.server_app.runs.directory import MEASURED, read_history, spread

SMALL: dict[str, Any] = {"dataset": "gaussian", "gaussian.clients": 10, "model": "mlp", "mlp.hidden": "6", "min-nodes": 1}
SMALL |= {"rounds": 3, "evaluate-every": 1, "adapt-steps": 4, "baselines": False, "test-shots": "1"}
STATEFUL = ("heads", "ditto")


def settings(folder: Path, algorithm: str = "heads", **changes: Any) -> RunConfig:
    changed = {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}
    return parse_run_config({**SMALL, "algorithm": algorithm, "output-dir": str(folder), **changed}).resolved()


def run(folder: Path, algorithm: str = "heads", nodes: int = 2, **changes: Any) -> dict[str, Any]:
    config = settings(folder, algorithm, **changes)
    return run_federation(LoopbackGrid(nodes, config.flat()), config)


def rows(folder: Path, split: str = "seen") -> dict[str, dict[str, str]]:
    with (folder / "per_task.csv").open(newline="") as file:
        return {row["task"]: row for row in csv.DictReader(file) if row["split"] == split}


def curve(row: dict[str, str], name: str, steps: int = 4) -> list[float]:
    return [float(row[f"{name}_step{step}"]) for step in range(steps + 1)]


def model(folder: Path) -> dict[str, Tensor]:
    return load_file(max((folder / "checkpoints").glob("round-*.safetensors")))


# ---- the scores, by hand

LR, STRENGTH = 0.3, 0.5
Weights = dict[str, Tensor]


def outputs(weights: Weights, x: Tensor) -> Tensor:
    hidden = functional.linear(x, weights["1.weight"], weights["1.bias"]).relu()
    return functional.linear(hidden, weights["3.weight"], weights["3.bias"])


def step(weights: Weights, x: Tensor, y: Tensor, towards: Weights | None = None) -> Weights:
    """One step of gradient descent on all rows, with Ditto's pull if there is something to be drawn towards."""
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    loss = functional.cross_entropy(outputs(leaves, x), y)
    if towards is not None:
        loss = loss + STRENGTH / 2 * sum(((leaves[name] - towards[name]) ** 2).sum() for name in leaves)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {name: weights[name] - LR * g for name, g in zip(leaves, gradients, strict=True)}


def steps(weights: Weights, x: Tensor, y: Tensor, number: int, towards: Weights | None = None) -> Weights:
    for _ in range(number):
        weights = step(weights, x, y, towards)
    return weights


def by_hand(algorithm: str, start: Weights, tasks: dict[str, TaskData], rounds: int) -> dict[str, tuple[Weights, Any]]:
    """What every task predicts with at step 0, and what it is drawn towards, after these rounds with two steps of all rows."""
    theta, head = start, {name: start[name] for name in ("3.weight", "3.bias")}
    kept = dict.fromkeys(tasks, head if algorithm == "heads" else start)
    rows = {task: (torch.cat([d.support.x, d.query.x]), torch.cat([d.support.y, d.query.y])) for task, d in tasks.items()}
    for _ in range(rounds):
        before = theta
        if algorithm == "heads":
            ends = {task: steps({**before, **kept[task]}, *rows[task], 2) for task in tasks}
            kept = {task: {name: end[name] for name in head} for task, end in ends.items()}
        else:
            ends = {task: steps(before, *rows[task], 2) for task in tasks}
            kept = {task: steps(kept[task], *rows[task], 2, before) for task in tasks}
        weights = {task: 1.0 if algorithm == "heads" else float(len(rows[task][1])) for task in tasks}
        total = sum(weights.values())
        theta = {name: sum(weights[task] * end[name] for task, end in ends.items()) / total for name in theta}  # type: ignore[misc]
    if algorithm == "heads":
        return {task: ({**theta, **kept[task]}, None) for task in tasks}
    return {task: (kept[task], theta) for task in tasks}


@pytest.mark.parametrize("algorithm", STATEFUL)
def test_scores_are_those_of_what_a_task_keeps_worked_out_in_plain_torch(algorithm: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {f"{algorithm}__inner_steps": 2, f"{algorithm}__batch_size": 0, f"{algorithm}__inner_lr": LR}
    more |= {"ditto__strength": STRENGTH} if algorithm == "ditto" else {}
    summary = run(tmp_path, algorithm, evaluate_users="seen", gaussian__clients=2, **more)
    assert (summary["chosen"], summary["test"], summary["validation"]) == ({"adapt_lr": LR, "adapt_steps": 4}, None, None)
    assert (summary["seen"]["tasks"], summary["seen"]["of"]) == (2, 2)
    config = settings(tmp_path, algorithm, gaussian__clients=2, **more)
    data = load_dataset("gaussian", config.table("gaussian"), Path())
    tasks = {info.task_id: data.test_draws(info.task_id)[0] for info in data.tasks()}
    start = build_algorithm(config, data.spec).learner.initial()
    told = rows(tmp_path)
    for task, (weights, towards) in by_hand(algorithm, start, tasks, 3).items():
        own = tasks[task]
        x, y = torch.cat([own.support.x, own.query.x]), torch.cat([own.support.y, own.query.y])
        losses, accuracies = [], []
        for _ in range(5):
            found = outputs(weights, own.test.x)
            losses.append(float(functional.cross_entropy(found, own.test.y)))
            accuracies.append(float((found.argmax(dim=1) == own.test.y).double().mean()))
            weights = step(weights, x, y, towards)
        assert curve(told[task], "loss") == pytest.approx(losses, rel=1e-4)
        assert curve(told[task], "accuracy") == pytest.approx(accuracies)
        assert (int(told[task]["num_support"]), int(told[task]["num_test"])) == (len(y), len(own.test.y))


def test_a_task_whose_turn_never_came_is_scored_as_a_new_one(tmp_path: Path) -> None:
    """One of ten trains, in one round, with a step so small that the body stays: the others have a fresh head."""
    more: dict[str, Any] = {
        "rounds": 1,
        "tasks_per_round": 1,
        "heads__inner_lr": 1e-8,
        "adapt_lrs": "0.3",
        "evaluate_users": "seen",
    }
    run(tmp_path, **more)
    config = settings(tmp_path, **more)
    data = load_dataset("gaussian", config.table("gaussian"), Path())
    start = build_algorithm(config, data.spec).learner.initial()
    for task, row in rows(tmp_path).items():
        test = data.test_draws(task)[0].test
        loss = functional.cross_entropy(outputs(start, test.x), test.y)
        assert float(row["loss_step0"]) == pytest.approx(float(loss), rel=1e-5)
    assert len(rows(tmp_path)) == 10


# ---- the training and the unseen users are left alone


@pytest.mark.parametrize("algorithm", ["fedavg", "maml", "heads", "ditto"])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_nothing_of_training_and_of_unseen_users_changes_in_any_bit(algorithm: str, mode: str, tmp_path: Path) -> None:
    told = [run(tmp_path / users, algorithm, evaluate_users=users, mode=mode) for users in ("unseen", "both")]
    assert told[0]["seen"] is None
    assert told[1]["seen"]["tasks"] == told[1]["tasks"]["train"]
    for part in ("test", "validation", "chosen", "kept", "shots", "best_validation"):
        assert told[0][part] == told[1][part]
    folders = [tmp_path / "unseen", tmp_path / "both"]
    for split in ("validation", "test"):
        assert rows(folders[0], split) == rows(folders[1], split)
    lines = [[{k: v for k, v in line.items() if k not in MEASURED} for line in read_history(folder)] for folder in folders]
    assert lines[0] == lines[1]
    first, second = map(model, folders)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def own_file(path: Path, change: float = 0.0) -> Path:
    """Six users with 20 rows in order of time; `change` is added to what the last fifth of each user's rows holds."""
    rng = np.random.default_rng(3)
    lines = ["user,time,marker,level,score"]
    for user in range(6):
        slope = rng.normal()
        for time in range(20):
            marker, level, noise = rng.normal(size=3)
            late = change if time >= 16 else 0.0
            lines.append(f"u{user},{time},{marker + late:.6f},{level - late:.6f},{slope * marker + 0.1 * noise + late:.6f}")
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("scale", ["shared", "task"])
def test_what_the_test_part_holds_changes_no_parameter(scale: str, tmp_path: Path) -> None:
    models, scores = [], []
    for change in (0.0, 5.0):
        path = own_file(tmp_path / f"{change}.csv", change)
        more: dict[str, Any] = {"own__path": str(path), "own__task_column": "user", "own__target_column": "score"}
        more |= {"own__time_column": "time", "own__scale": scale, "evaluate_users": "seen", "test_shots": ""}
        scores.append(run(tmp_path / str(change), dataset="own", **more)["seen"]["mse"]["mean"])
        models.append(model(tmp_path / str(change)))
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert scores[0] != scores[1]


def test_an_error_in_the_unit_of_the_target_is_by_the_scale_that_a_task_trains_on(tmp_path: Path) -> None:
    """With a scale of each task's own that is the deviation of all its training targets, not of its support alone."""
    path = own_file(tmp_path / "own.csv")
    more: dict[str, Any] = {"own__path": str(path), "own__task_column": "user", "own__target_column": "score"}
    more |= {"own__scale": "task", "own__time_column": "time", "evaluate_users": "seen", "test_shots": ""}
    run(tmp_path / "run", dataset="own", **more)
    config = settings(tmp_path, dataset="own", **more)
    supports = {info.task_id: info.num_support for info in load_dataset("own", config.table("own"), Path()).tasks()}
    with path.open(newline="") as file:
        targets: dict[str, list[float]] = {}
        for line in csv.DictReader(file):
            targets.setdefault(line["user"], []).append(float(line["score"]))
    for task, row in rows(tmp_path / "run").items():
        known = int(row["num_support"])
        middle = fmean(targets[task][: supports[task]])
        assert known + int(row["num_test"]) == 20
        deviation = fmean((value - middle) ** 2 for value in targets[task][:known]) ** 0.5
        ratio = np.array(curve(row, "rmse")) / np.sqrt(curve(row, "mse"))
        assert ratio == pytest.approx([deviation] * 5, rel=1e-4)


# ---- where tasks lie, which of them, and what is told


@pytest.mark.parametrize("algorithm", ["fedavg", *STATEFUL])
def test_how_tasks_lie_on_nodes_changes_nothing(algorithm: str, tmp_path: Path) -> None:
    for nodes in (1, 5):
        run(tmp_path / str(nodes), algorithm, nodes)
    one, five = (rows(tmp_path / nodes) for nodes in ("1", "5"))
    assert one.keys() == five.keys()
    for task, row in one.items():
        assert curve(row, "loss") == pytest.approx(curve(five[task], "loss"), rel=1e-4)


def test_what_nodes_keep_in_a_state_dir_is_what_is_scored(tmp_path: Path) -> None:
    for name in ("memory", "disk"):
        config = settings(tmp_path / name)
        nodes = {i: {"state-dir": str(tmp_path / f"state{i}")} for i in range(2)} if name == "disk" else {}
        run_federation(LoopbackGrid(2, config.flat(), node_configs=nodes), config)
    assert rows(tmp_path / "memory") == rows(tmp_path / "disk")


def test_of_many_training_tasks_some_are_scored_drawn_by_the_seed(tmp_path: Path) -> None:
    drawn: list[set[str]] = []
    for seed in (0, 0, 1):
        folder = tmp_path / str(len(drawn))
        summary = run(folder, seed=seed, gaussian__clients=12, seen_users=3, validation_tasks=1, test_tasks=1)
        assert (summary["seen"]["tasks"], summary["seen"]["of"]) == (3, 10)
        drawn.append(set(rows(folder)))
    assert drawn[0] == drawn[1] != drawn[2]
    assert users_rows(summary)[1][0] == "seen (3 of 10)"


def test_means_are_over_users_and_over_examples(tmp_path: Path) -> None:
    summary = run(tmp_path)
    for split in ("test", "seen"):
        own = list(rows(tmp_path, split).values())
        scores, sizes = [curve(row, "accuracy")[2] for row in own], [int(row["num_test"]) for row in own]
        told = {part: values[2] for part, values in summary[split]["accuracy"].items()}
        assert len(set(sizes)) > 1
        assert told["mean"] == pytest.approx(fmean(scores), abs=1e-6)
        assert told["weighted"] == pytest.approx(sum(s * n for s, n in zip(scores, sizes, strict=True)) / sum(sizes), abs=1e-6)
        assert told["sd"] == pytest.approx(stdev(scores), abs=1e-6)
        assert told["worst10"] == pytest.approx(min(scores), abs=1e-6)
    assert [cells[0] for cells in users_rows(summary)] == ["unseen (2)", "seen (6)"]
    assert any(line.startswith("6 seen users (training tasks, on test examples") for line in result_lines(summary))


def test_a_single_user_has_no_spread_and_an_error_weighs_by_examples() -> None:
    one = spread(np.array([[0.5, 0.75]]), ACCURACY, [4])
    assert np.isnan(one["sd"]).all()
    assert one["weighted"] == [0.5, 0.75]
    assert spread(np.array([[1.0], [4.0]]), MSE, [3, 1])["weighted"] == [1.75]
    assert "weighted" not in spread(np.array([[1.0], [4.0]]), MSE)


def test_with_all_tasks_in_training_a_run_ends_with_report_and_table(tmp_path: Path) -> None:
    summary = run(tmp_path, evaluate_users="seen")
    assert summary["tasks"] == {"train": 10, "validation": 0, "test": 0}
    assert json.loads((tmp_path / "config.json").read_text())["test-tasks"] == 0
    page = write_report(tmp_path, None).read_text()
    assert "Seen clients took part in training" in page
    assert "unseen ones tested the result" not in page


def test_validation_tasks_may_choose_for_seen_users(tmp_path: Path) -> None:
    summary = run(tmp_path, evaluate_users="seen", validation_tasks=3)
    assert summary["tasks"] == {"train": 7, "validation": 3, "test": 0}
    best = summary["validation"]["accuracy"]["mean"]
    assert best[summary["chosen"]["adapt_steps"]] == max(best[1:])
    assert summary["seen"]["tasks"] == 7


# ---- beside baselines


@pytest.mark.parametrize("algorithm", ["fedavg", *STATEFUL])
@pytest.mark.parametrize("users", ["seen", "both"])
def test_the_model_beside_baselines_is_the_one_that_was_scored(algorithm: str, users: str, tmp_path: Path) -> None:
    """Other code predicts for it, from what a task keeps; a constant and the nearest row are worked out here."""
    summary = run(tmp_path, algorithm, evaluate_users=users, baselines=True)
    seen, step = summary["seen"], summary["chosen"]["adapt_steps"]
    told = seen["baselines"]
    assert told["tasks"] == seen["tasks"]
    for contender, at in (("before", 0), ("after", step)):
        assert told["scores"]["accuracy"][contender]["mean"] == pytest.approx(seen["accuracy"]["mean"][at], abs=1e-6)
    config = settings(tmp_path, algorithm, evaluate_users=users)
    data = load_dataset("gaussian", config.table("gaussian"), Path())
    found = rows(tmp_path)
    for task, row in found.items():
        (draw,) = data.test_draws(task)
        x, y = (torch.cat([getattr(draw.support, part), getattr(draw.query, part)]) for part in ("x", "y"))
        test = draw.test
        majority = float((test.y == torch.bincount(y).argmax()).double().mean())
        nearest = float((test.y == y[torch.cdist(test.x.double(), x.double()).argmin(dim=1)]).double().mean())
        assert float(row["accuracy_constant"]) == pytest.approx(majority)
        assert float(row["accuracy_nearest"]) == pytest.approx(nearest)
        assert float(row["accuracy_after"]) == pytest.approx(curve(row, "accuracy")[step])
    assert set(told["scores"]["accuracy"]) >= {"own", "global", "global_offset", "prototypes"}
    assert (summary["baselines"] is None) == (users == "seen")
    assert any(line.startswith("on seen users the best baseline is") for line in result_lines(summary))
    assert [str(table.title) for table in baseline_tables(summary)][-1] == f"the same {seen['tasks']} seen users by baselines"
    page = write_report(tmp_path, None).read_text()
    assert f"The model and the baselines on the same {seen['tasks']} seen clients" in page


def test_a_node_scores_seen_users_beside_baselines_by_no_other_model_and_no_further(tmp_path: Path) -> None:
    config = settings(tmp_path, "fedavg", baselines=True, evaluate_users="seen", adapt_steps=0)
    grid = LoopbackGrid(1, config.flat())
    assert run_federation(grid, config)["failures"] == 0
    sent = [message for message in grid.requests if message.metadata.message_type == SCORES][-1]
    data = load_dataset("gaussian", config.table("gaussian"), Path()).spec
    request = ScoresRequest.from_records(sent.content, data.input_shape[0], data.outputs, classes=True)
    assert request.seen
    refused = "this node has scored tasks that it trains on by another model"
    other = {name: value + 1 for name, value in request.meta.items()}
    for changed, said in (
        (replace(request, steps=1), ""),
        (replace(request, steps=160), refused),
        (replace(request, meta=other), refused),
        (replace(request, seen=False), "this node trains on the task"),
    ):
        records = changed.to_records()
        records.update({name: sent.content[name] for name in ("agreed", "settings") if name in sent.content})
        (reply,) = grid.send_and_receive([Message(records, sent.metadata.dst_node_id, SCORES)])
        reason = str(reply.content.config_records["error"]["reason"]) if "error" in reply.content.config_records else ""
        assert said in reason
        assert bool(said) == bool(reason)


def test_the_report_has_their_curve_of_adaptation(tmp_path: Path) -> None:
    run(tmp_path, evaluate_users="seen")
    page = write_report(tmp_path, None).read_text()
    assert "seen clients, steps of adaptation:" in page
    assert "seen, worst 10 %" in page


# ---- what does not work says so


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dataset": "omniglot"}, "for the data set `omniglot`, whose training tasks have no test examples of their own"),
        (
            {"sinusoid.fresh-tasks": True},
            "whose training tasks have no test examples of their own",
        ),
        ({"privacy.noise-multiplier": 1.0, "privacy.clip": 1.0}, "because exact scores of training tasks are not private"),
        ({"secure-aggregation": True}, "because scores of a training task tell of it alone what sums hide"),
    ],
)
def test_training_tasks_that_must_not_or_cannot_be_scored_are_refused_or_left_out(changes: dict[str, Any], reason: str) -> None:
    changed = {**SMALL, **changes} | ({"dataset": "sinusoid"} if "sinusoid.fresh-tasks" in changes else {})
    for users in ("seen", "both"):
        with pytest.raises(ConfigError) as refused:
            parse_run_config({**changed, "evaluate-users": users})
        assert str(refused.value).startswith('`evaluate-users` must be "unseen" or "auto" ')
        assert str(refused.value).endswith(f"{reason}, got '{users}'")
    assert not parse_run_config(changed).scores_seen
    assert parse_run_config(SMALL).scores_seen


def test_test_tasks_beside_seen_users_alone_are_refused() -> None:
    with pytest.raises(ConfigError, match=r'`test-tasks` must be 0 with `evaluate-users = "seen"`, .* got 0\.3'):
        parse_run_config({**SMALL, "evaluate-users": "seen", "test-tasks": 0.3})


def test_a_node_that_fails_then_costs_its_seen_users_alone(tmp_path: Path) -> None:
    def fails(message: Message, answer: Any) -> Message:
        if message.metadata.message_type == EVALUATE and EvaluateRequest.from_records(message.content).seen:
            return Message(error_records("out of memory"), reply_to=message)
        reply: Message = answer(message)
        return reply

    config = settings(tmp_path / "one")
    summary = run_federation(LoopbackGrid(2, config.flat(), {0: fails}), config)
    assert summary["failures"] == 1
    assert 0 < summary["seen"]["tasks"] < summary["seen"]["of"] == 6
    config = settings(tmp_path / "all")
    assert run_federation(LoopbackGrid(2, config.flat(), {0: fails, 1: fails}), config)["seen"] is None
    config = settings(tmp_path / "seen", evaluate_users="seen")
    with pytest.raises(RunError, match="no node sent a usable score of its training tasks"):
        run_federation(LoopbackGrid(2, config.flat(), {0: fails, 1: fails}), config)
