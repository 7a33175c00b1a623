"""`adapt-steps = 0`: after training, more steps are tried as long as the validation tasks gain."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from loopback import LoopbackGrid

from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.wire.messages import EVALUATE, EvaluateRequest, error_records
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.runs import checkpoints
from quickbloom.server_app.runs.directory import read_history

SLOW: dict[str, Any] = {"dataset": "sinusoid", "sinusoid.clients": 20, "algorithm": "maml", "maml.inner-lr": 0.01}
SLOW |= {"min-nodes": 1, "rounds": 2, "seed": 1, "baselines": False, "adapt-lrs": "0.01"}
"""Waves learn slowly from a model that is hardly trained, so that many steps help."""


def config(folder: Path, **changes: Any) -> RunConfig:
    named = {key.replace("_", "-").replace("--", "."): value for key, value in changes.items()}
    return parse_run_config({**SLOW, "output-dir": str(folder), **named}).resolved()


def run(folder: Path, nodes: int = 2, faults: Any = None, **changes: Any) -> tuple[dict[str, Any], LoopbackGrid]:
    settings = config(folder, **changes)
    grid = LoopbackGrid(nodes, settings.flat(), faults)
    return run_federation(grid, settings), grid


def steps_asked(grid: LoopbackGrid) -> list[int]:
    requests = [one for one in grid.requests if one.metadata.message_type == EVALUATE]
    return [EvaluateRequest.from_records(one.content).steps for one in requests]


def chosen_by_hand(curve: list[float]) -> tuple[int, int]:
    """(number of steps tried, chosen step) by the errors after 0..160 steps with the only rate: 10, and twice as many while
    the last is the best and better than half as many."""
    tried = 10
    while tried < 160 and min(curve[1 : tried + 1]) == curve[tried] < curve[tried // 2]:
        tried *= 2
    return tried, min(range(1, tried + 1), key=lambda step: curve[step])


@pytest.mark.parametrize("lr", [0.0003, 0.003, 0.01])
def test_steps_double_until_the_validation_tasks_gain_no_more(tmp_path: Path, lr: float) -> None:
    rates: dict[str, Any] = {"adapt_lrs": str(lr), "maml__inner_lr": lr}
    summary, grid = run(tmp_path / "grown", **rates)
    all_of_them, _ = run(tmp_path / "all", adapt_steps=160, **rates)
    tried, chosen = chosen_by_hand(all_of_them["validation"]["mse"]["mean"])
    assert tried > 10  # else nothing grew
    assert summary["chosen"] == {"adapt_lr": lr, "adapt_steps": chosen}
    assert bool(summary["edge"]) == (chosen == tried)
    for split in ("validation", "test"):
        assert summary[split]["steps"] == list(range(tried + 1))
        assert summary[split]["mse"]["mean"] == pytest.approx(all_of_them[split]["mse"]["mean"][: tried + 1], rel=1e-4)
    assert max(steps_asked(grid)) == tried
    assert checkpoints.load(tmp_path / "grown").facts["adapt"] == {"lr": lr, "steps": chosen}
    assert len(read_history(tmp_path / "grown")[-1]["validation"]["mse"]) == tried + 1
    assert summary["best_validation"]["adapt_steps"] == chosen


def test_some_of_these_cases_stop_within_the_bound_and_one_at_it(tmp_path: Path) -> None:
    ends = [run(tmp_path / str(lr), adapt_lrs=str(lr), maml__inner_lr=lr)[0] for lr in (0.0003, 0.003)]
    assert len(ends[0]["test"]["steps"]) == 161
    assert ends[0]["edge"].endswith("160 steps are the most that were tried (`adapt-steps`)")
    assert len(ends[1]["test"]["steps"]) == 41
    assert ends[1]["edge"] == ""


def test_the_result_is_the_same_on_one_node_and_on_two(tmp_path: Path) -> None:
    one, two = run(tmp_path / "one", 1)[0], run(tmp_path / "two", 2)[0]
    assert two["chosen"] == one["chosen"]
    assert two["test"]["mse"]["mean"] == pytest.approx(one["test"]["mse"]["mean"], rel=1e-4)
    assert one["chosen"]["adapt_steps"] > 10


def test_only_the_last_round_and_the_end_ask_for_more(tmp_path: Path) -> None:
    _, grid = run(tmp_path, 1, evaluate_every=1)
    asked = steps_asked(grid)
    assert asked[:3] == [10, 10, 20]
    assert asked[-2:] == [asked[-1]] * 2  # the test tasks are asked for as many as the validation tasks were last


def test_a_number_that_was_set_stays(tmp_path: Path) -> None:
    summary, grid = run(tmp_path, adapt_steps=10)
    assert set(steps_asked(grid)) == {10}
    assert (summary["chosen"]["adapt_steps"], len(summary["test"]["steps"])) == (10, 11)
    assert "10 steps are the most that were tried" in summary["edge"]


def test_without_validation_tasks_there_are_ten(tmp_path: Path) -> None:
    summary, grid = run(tmp_path, validation_tasks=0)
    assert set(steps_asked(grid)) == {10}
    assert summary["chosen"]["adapt_steps"] == 10


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if not ALGORITHMS[name].uses_adapt_lr])
def test_where_steps_change_nothing_none_are_added(tmp_path: Path, name: str) -> None:
    kind = ALGORITHMS[name].kinds[0]
    data: dict[str, Any] = {"dataset": "sinusoid" if kind == "regression" else "gaussian"}
    summary, grid = run(tmp_path, algorithm=name, **data)
    assert set(steps_asked(grid)) == {10}
    assert (summary["chosen"]["adapt_steps"], summary["edge"]) == (1, "")


def test_a_finished_training_goes_on_with_what_it_had_grown_to(tmp_path: Path) -> None:
    before, _ = run(tmp_path, 1)
    (tmp_path / "summary.json").unlink()  # as if it had been cut off at the end
    after, grid = run(tmp_path, 1, resume_from=str(tmp_path))
    assert (after["chosen"], after["test"], after["validation"]) == (before["chosen"], before["test"], before["validation"])
    assert steps_asked(grid) == [len(before["test"]["steps"]) - 1] * 2  # of the test tasks, and of seen users


def test_a_run_that_was_cut_off_before_grows_like_one_that_was_not(tmp_path: Path) -> None:
    before, _ = run(tmp_path / "whole", 1)
    source = tmp_path / "whole" / "checkpoints" / "round-000001.safetensors"
    after, _ = run(tmp_path / "rest", 1, resume_from=str(source))
    assert (after["chosen"], after["test"]) == (before["chosen"], before["test"])


@pytest.mark.parametrize("again", [0, 5])
def test_a_finished_training_can_be_scored_with_another_setting(tmp_path: Path, again: int) -> None:
    run(tmp_path, 1, adapt_steps=3)
    (tmp_path / "summary.json").unlink()
    after, _ = run(tmp_path, 1, resume_from=str(tmp_path), adapt_steps=again)
    assert after["chosen"]["adapt_steps"] > 10 if again == 0 else after["chosen"]["adapt_steps"] == 5
    facts = checkpoints.load(tmp_path).facts
    assert facts["adapt"]["steps"] == after["chosen"]["adapt_steps"]  # a device adapts as the summary says


def test_a_node_that_cannot_do_more_ends_it_where_all_tasks_were_scored(tmp_path: Path) -> None:
    def refuses(message: Message, answer: Callable[[Message], Message]) -> Message:
        of_scores = message.metadata.message_type == EVALUATE
        if of_scores and EvaluateRequest.from_records(message.content).steps > 20:
            return Message(error_records("too many steps"), reply_to=message)
        return answer(message)

    rates: dict[str, Any] = {"adapt_lrs": "0.003", "maml__inner_lr": 0.003}
    whole, _ = run(tmp_path / "whole", **rates)
    summary, _ = run(tmp_path / "less", faults={1: refuses}, **rates)
    assert whole["chosen"]["adapt_steps"] > 20
    assert (summary["chosen"]["adapt_steps"], len(summary["test"]["steps"])) == (20, 21)
    assert summary["validation"]["mse"]["mean"] == pytest.approx(whole["validation"]["mse"]["mean"][:21], rel=1e-4)
