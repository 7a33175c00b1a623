"""`keep`: a run ends with the best model by the validation tasks, also if that is the one before the first round."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from loopback import LoopbackGrid

from quickbloom.common.config.keep import wants_best
from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.datasets import load_dataset
from quickbloom.common.datasets.own.columns import Schema
from quickbloom.common.datasets.own.encoded import FEATURES
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.engine.round import evaluate
from quickbloom.common.errors import DataError
from quickbloom.common.metric import ACCURACY
from quickbloom.common.models import MODELS
from quickbloom.common.wire.messages import EVALUATE, TRAIN, EvaluateRequest
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.events.file import read_events
from quickbloom.server_app.events.kinds import Scored, Warned
from quickbloom.server_app.federation.best import BestSoFar, is_better
from quickbloom.server_app.federation.outer import OuterOptimizer
from quickbloom.server_app.federation.scores import Scores
from quickbloom.server_app.reporting.result_table import kept_line, result_lines, result_table
from quickbloom.server_app.runs import resume
from quickbloom.server_app.runs.checkpoints import CheckpointWriter, load
from quickbloom.server_app.runs.directory import MEASURED, read_history

DIGITS: dict[str, Any] = {"dataset": "digits", "algorithm": "fomaml", "min-nodes": 1, "rounds": 4, "evaluate-every": 1}
DIGITS |= {"adapt-steps": 3, "seed": 1, "keep": "best", "fomaml.outer-optimizer": "sgd"}
HARMFUL: dict[str, Any] = {"fomaml__outer_lr": 1000.0}
"""A rate that throws the model away."""
UNEVEN: dict[str, Any] = {"fomaml__outer_lr": 1.0}
"""A rate with which round 3 of 4 is the best."""


class Killed(BaseException):
    """The end of the server in the middle of a run."""


def settings(folder: Path, **changes: Any) -> RunConfig:
    named = {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}
    return parse_run_config({**DIGITS, "output-dir": str(folder), **named}).resolved()


def run(folder: Path, nodes: int = 2, faults: Any = None, **changes: Any) -> dict[str, Any]:
    config = settings(folder, **changes)
    return run_federation(LoopbackGrid(nodes, config.flat(), faults), config)


def digits(config: RunConfig) -> Any:
    return load_dataset("digits", config.table("digits"), Path())


def files(folder: Path) -> list[str]:
    return sorted(path.stem for path in (folder / "checkpoints").iterdir())


def validation_curve(folder: Path) -> list[float]:
    """The validation accuracy after every round at the rate and steps that were best then, the initial model first."""
    return [event.after for event in read_events(folder) if isinstance(event, Scored)]


def by_hand(config: RunConfig, meta: dict[str, torch.Tensor], summary: dict[str, Any], split: str) -> np.ndarray[Any, Any]:
    """Mean accuracy after every step of the tasks of a split, from the engine alone."""
    dataset = digits(config)
    algorithm = build_algorithm(config, dataset.spec)
    ids = load(Path(summary["run_dir"])).facts["splits"][split]
    tasks = [dataset.test_draws(task_id) for task_id in ids]
    lr, steps = summary["chosen"]["adapt_lr"], len(summary[split]["steps"]) - 1
    scores: np.ndarray[Any, Any] = evaluate(algorithm, meta, tasks, [lr], steps, 64)[1]
    means: np.ndarray[Any, Any] = scores[:, 0].mean(axis=0)
    return means


# ---- which model


def test_training_that_makes_it_worse_ends_with_the_initial_model(tmp_path: Path) -> None:
    summary = run(tmp_path, **HARMFUL)
    config = settings(tmp_path, **HARMFUL)
    initial = build_algorithm(config, digits(config).spec).init()
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


def test_the_best_model_may_be_in_the_middle(tmp_path: Path) -> None:
    summary = run(tmp_path / "best", **UNEVEN)
    run(tmp_path / "last", keep="last", **UNEVEN)
    curve = validation_curve(tmp_path / "best")
    assert int(np.argmax(curve)) == 3
    assert summary["kept"] == pytest.approx({"round": 3, "accuracy": max(curve), "last": curve[-1]})
    of_round_3, of_round_4 = (load(tmp_path / "last" / "checkpoints" / f"round-00000{n}.safetensors").meta for n in (3, 4))
    found = by_hand(settings(tmp_path, **UNEVEN), of_round_3, summary, "test")
    assert summary["test"]["accuracy"]["mean"] == pytest.approx(found.tolist(), abs=1e-6)
    # The last checkpoint is what a device adapts, and what a run would go on from.
    newest = load(tmp_path / "best")
    assert newest.facts["round"] == 4
    assert newest.facts["adapt"] == {"lr": summary["chosen"]["adapt_lr"], "steps": summary["chosen"]["adapt_steps"]}
    assert all(torch.equal(newest.meta[name], value) for name, value in of_round_3.items())
    config = settings(tmp_path, **UNEVEN)
    algorithm = build_algorithm(config, digits(config).spec)
    outer = OuterOptimizer(algorithm.options, algorithm.init(), 4)
    resume.restore_model(newest, outer)
    assert all(torch.equal(outer.leaves[name], value) for name, value in of_round_4.items())
    # Nothing else is different.
    assert read_history(tmp_path / "best")[3]["validation"] == read_history(tmp_path / "last")[3]["validation"]


def test_the_result_says_which_model_it_is_of(tmp_path: Path) -> None:
    worse = run(tmp_path / "worse", **HARMFUL)
    scores = "validation accuracy 55.0 %, 20.0 % after the last round"
    assert kept_line(worse) == f"the initial model is kept, training did not help: {scores}"
    assert kept_line(worse) in result_lines(worse)
    assert kept_line(worse) in str(result_table(worse).caption)
    assert kept_line(run(tmp_path / "middle", **UNEVEN)).startswith("the model of round 3 is kept: validation accuracy ")
    assert kept_line(run(tmp_path / "last", keep="last", **UNEVEN)) == ""


def test_a_model_in_training_is_tried_with_as_many_steps_as_that_of_the_last_round(tmp_path: Path) -> None:
    """Where `adapt-steps` grows, it grows for both before they are compared."""
    waves: dict[str, Any] = {
        "dataset": "sinusoid",
        "sinusoid__clients": 20,
        "adapt_steps": 0,
        "adapt_lrs": "0.003",
        "fomaml__inner_lr": 0.003,
    }
    worse = {**waves, "fomaml__outer_lr": 3.0, "rounds": 2}
    summary = run(tmp_path / "run", **worse)
    assert summary["kept"]["round"] == 0
    assert len(summary["test"]["steps"]) > 11
    config = settings(tmp_path, **worse)
    asked: list[tuple[int, int]] = []
    grid = LoopbackGrid(1, config.flat())
    run_federation(grid, settings(tmp_path / "again", **worse))
    for message in grid.requests:
        if message.metadata.message_type == EVALUATE:
            request = EvaluateRequest.from_records(message.content)
            asked.append((request.round, request.steps))
    most = len(summary["test"]["steps"]) - 1
    assert (0, 10) in asked
    assert (0, 20) in asked
    assert asked[-1] == (0, most)


# ---- a run that was cut off


def cut(folder: Path, kind: str, number: int, **changes: Any) -> None:
    """A run whose server dies when node 101 gets a message of this kind and round; "test": when test tasks are scored."""
    config = settings(folder, **changes)

    def fault(message: Message, answer: Callable[[Message], Message]) -> Message:
        metadata = message.metadata
        if kind == "test":
            if (folder / "checkpoints" / "round-000004.safetensors").exists() and metadata.message_type == "query.sums":
                raise Killed
        elif (metadata.message_type, metadata.group_id) == (kind, str(number)):
            raise Killed
        return answer(message)

    with pytest.raises(Killed):
        run_federation(LoopbackGrid(2, config.flat(), {1: fault}), config)


def result(folder: Path, summary: dict[str, Any]) -> Any:
    rounds = [{key: value for key, value in record.items() if key not in MEASURED} for record in read_history(folder)]
    kept = {key: value for key, value in summary.items() if key not in ("seconds", "run_dir", "resumed")}
    return kept, rounds, (folder / "per_task.csv").read_bytes(), files(folder), load(folder).facts["so-far"]["best-model"]


@pytest.mark.parametrize(("rate", "every"), [(HARMFUL, 1), (UNEVEN, 1), (UNEVEN, 3)], ids=["initial", "middle", "seldom"])
@pytest.mark.parametrize(("kind", "number"), [(EVALUATE, 0), (TRAIN, 1), (EVALUATE, 3), (TRAIN, 4), (EVALUATE, 4), ("test", 4)])
def test_a_run_that_was_cut_off_ends_like_one_that_was_not(
    tmp_path: Path, kind: str, number: int, every: int, rate: dict[str, Any]
) -> None:
    whole = run(tmp_path / "whole", checkpoint_every=every, **rate)
    cut(tmp_path / "cut", kind, number, checkpoint_every=every, **rate)
    rest = run(tmp_path / "cut", checkpoint_every=every, resume_from=str(tmp_path / "cut"), **rate)
    assert result(tmp_path / "cut", rest) == result(tmp_path / "whole", whole)
    first, second = (load(tmp_path / name) for name in ("whole", "cut"))
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(value, second.tensors[name]) for name, value in first.tensors.items())
    assert [event.round for event in read_events(tmp_path / "cut") if isinstance(event, Scored)] == [0, 1, 2, 3, 4]


def test_a_finished_training_is_scored_with_the_steps_that_it_is_gone_on_with(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", adapt_steps=3, **HARMFUL)
    run(tmp_path / "cut", adapt_steps=2, **HARMFUL)
    (tmp_path / "cut" / "summary.json").unlink()
    rest = run(tmp_path / "cut", adapt_steps=3, resume_from=str(tmp_path / "cut"), **HARMFUL)
    for name in ("chosen", "test", "validation", "kept"):
        assert rest[name] == whole[name]
    newest = load(tmp_path / "cut")
    assert newest.facts["kept"]["round"] == 0
    assert any(name.startswith("last/") for name in newest.tensors)


def test_a_checkpoint_file_brings_the_best_model_into_the_new_directory(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", **HARMFUL)
    source = tmp_path / "whole" / "checkpoints" / "round-000002.safetensors"
    rest = run(tmp_path / "rest", resume_from=str(source), **HARMFUL)
    assert (rest["kept"], rest["test"]) == (whole["kept"], whole["test"])
    assert files(tmp_path / "rest") == ["best-000000", "round-000003", "round-000004"]


def test_without_its_best_model_a_run_keeps_the_best_of_what_follows(tmp_path: Path) -> None:
    run(tmp_path / "whole", **HARMFUL)
    best = tmp_path / "whole" / "checkpoints" / "best-000000.safetensors"
    content = best.read_bytes()
    best.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    source = tmp_path / "whole" / "checkpoints" / "round-000002.safetensors"
    rest = run(tmp_path / "rest", resume_from=str(source), **HARMFUL)
    assert rest["kept"]["round"] in (3, 4)
    (said,) = [event.sentence for event in read_events(tmp_path / "rest") if isinstance(event, Warned)]
    assert said.startswith("The best model so far is lost, and the best of the following rounds is kept: ")
    assert "damaged" in said


def test_the_file_of_the_best_model_is_a_starting_point_for_devices_and_not_for_runs(tmp_path: Path) -> None:
    run(tmp_path / "whole", **HARMFUL)
    best = tmp_path / "whole" / "checkpoints" / "best-000000.safetensors"
    assert load(best).facts["adapt"] == load(tmp_path / "whole").facts["adapt"]
    with pytest.raises(DataError, match="is a model without its optimizer"):
        run(tmp_path / "rest", resume_from=str(best), **HARMFUL)


def test_the_files_stay_as_long_as_checkpoints_need_them(tmp_path: Path) -> None:
    writer, tensors = CheckpointWriter(tmp_path / "checkpoints", {}), {"meta/w": torch.zeros(1)}
    for number, best in enumerate((0, 1, 1, 1, 4, 5, 5, 5, 5)):
        if best == number:
            writer.write_best(number, tensors, {})
        writer.write(number, tensors, {}, last=True, best=best)
        kept = range(max(0, number - 2), number + 1)
        needed = {(0, 1, 1, 1, 4, 5, 5, 5, 5)[one] for one in kept}
        assert {name for name in files(tmp_path) if name.startswith("best")} == {f"best-00000{one}" for one in needed}


# ---- where it cannot be, or may be refused


@pytest.mark.parametrize("steps", [3, 0])
def test_nodes_that_send_sums_alone_score_the_initial_model_too(tmp_path: Path, steps: int) -> None:
    config = settings(tmp_path, secure_aggregation=True, adapt_steps=steps, evaluate_every=2, **HARMFUL)
    summary = run_federation(LoopbackGrid(3, config.flat()), config)
    assert (summary["failures"], summary["kept"]["round"]) == (0, 0)
    plain = run(tmp_path / "plain", adapt_steps=steps, evaluate_every=2, **HARMFUL)
    assert summary["test"]["accuracy"]["mean"] == pytest.approx(plain["test"]["accuracy"]["mean"], abs=1e-6)
    assert summary["baselines"]["scores"]["accuracy"]["after"] == plain["baselines"]["scores"]["accuracy"]["after"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"evaluate_every": 0}, "`evaluate-every` is 0"),
        ({"validation_tasks": 0}, "there are no validation tasks"),
        ({"algorithm": "heads"}, "tasks keep a part of it on their nodes"),
        ({"algorithm": "local"}, "tasks keep a part of it on their nodes"),
    ],
)
def test_where_it_cannot_be_the_last_model_is_kept_and_a_user_who_asked_is_told(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    summary = run(tmp_path, **changes)
    assert summary["kept"]["round"] == 4
    (said,) = [event.sentence for event in read_events(tmp_path) if isinstance(event, Warned)]
    assert said.startswith('`keep` is "best", and the model of the last round is kept all the same, because ')
    assert reason in said
    assert files(tmp_path) == ["round-000002", "round-000003", "round-000004"]


def test_by_itself_only_what_starts_from_pretrained_parts_keeps_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = settings(tmp_path, keep="auto")
    spec = digits(plain).spec
    assert not wants_best(plain, spec)
    assert wants_best(settings(tmp_path, keep="auto", weights="/a/file.safetensors"), spec)
    encoded = replace(
        spec, schema=Schema("y", ["a", "b"], {"said": FEATURES}, encoder={"digest": "0" * 64, "size": 3}).to_json()
    )
    assert wants_best(plain, encoded)
    assert not wants_best(settings(tmp_path, keep="last"), encoded)
    assert wants_best(settings(tmp_path, keep="best"), spec)
    monkeypatch.setattr(MODELS[plain.model], "pretrained", True)
    assert wants_best(plain, spec)


# ---- which of two


def scores(**tasks: float) -> Scores:
    """Scores of tasks that have this accuracy after one step, and 0.1 more with the second of two rates."""
    values = np.array([[[0.0, value], [0.0, value + 0.1]] for value in tasks.values()])
    return Scores(list(tasks), [0.1, 1.0], 1 - values, values)


def test_only_tasks_that_both_have_are_compared() -> None:
    whole, few = scores(a=0.2, b=0.8), scores(b=0.7)
    assert not is_better(few, whole, ACCURACY)  # though its mean is higher: the difficult task was away
    assert is_better(scores(b=0.81), whole, ACCURACY)
    assert is_better(scores(c=0.1, d=0.1, e=0.1), whole, ACCURACY)  # nothing in common
    assert not is_better(scores(c=0.9), whole, ACCURACY)


def test_of_equal_scores_the_lower_loss_is_better() -> None:
    first, second = scores(a=0.5, b=0.5), scores(a=0.5, b=0.5)
    second.losses[:] -= 0.01
    assert is_better(second, first, ACCURACY)
    assert not is_better(first, second, ACCURACY)


def test_the_first_of_equal_ones_is_the_best() -> None:
    best = BestSoFar(ACCURACY)
    assert not best.take(0, None)
    assert not best.take(0, scores(a=float("nan")))
    assert best.take(1, scores(a=0.5, b=0.5))
    assert not best.take(2, scores(a=0.6, b=0.4))
    assert best.round == 1
    assert best.take(3, scores(a=0.6, b=0.41))
    assert best.round == 3
