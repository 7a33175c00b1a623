"""The trained model beside the baselines: by hand, in whole runs, and against what a device predicts."""

import csv
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from hostile import ANYTHING
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loopback import LoopbackGrid
from sklearn import metrics

from quickbloom import predict
from quickbloom.common import scores
from quickbloom.common.baselines.global_ridge import Sums
from quickbloom.common.baselines.scoring import CONTENDERS
from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.intervals import t_quantile
from quickbloom.common.metric import ACCURACY, named
from quickbloom.common.wire.baselines import SCORES, SUMS, ScoresReply, ScoresRequest, SumsReply
from quickbloom.common.wire.checks import WireError
from quickbloom.common.wire.messages import EVALUATE
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.federation.baselines import TaskScores, check_range
from quickbloom.server_app.federation.roll_call import call_roll
from quickbloom.server_app.messaging.in_process_grid import InlineGrid
from quickbloom.server_app.reporting.against_baselines import against_baselines, rows_of, verdict
from quickbloom.server_app.runs import checkpoints

Array = np.ndarray[Any, Any]


def found(kind: str, metric: str, **values: list[float]) -> TaskScores:
    """Scores of tasks by contender, all of them by one metric, and nothing else known."""
    number = len(next(iter(values.values())))
    table = np.full((number, len(CONTENDERS), len(scores.names(kind))), np.nan)
    for contender, of_tasks in values.items():
        table[:, CONTENDERS.index(contender), scores.names(kind).index(metric)] = of_tasks
    return TaskScores([f"t{i}" for i in range(number)], table)


def compared(kind: str, metric: str, **values: list[float]) -> dict[str, Any]:
    content = against_baselines(found(kind, metric, **values), scores.names(kind), named(metric))
    assert content is not None
    return content


# ---- by hand


def test_the_best_baseline_the_gain_and_its_interval_by_hand() -> None:
    content = compared(
        "classification",
        "accuracy",
        before=[0.1, 0.1, 0.1],
        after=[0.9, 0.8, 0.7],
        constant=[0.5, 0.6, 0.7],
        own=[0.8, 0.6, 0.7],
    )
    assert (content["best"], content["tasks"], content["metric"]) == ("own", 3, "accuracy")
    pairs = np.array([0.1, 0.2, 0.0])
    assert content["gain"] == pytest.approx(pairs.mean())
    assert content["ci95"] == pytest.approx(t_quantile(2) * pairs.std(ddof=1) / 3**0.5)
    assert t_quantile(2) == pytest.approx(4.3027, abs=1e-4)
    after = content["scores"]["accuracy"]["after"]
    assert (after["mean"], after["worst10"], after["tasks"]) == (pytest.approx(0.8), pytest.approx(0.7), 3)
    assert content["scores"]["accuracy"].keys() == {"before", "after", "constant", "own"}


def test_an_error_is_better_when_it_is_smaller_and_its_worst_tenth_is_the_largest() -> None:
    content = compared("regression", "rmse", after=[1.0, 2.0], constant=[1.5, 3.0], own=[4.0, 4.0])
    assert (content["best"], content["gain"]) == ("constant", pytest.approx(0.75))
    assert content["scores"]["rmse"]["after"]["worst10"] == 2.0


def test_a_baseline_that_few_tasks_have_is_not_compared_with_and_gaps_leave_pairs_out() -> None:
    gone = float("nan")
    content = compared("classification", "auroc", after=[0.9, 0.8, gone, 0.7], own=[gone, gone, gone, 1.0], constant=[0.5] * 4)
    assert content["best"] == "constant"
    assert content["gain"] == pytest.approx((0.4 + 0.3 + 0.2) / 3)
    assert content["scores"]["auroc"]["own"]["tasks"] == 1


def test_without_a_task_or_a_baseline_there_is_nothing_to_say() -> None:
    assert against_baselines(TaskScores([], np.empty((0, 0, 8))), scores.OF_CLASSES, named("accuracy")) is None
    lonely = compared("classification", "accuracy", after=[0.5, 0.5])
    assert lonely["best"] is None
    assert verdict(lonely) == verdict(None) == verdict({}) == ""


@pytest.mark.parametrize(
    ("after", "sentence"),
    [
        ([0.8, 0.82, 0.81], "the trained model is better by 31.0 % ± 2.5 % over 3 tasks"),
        ([0.3, 0.32, 0.31], "it beats the trained model by 19.0 % ± 2.5 % over 3 tasks, so use it in place of this model"),
        ([0.9, 0.4, 0.5], "the trained model does not beat it for certain (better by 10.0 % ± 65.7 % over 3 tasks)"),
        ([0.1, 0.6, 0.5], "the trained model does not beat it for certain (worse by 10.0 % ± 65.7 % over 3 tasks)"),
        ([0.8], "the trained model is better by 30.0 % on one task, which says little of others"),
        ([0.4], "the trained model is worse by 10.0 % on one task, which says little of others"),
        ([0.5], "the trained model is no better on one task, which says little of others"),
    ],
)
def test_the_sentence_says_whether_the_best_baseline_is_beaten(after: list[float], sentence: str) -> None:
    constant = [0.5] * len(after)
    content = compared("classification", "accuracy", after=after, constant=constant)
    begin = "the best baseline is the user's most frequent class, 50.0 %: "
    assert verdict(content) == begin + sentence


def test_a_row_of_per_task_names_score_and_contender() -> None:
    table = found("regression", "rmse", after=[1.0, float("nan")], own=[2.0, 3.0])
    assert rows_of(table, "regression")["t0"] == {"rmse_after": 1.0, "rmse_own": 2.0}
    assert rows_of(table, "regression")["t1"] == {"rmse_own": 3.0}
    assert rows_of(TaskScores([], np.empty((0, 0, 6))), "regression") == {}


# ---- whole runs


def table(folder: Path, kind: str, number: int = 14) -> Path:
    """Users with two classes, three, or a number; the last of them with a level of their own and nothing else to see."""
    rng = np.random.default_rng(5)
    lines = ["user,a,b,y"]
    for user in range(number):
        level = 4 * rng.normal()
        for _ in range(40):
            a, b = rng.normal(size=2)
            label = {
                "two": "yes" if a + 0.4 * user * b / number + 0.5 * rng.normal() > 0 else "no",
                "three": "low" if a < -0.4 else "mid" if a + 0.5 * rng.normal() < 0.6 else "high",
                "numbers": f"{100 + 7 * a + 3 * rng.normal() + 5 * level:.4f}",
                "means": f"{level + rng.normal():.4f}",
            }[kind]
            lines.append(f"u{user:02d},{a:.5f},{b:.5f},{label}")
    path = folder / f"{kind}.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def keys(settings_by_name: dict[str, Any]) -> dict[str, Any]:
    """Settings whose names are no names of Python."""
    return settings_by_name


def federation(folder: Path, kind: str, nodes: int = 1, **more: Any) -> tuple[LoopbackGrid, RunConfig]:
    flat: dict[str, Any] = {"dataset": "own", "own.path": str(table(folder, kind)), "own.task-column": "user", "rounds": 5}
    flat |= {"algorithm": "ridge", "min-nodes": nodes, "evaluate-every": 0, "validation-tasks": 3, "test-tasks": 5}
    config = parse_run_config({**flat, "output-dir": str(folder / "run"), **more})
    settings_of_nodes = {node: {"state-dir": str(folder / f"state-{node}")} for node in range(nodes)}
    return LoopbackGrid(nodes, config.flat(), None, settings_of_nodes), config


def per_task(run: Path) -> dict[str, dict[str, str]]:
    """The rows of held-out tasks, by name."""
    with (run / "per_task.csv").open(newline="") as file:
        return {row["task"]: row for row in csv.DictReader(file) if row["split"] != "seen"}


def by_scikit_learn(rows: list[dict[str, Any]], classes: list[str]) -> dict[str, float]:
    """The scores of predictions as a device writes them."""
    if not classes:
        y, said = (np.array([float(row[name]) for row in rows]) for name in ("target", "prediction"))
        return {
            "rmse": metrics.root_mean_squared_error(y, said),
            "mae": metrics.mean_absolute_error(y, said),
            "r2": metrics.r2_score(y, said),
        }
    y = np.array([classes.index(row["target"]) for row in rows])
    shares = np.array([[float(row[f"probability_{label}"]) for label in classes] for row in rows])
    shares /= shares.sum(axis=1, keepdims=True)  # nine digits are written
    said, everything = shares.argmax(axis=1), list(range(len(classes)))
    two = len(classes) == 2
    one_hot = np.eye(len(classes))[y]
    here = np.unique(y)
    areas = [metrics.roc_auc_score(one_hot[:, one], shares[:, one]) for one in here]
    precisions = [metrics.average_precision_score(one_hot[:, one], shares[:, one]) for one in here]
    return {
        "accuracy": metrics.accuracy_score(y, said),
        "balanced_accuracy": metrics.balanced_accuracy_score(y, said),
        "macro_f1": metrics.f1_score(y, said, average="macro"),
        "auroc": float(np.mean(areas)),
        "average_precision": metrics.average_precision_score(y, shares[:, 1]) if two else float(np.mean(precisions)),
        "log_loss": metrics.log_loss(y, shares, labels=everything),
        "brier": metrics.brier_score_loss(y, shares[:, 1])
        if two
        else metrics.brier_score_loss(y, shares, labels=everything, scale_by_half=False),
    }


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("kind", ["two", "three", "numbers"])
@pytest.mark.parametrize("algorithm", ["ridge", "fomaml"])
def test_scores_after_adaptation_are_scikit_learns_on_what_the_kept_models_predict(
    tmp_path: Path, kind: str, algorithm: str
) -> None:
    grid, config = federation(tmp_path, kind, algorithm=algorithm)
    summary = run_federation(grid, config)
    classes = {"two": ["no", "yes"], "three": ["high", "low", "mid"], "numbers": []}[kind]
    written = predict(tmp_path / "state-0" / "personal", tmp_path / f"{kind}.csv").rows
    rows = per_task(tmp_path / "run")
    tasks = [task for task, row in rows.items() if row["split"] == "test"]
    assert len(tasks) == summary["baselines"]["tasks"] == 5
    by_hand = [
        by_scikit_learn([row for row in written if row["task"] == task and row["part"] == "test"], classes) for task in tasks
    ]
    for name in by_hand[0]:
        values = [scored[name] for scored in by_hand]
        assert summary["baselines"]["scores"][name]["after"]["mean"] == pytest.approx(np.mean(values), abs=2e-5, rel=1e-4), name
        assert [float(rows[task][f"{name}_after"]) for task in tasks] == pytest.approx(values, abs=2e-5, rel=1e-4), name
    # The same model by the engine: `test` of the summary and `baselines` must not differ.
    metric = "accuracy" if classes else "rmse"
    step = summary["chosen"]["adapt_steps"]
    for name, place in (("before", 0), ("after", step)):
        assert summary["baselines"]["scores"][metric][name]["mean"] == pytest.approx(
            summary["test"][metric]["mean"][place], rel=1e-5
        )


def test_where_only_a_users_level_can_be_known_the_constant_is_not_beaten(tmp_path: Path) -> None:
    grid, config = federation(tmp_path, "means")
    summary = run_federation(grid, config)
    content = summary["baselines"]
    assert content["gain"] < content["ci95"]
    assert "the trained model is better" not in verdict(content)
    assert "does not beat it for certain" in verdict(content) or "it beats the trained model" in verdict(content)
    by_mse = {name: cell["mean"] for name, cell in content["scores"]["mse"].items() if name not in ("before", "after")}
    assert content["best"] == min(by_mse, key=lambda name: by_mse[name])
    assert by_mse["constant"] < by_mse["global"]
    # By hand: the mean of a user's 16 support rows, about the rows of the test part.
    rows = per_task(tmp_path / "run")
    written = predict(tmp_path / "state-0" / "personal", tmp_path / "means.csv").rows
    for task in (task for task, row in rows.items() if row["split"] == "test"):
        parts = {
            part: np.array([float(row["target"]) for row in written if row["task"] == task and row["part"] == part])
            for part in ("support", "test")
        }
        rmse = np.sqrt(np.square(parts["test"] - parts["support"].mean()).mean())
        assert float(rows[task]["rmse_constant"]) == pytest.approx(rmse, rel=1e-5)


def test_held_out_tasks_have_the_columns_and_their_means_are_the_summarys(tmp_path: Path) -> None:
    grid, config = federation(tmp_path, "two")
    summary = run_federation(grid, config)
    rows = [row for row in per_task(tmp_path / "run").values() if row["split"] == "test"]
    for name, of_contenders in summary["baselines"]["scores"].items():
        for contender, cell in of_contenders.items():
            values = [float(row[f"{name}_{contender}"]) for row in rows if row[f"{name}_{contender}"]]
            assert np.mean(values) == pytest.approx(cell["mean"], abs=1e-6), (name, contender)
            assert len(values) == cell["tasks"]
    assert "accuracy_last" not in rows[0]  # nothing orders the rows
    validated = summary["baselines"]["validation"]
    assert (validated["tasks"], validated["metric"]) == (3, "accuracy")


def test_the_result_does_not_hang_on_how_tasks_are_spread_over_nodes(tmp_path: Path) -> None:
    results = []
    for nodes in (1, 4):
        (tmp_path / str(nodes)).mkdir()
        results.append(run_federation(*federation(tmp_path / str(nodes), "three", nodes))["baselines"])
    assert results[0]["scores"].keys() == results[1]["scores"].keys()
    for name, of_contenders in results[0]["scores"].items():
        for contender, cell in of_contenders.items():
            assert cell == pytest.approx(results[1]["scores"][name][contender], rel=1e-4, abs=1e-6), (name, contender)


def test_they_can_be_left_out(tmp_path: Path) -> None:
    grid, config = federation(tmp_path, "two", baselines=False)
    summary = run_federation(grid, config)
    assert summary["baselines"] is None
    assert not {SUMS, SCORES} & {message.metadata.message_type for message in grid.requests}
    assert not [name for name in next(iter(per_task(tmp_path / "run").values())) if name.endswith("_own")]


def test_in_order_of_time_the_last_value_is_one_of_them(tmp_path: Path) -> None:
    grid, config = federation(tmp_path, "means", **keys({"own.time-column": "b"}))
    summary = run_federation(grid, config)
    assert "last" in summary["baselines"]["scores"]["rmse"]


# ---- nodes that fail or lie


def faulty(kind: str, content: Any) -> Any:
    def fault(message: Message, answer: Any) -> Message | None:
        if message.metadata.message_type != kind:
            return answer(message)  # type: ignore[no-any-return]
        return None if content is None else Message(content(answer(message).content), reply_to=message)

    return fault


def with_sums(change: Any) -> Any:
    return lambda records: SumsReply(change(SumsReply.from_records(records, 2, 1).sums)).to_records()


SPOILT = {
    "huge": with_sums(lambda sums: Sums(sums.gram * 1e300, sums.cross * 1e300, sums.squares)),
    "no rows": with_sums(
        lambda sums: Sums(-sums.gram + 2 * np.diag(sums.gram.diagonal()), np.full_like(sums.cross, 1e308), sums.squares)
    ),
    "garbage": lambda _: RecordDict(),
    "silent": None,
}


@pytest.mark.parametrize("kind", SPOILT)
def test_sums_that_are_of_no_use_cost_a_baseline_at_most_and_never_the_run(tmp_path: Path, kind: str) -> None:
    grid, config = federation(tmp_path, "numbers", 2, **keys({"round-deadline": 1.0}))
    honest = run_federation(*federation(tmp_path, "numbers", 2, **keys({"output-dir": str(tmp_path / "honest")})))
    grid._faults = {1: faulty(SUMS, SPOILT[kind])}
    summary = run_federation(grid, config)
    assert summary["test"] == honest["test"]
    for contender in ("after", "constant", "own"):
        assert summary["baselines"]["scores"]["rmse"][contender] == honest["baselines"]["scores"]["rmse"][contender]
    assert summary["failures"] == (1 if kind in ("garbage", "silent") else 0)


def test_tasks_of_a_node_without_scores_are_missing(tmp_path: Path) -> None:
    grid, config = federation(tmp_path, "numbers", 2, **keys({"round-deadline": 1.0}))
    grid._faults = {1: faulty(SCORES, lambda _: RecordDict())}
    summary = run_federation(grid, config)
    rows = per_task(tmp_path / "run")
    tested = [row for row in rows.values() if row["split"] == "test"]
    known = [row for row in tested if row["rmse_own"]]
    assert 0 < len(known) < len(tested) == 5
    assert summary["baselines"]["tasks"] == len(known)
    assert 0 < summary["seen"]["baselines"]["tasks"] < summary["seen"]["tasks"] == 6
    assert summary["failures"] == 2  # of its held-out tasks, and of those that train


def test_without_any_scores_there_are_no_baselines_and_the_result_is_the_same(tmp_path: Path) -> None:
    grid, config = federation(tmp_path, "numbers", 2)
    grid._faults = dict.fromkeys(range(2), faulty(SCORES, lambda _: RecordDict()))
    summary = run_federation(grid, config)
    assert summary["baselines"] is summary["seen"]["baselines"] is None
    assert len(per_task(tmp_path / "run")) == 8
    assert summary["failures"] == 4


@given(st.sampled_from([SUMS, SCORES]), ANYTHING)
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
def test_whatever_a_node_replies_a_run_ends_with_its_result(kind: str, records: RecordDict) -> None:
    flat = {
        "dataset": "gaussian",
        "gaussian.clients": 8,
        "model": "linear",
        "algorithm": "reptile",
        "rounds": 1,
        "min-nodes": 1,
    }
    with tempfile.TemporaryDirectory() as folder:
        config = parse_run_config({**flat, "validation-tasks": 1, "test-tasks": 3, "adapt-steps": 1, "output-dir": folder})
        grid = LoopbackGrid(2, config.flat(), {1: faulty(kind, lambda _: records)})
        summary = run_federation(grid, config)
    assert summary["test"]["accuracy"]["mean"]
    assert summary["baselines"] is None or summary["baselines"]["tasks"] <= 3


def last_of(grid: LoopbackGrid, kind: str) -> Message:
    return [message for message in grid.requests if message.metadata.message_type == kind][-1]


@pytest.mark.parametrize(
    "more", [{}, {"secure-aggregation": True, "min-nodes": 3, "own.scale": "task"}], ids=["plain", "secure"]
)
def test_a_node_scores_no_task_that_it_trained_on_by_this_message_either(tmp_path: Path, more: dict[str, Any]) -> None:
    grid, config = federation(tmp_path, "two", 3, **more)
    assert run_federation(grid, config)["failures"] == 0
    sent = last_of(grid, SCORES)
    population = call_roll(grid, config)
    request = ScoresRequest.from_records(sent.content, 2, 2, classes=True)
    home = sent.metadata.dst_node_id
    trained = [task for task in population.splits["train"] if population.homes[task] == home]
    spied = ScoresRequest(request.meta, request.lr, request.steps, trained[:1], None, request.round, request.lineage)
    reply = asked(grid, home, spied, sent)
    assert "this node trains on the task" in str(reply.config_records["error"]["reason"])
    if more:  # another model in the same round, and sums' model where no sums are sent
        other = {name: value + 1 for name, value in request.meta.items()}
        reply = asked(
            grid, home, ScoresRequest(other, request.lr, 1, request.task_ids, None, request.round, request.lineage), sent
        )
        assert "this node has scored another model in round" in str(reply.config_records["error"]["reason"])


def asked(grid: LoopbackGrid, home: int, request: ScoresRequest, like: Message) -> RecordDict:
    records = request.to_records()
    for name in ("agreed", "settings"):
        if name in like.content:
            records[name] = like.content[name]
    (reply,) = grid.send_and_receive([Message(records, home, SCORES)])
    return reply.content


def grid_splits(run: Path) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = checkpoints.load(run).facts["splits"]
    return splits


# ---- the metric


def test_validation_chooses_by_the_metric_that_is_asked_for(tmp_path: Path) -> None:
    """Accuracy and AUROC choose different rates or steps here; each run chose the best of its own table."""
    chosen = {}
    for metric in ("accuracy", "auroc", "log_loss"):
        more = {"metric": metric, "algorithm": "reptile", "adapt-steps": 6, "adapt-lrs": "0.001,0.03,1.0,30.0", "rounds": 1}
        grid, config = federation(tmp_path, "two", **keys({**more, "output-dir": str(tmp_path / metric)}))
        summary = run_federation(grid, config)
        chosen[metric] = summary["chosen"]
        kept = [message for message in grid.requests if message.metadata.message_type == EVALUATE]
        assert {message.content.config_records["request"]["metric"] for message in kept} == {metric}
        means = summary["validation"][metric]["mean"]
        best = (max if named(metric).higher_is_better else min)(value for value in means if value is not None)
        assert means[summary["chosen"]["adapt_steps"]] == pytest.approx(best)
        line = json.loads((tmp_path / metric / "history.jsonl").read_text().splitlines()[-1])
        assert metric in line["validation"]
        assert summary["best_validation"][metric] == pytest.approx(best)
    assert chosen["accuracy"] != chosen["log_loss"]


def test_scores_of_a_run_by_another_metric_are_scikit_learns(tmp_path: Path) -> None:
    grid, config = federation(tmp_path, "two", metric="auroc")
    summary = run_federation(grid, config)
    step = summary["chosen"]["adapt_steps"]
    written = predict(tmp_path / "state-0" / "personal", tmp_path / "two.csv").rows
    rows = per_task(tmp_path / "run")
    assert list(summary["test"]) == ["steps", "auroc", "loss", "accuracy"]
    areas = []
    for task in (task for task, row in rows.items() if row["split"] == "test"):
        mine = [row for row in written if row["task"] == task and row["part"] == "test"]
        y = [row["target"] == "yes" for row in mine]
        areas.append(metrics.roc_auc_score(y, [float(row["probability_yes"]) for row in mine]))
        assert float(rows[task][f"auroc_step{step}"]) == pytest.approx(areas[-1], abs=1e-6)
    assert summary["test"]["auroc"]["mean"][step] == pytest.approx(np.mean(areas), abs=1e-6)


def test_a_task_with_one_class_has_no_area_and_does_not_count(tmp_path: Path) -> None:
    path = table(tmp_path, "two")
    lines = path.read_text().splitlines()
    alone = [line.rsplit(",", 1)[0] + ",no" if line.startswith(("u03", "u07", "u11")) else line for line in lines]
    path.write_text("\n".join(alone) + "\n")
    flat: dict[str, Any] = {"dataset": "own", "own.path": str(path), "own.task-column": "user", "rounds": 1, "min-nodes": 1}
    flat |= {
        "algorithm": "ridge",
        "metric": "auroc",
        "validation-tasks": 0,
        "test-tasks": 8,
        "output-dir": str(tmp_path / "run"),
    }
    config = parse_run_config(flat)
    summary = run_federation(InlineGrid(1, config.flat(), {}), config)
    splits = grid_splits(tmp_path / "run")
    without = {"u03", "u07", "u11"} & set(splits["test"])
    assert without  # by the seed
    assert summary["failures"] == 0
    assert set(per_task(tmp_path / "run")) == set(splits["test"]) - without
    assert summary["baselines"]["scores"]["auroc"]["after"]["tasks"] == 8 - len(without)
    assert summary["baselines"]["scores"]["accuracy"]["after"]["tasks"] == 8


def test_a_metric_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match="`metric` must be"):
        parse_run_config({"metric": "auc"})


def test_scores_in_a_reply_are_one_for_each_task_contender_and_score(tmp_path: Path) -> None:
    grid, config = federation(tmp_path, "two", 2)
    run_federation(grid, config)
    sent = last_of(grid, SCORES)
    reply = grid.answer(sent)
    assert reply is not None
    tasks = len(sent.content.config_records["request"]["task-ids"])  # type: ignore[arg-type]
    values = ScoresReply.from_records(reply.content, tasks, len(scores.OF_CLASSES)).scores
    assert values.shape == (tasks, len(CONTENDERS), len(scores.OF_CLASSES))
    assert {key for record in reply.content.values() for key in record} == {"scores"}


def test_tasks_on_which_the_model_diverged_are_told_and_not_counted_as_won() -> None:
    values = np.full((10, len(CONTENDERS), 1), np.nan)
    values[:, CONTENDERS.index("constant"), 0] = 0.4
    values[:6, CONTENDERS.index("after"), 0] = 0.9
    content = against_baselines(TaskScores([f"t{i}" for i in range(10)], values), ["accuracy"], ACCURACY)
    assert content is not None
    assert (content["pairs"], content["diverged"]) == (6, 4)
    assert "predicts nothing usable on 4 of 10 tasks" in verdict(content)


@pytest.mark.parametrize(("name", "value"), [("accuracy", 1e30), ("rmse", -1.0), ("auroc", 1.5), ("coverage_90", 2.0)])
def test_a_score_that_cannot_be_is_refused(name: str, value: float) -> None:
    with pytest.raises(WireError, match="what is no"):
        check_range(np.array([[0.5, value]]), named(name))
    check_range(np.array([[0.5, np.nan]]), named(name))
    check_range(np.array([-12.5]), named("r2"))
