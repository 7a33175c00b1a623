"""Scales that all nodes share, in whole runs: whose rows decide, who is told, and who is never asked."""

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from hostile import ANYTHING
from hypothesis import HealthCheck, given, settings
from loopback import Fault, LoopbackGrid

from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.datasets.own import Own, OwnOptions
from quickbloom.common.datasets.own.agreement import agree
from quickbloom.common.datasets.own.columns import Schema
from quickbloom.common.datasets.own.scales import TARGET, Moments
from quickbloom.common.errors import ConfigError, DataError, RunError
from quickbloom.common.wire.baselines import SCORES, SUMS
from quickbloom.common.wire.messages import EVALUATE, KEEP, TRAIN
from quickbloom.common.wire.roll_call import MOMENTS, MomentsReply, told_agreed
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.federation.agreeing import metric_for, share_scales
from quickbloom.server_app.federation.roll_call import call_roll
from quickbloom.server_app.runs import checkpoints

NODES = ("ABCD", "EFGH", "IJKL")


def wards(path: Path, names: str, *, classes: bool = False, target: str = "y") -> Path:
    """30 rows of each ward; every ward and every file has a level of its own. Some ages are missing."""
    rng = np.random.default_rng(list(names.encode()))
    lines = [f"ward,age,weight,{target}"]
    for name in names:
        for row in range(30):
            age, weight = rng.normal(ord(name), 3), rng.normal(1.7e9 + 100 * ord(names[0]), 50)
            y = rng.normal(10 * ord(name), 4)
            label = "ill" if rng.random() < 0.2 else "well"
            lines.append(f"{name},{'' if row % 6 == 0 else f'{age:.2f}'},{weight:.2f},{label if classes else f'{y:.3f}'}")
    path.write_text("\n".join(lines) + "\n")
    return path


def keys(settings_by_name: dict[str, Any]) -> dict[str, Any]:
    """Settings whose names are no names of Python."""
    return settings_by_name


def federation(
    folder: Path, faults: Mapping[int, Fault] | None = None, *, classes: bool = False, **more: Any
) -> tuple[LoopbackGrid, RunConfig]:
    flat: dict[str, Any] = {"dataset": "own", "own.task-column": "ward", "min-nodes": 1, "rounds": 2, "algorithm": "ridge"}
    flat |= {"validation-tasks": 2, "test-tasks": 3, "evaluate-every": 1, "adapt-steps": 1, "own.target-column": "y"}
    flat |= {"output-dir": str(folder / "run"), "node-deadline": 2.0, "round-deadline": 5.0, **more}
    config = parse_run_config(flat).resolved()
    files = {node: wards(folder / f"{names}.csv", names, classes=classes) for node, names in enumerate(NODES)}
    nodes = {node: {"data-path": str(file), "state-dir": str(folder / f"state-{node}")} for node, file in files.items()}
    return LoopbackGrid(3, config.flat(), faults, nodes), config


def kinds_of(grid: LoopbackGrid) -> list[str]:
    return [message.metadata.message_type for message in grid.requests]


def training_rows(folder: Path, train: list[str]) -> dict[str, list[float]]:
    """The cells of support and query rows of these wards, by column, read from the files."""
    found: dict[str, list[float]] = {"age": [], "weight": [], "y": []}
    for names in NODES:
        path = folder / f"{names}.csv"
        own = Own(OwnOptions(path=str(path), task_column="ward", target_column="y"), Path())
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        for task in set(names) & set(train):
            for row in (rows[place] for part in own.rows[task][:2] for place in part):
                for name, values in found.items():
                    values += [float(row[name])] if row[name] else []
    return found


def told(message: Message) -> tuple[dict[str, list[float]], list[float]]:
    """The scales in a request."""
    columns, target = json.loads(told_agreed(message.content)[1])
    return columns, target


def test_scales_are_those_of_the_training_tasks_rows_alone_and_every_node_gets_them(tmp_path: Path) -> None:
    grid, config = federation(tmp_path)
    summary = run_federation(grid, config)
    facts = checkpoints.load(tmp_path / "run").facts
    train = facts["splits"]["train"]
    assert (len(train), summary["failures"]) == (7, 0)
    by_hand = {name: (np.mean(values), np.std(values)) for name, values in training_rows(tmp_path, train).items()}
    schema = Schema.from_json(facts["schema"])
    assert schema.scales.keys() == {"age", "weight"}
    for name, scale in (*schema.scales.items(), ("y", schema.target_scale)):
        assert scale[0] == pytest.approx(by_hand[name][0], rel=1e-12), name
        assert scale[1] == pytest.approx(by_hand[name][1], rel=1e-9), name
    after = [message for message in grid.requests if message.metadata.message_type in (TRAIN, EVALUATE, SUMS, SCORES, KEEP)]
    assert {message.metadata.message_type for message in after} == {TRAIN, EVALUATE, SUMS, SCORES, KEEP}
    for message in after:
        assert told(message) == (schema.scales, schema.target_scale)
    # Personal models are standardised by them as well.
    cards = [json.loads(path.read_text()) for path in tmp_path.glob("state-*/personal/*.json")]
    assert len(cards) == 12
    for card in cards:
        assert card["preparation"]["numbers"]["age"] == dict(zip(("mean", "deviation"), schema.scales["age"], strict=True))
        assert card["preparation"]["target"] == dict(zip(("mean", "deviation"), schema.target_scale, strict=True))


def test_a_node_is_asked_once_and_about_its_training_tasks_alone(tmp_path: Path) -> None:
    grid, config = federation(tmp_path)
    run_federation(grid, config)
    train = set(checkpoints.load(tmp_path / "run").facts["splits"]["train"])
    asked = [message.content.config_records["request"]["task-ids"] for message in grid.requests if is_of(message, MOMENTS)]
    assert len(asked) == 3
    assert sorted(task for tasks in asked for task in tasks) == sorted(train)  # type: ignore[union-attr]


def is_of(message: Message, kind: str) -> bool:
    return bool(message.metadata.message_type == kind)


def test_a_task_by_itself_is_standardised_as_before(tmp_path: Path) -> None:
    grid, config = federation(tmp_path, **keys({"own.scale": "task"}))
    run_federation(grid, config)
    assert MOMENTS not in kinds_of(grid)
    kept = Schema.from_json(checkpoints.load(tmp_path / "run").facts["schema"])
    assert (kept.scales, kept.target_scale) == ({}, [])
    card = json.loads((tmp_path / "state-0" / "personal" / "A.json").read_text())
    own = Own(OwnOptions(path=str(tmp_path / "ABCD.csv"), task_column="ward", target_column="y"), Path())
    support = own.target.values[own.rows["A"][0]]
    assert card["preparation"]["target"]["mean"] == pytest.approx(support.mean())
    assert card["preparation"]["target"]["deviation"] == pytest.approx(support.std())


PRIVATE: dict[str, dict[str, Any]] = {
    "privacy": {"privacy.noise-multiplier": 1.0, "privacy.clip": 1.0, "tasks-per-round": 3},
    "secure": {"secure-aggregation": True, "min-nodes": 3},
    "robust": {"aggregate": "median"},
}


@pytest.mark.parametrize("kind", PRIVATE)
def test_nobody_tells_means_or_sums_where_nodes_must_not_be_seen_one_by_one(tmp_path: Path, kind: str) -> None:
    if kind == "privacy":
        pytest.importorskip("dp_accounting")
    grid, config = federation(tmp_path, **PRIVATE[kind])
    summary = run_federation(grid, config)
    assert not {MOMENTS, SUMS} & set(kinds_of(grid))
    assert config.flat()["own.scale"] == "task"
    scored = summary["baselines"]["scores"]["rmse"]
    assert {"own", "constant", "after"} <= scored.keys()
    assert not {"global", "global_offset"} & scored.keys()
    assert summary["failures"] == 0
    with pytest.raises(ConfigError, match=r'must be "task", or "features" behind an encoder, with privacy, `secure-agg'):
        parse_run_config({**config.flat(), "own.scale": "shared"})


@pytest.mark.parametrize("kind", ["privacy", "secure", "robust"])
def test_a_node_refuses_to_tell_them_there_whatever_the_server_asks(tmp_path: Path, kind: str) -> None:
    grid, config = federation(tmp_path, **PRIVATE[kind])
    population = call_roll(grid, config)
    home = population.homes["A"]
    for message_kind in (SUMS, MOMENTS):
        request = RecordDict({"request": ConfigRecord({"task-ids": ["A"]})})
        (reply,) = grid.send_and_receive([Message(request, home, message_kind)])
        assert set(reply.content) == {"error"}


def test_the_node_setting_least_in_sum_refuses_both(tmp_path: Path) -> None:
    grid, config = federation(tmp_path)
    population = call_roll(grid, config)
    guarded = LoopbackGrid(3, config.flat(), None, {0: {"data-path": str(tmp_path / "ABCD.csv"), "least-in-sum": 3}})
    assert population.homes["A"] == 100
    for kind in (SUMS, MOMENTS):
        request = RecordDict({"request": ConfigRecord({"task-ids": ["A"]})})
        (reply,) = guarded.send_and_receive([Message(request, 100, kind)])
        assert "`least-in-sum` is 3" in str(reply.content.config_records["error"]["reason"])


def test_a_run_that_goes_on_keeps_the_scales_and_asks_nobody_again(tmp_path: Path) -> None:
    grid, config = federation(tmp_path, rounds=4)
    whole = run_federation(grid, config)
    source = tmp_path / "run" / "checkpoints" / "round-000003.safetensors"
    scales = Schema.from_json(checkpoints.load(tmp_path / "run").facts["schema"]).scales
    again, more = federation(tmp_path, rounds=4, **keys({"resume-from": str(source), "output-dir": str(tmp_path / "more")}))
    rest = run_federation(again, more)
    assert MOMENTS not in kinds_of(again)
    assert Schema.from_json(checkpoints.load(tmp_path / "more").facts["schema"]).scales == scales
    assert (rest["test"], rest["chosen"], rest["baselines"]) == (whole["test"], whole["chosen"], whole["baselines"])


def changed(change: Callable[[MomentsReply], RecordDict]) -> Fault:
    """A node that answers the question for moments otherwise."""

    def fault(message: Message, answer: Callable[[Message], Message]) -> Message:
        reply = answer(message)
        if is_of(message, MOMENTS):
            reply.content = change(MomentsReply.from_records(reply.content))
        return reply

    return fault


def with_moments(**moments: Moments) -> Callable[[MomentsReply], RecordDict]:
    return lambda said: replace(said, moments={**said.moments, **moments}).to_records()


BAD: dict[str, tuple[Callable[[MomentsReply], RecordDict], str]] = {
    "nothing": (lambda _: RecordDict(), "the field 'moments' is missing"),
    "huge mean": (with_moments(age=Moments(5, 1e300, 1.0)), "`means` must be at most 1e"),
    "huge squares": (with_moments(age=Moments(5, 0.0, 1e300)), "`squares` must be those of so many numbers"),
    "negative squares": (with_moments(age=Moments(5, 0.0, -1.0)), "`squares` must be those of so many numbers"),
    "infinite": (with_moments(age=Moments(5, float("inf"), 1.0)), "`means` must be finite"),
    "unknown": (with_moments(age=Moments(5, 0.0, float("nan"))), "`squares` must be finite"),
    "many rows": (with_moments(age=Moments(10**15, 0.0, 1.0)), "about more than the "),
    "other column": (with_moments(height=Moments(5, 0.0, 1.0)), "is about a column 'height', which is no input of numbers"),
    "many classes": (lambda said: replace(said, classes=[10**12]).to_records(), "about more than the "),
}


@pytest.mark.parametrize("kind", BAD)
def test_an_answer_that_no_rows_give_is_named_and_does_not_count(tmp_path: Path, kind: str) -> None:
    change, words = BAD[kind]
    grid, config = federation(tmp_path, {1: changed(change)})
    population = call_roll(grid, config)
    warned: list[str] = []
    share_scales(grid, config, population, warned.append)
    (sentence,) = warned
    assert sentence.startswith("Node 101 does not count in the means of the columns: ")
    assert words in sentence
    honest = [task for task in population.splits["train"] if population.homes[task] != 101]
    ages = training_rows(tmp_path, honest)["age"]
    assert Schema.from_json(population.spec.schema).scales["age"] == pytest.approx([np.mean(ages), np.std(ages)], rel=1e-9)


def test_a_node_that_does_not_answer_costs_its_rows_and_none_at_all_the_run(tmp_path: Path) -> None:
    def silent(message: Message, answer: Callable[[Message], Message]) -> Message | None:
        return None if is_of(message, MOMENTS) else answer(message)

    grid, config = federation(tmp_path, {1: silent}, **keys({"node-deadline": 0.2}))
    population = call_roll(grid, config)
    warned: list[str] = []
    share_scales(grid, config, population, warned.append)
    assert warned == ["Node 101 does not count in the means of the columns: it did not answer within 0.2 s"]
    grid._faults = dict.fromkeys(range(3), silent)
    with pytest.raises(RunError, match="no node told the means of its columns"):
        share_scales(grid, config, call_roll(grid, config), warned.append)


def test_whatever_a_node_answers_the_scales_are_finite_or_those_of_the_others(tmp_path: Path) -> None:
    grid, config = federation(tmp_path)
    population = call_roll(grid, config)

    @given(ANYTHING)
    @settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def check(records: RecordDict) -> None:
        def fault(message: Message, answer: Callable[[Message], Message]) -> Message:
            return Message(records, reply_to=message)

        grid._faults = {1: fault}
        mine = replace(population)
        share_scales(grid, config, mine, lambda _: None)
        assert Schema.from_json(mine.spec.schema).checked().scales

    check()


# ---- the metric


@pytest.mark.parametrize(
    ("counts", "metric"),
    [
        ([50, 50], "accuracy"),
        ([74, 26], "accuracy"),
        ([75, 25], "balanced_accuracy"),  # half-way between an even share and all
        ([65, 35, 0], "accuracy"),
        ([67, 33, 0], "balanced_accuracy"),
        ([], "accuracy"),
    ],
)
def test_auto_takes_the_balanced_accuracy_where_one_class_has_most_rows(tmp_path: Path, counts: list[int], metric: str) -> None:
    grid, config = federation(tmp_path, classes=True)
    warned: list[str] = []
    assert metric_for(config, call_roll(grid, config), counts, warned.append) == metric
    if metric == "balanced_accuracy":
        share = 100 * max(counts) / sum(counts)
        assert warned == [
            f"{share:.0f} % of the training rows are of one class, so the balanced accuracy decides, in which every class "
            "counts alike: set `metric` to another score if you want that"
        ]
    else:
        assert not warned


def test_a_run_with_uneven_classes_counts_them_and_is_decided_by_the_balanced_accuracy(tmp_path: Path) -> None:
    grid, config = federation(tmp_path, classes=True)
    summary = run_federation(grid, config)
    assert list(summary["test"])[1] == "balanced_accuracy"
    assert summary["test"].keys() == {"steps", "balanced_accuracy", "accuracy", "loss"}
    assert summary["baselines"]["metric"] == "balanced_accuracy"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["metric"] == "balanced_accuracy"
    warnings = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    (said,) = [line["sentence"] for line in warnings if "of one class" in line.get("sentence", "")]
    train = checkpoints.load(tmp_path / "run").facts["splits"]["train"]
    labels = []
    for names in NODES:
        own = Own(OwnOptions(path=str(tmp_path / f"{names}.csv"), task_column="ward", target_column="y"), Path())
        labels += [own.target.values[rows] for task in set(names) & set(train) for rows in own.rows[task][:2]]
    assert said.startswith(f"{100 * np.mean(np.concatenate(labels)):.0f} % of the training rows")


@pytest.mark.parametrize(("classes", "metric"), [(True, "rmse"), (False, "auroc")])
def test_a_metric_of_the_other_kind_is_refused_before_the_first_round(tmp_path: Path, classes: bool, metric: str) -> None:
    grid, config = federation(tmp_path, classes=classes, metric=metric)
    fitting, kind = ("accuracy, balanced_accuracy, ", "classification") if classes else ("mse, rmse, mae", "regression")
    with pytest.raises(ConfigError, match=rf"^`metric` must be one of {fitting}.* for {kind}, got '{metric}'$"):
        run_federation(grid, config)
    assert TRAIN not in kinds_of(grid)


def test_what_a_target_is_called_in_moments_is_no_column() -> None:
    assert TARGET == ""


def test_no_node_brings_scales_with_its_file() -> None:
    """A schema that a node announces may hold anything; what nodes agree on holds no scales of it."""
    liar = Schema("y", [], {"x": "number"}, scales={"x": [0.0, 1e200]}, target_scale=[0.0, 1e200])
    honest = Schema("y", [], {"x": "number"})
    for found in ([(liar, 1), (honest, 3)], [(liar, 3), (honest, 1)]):
        agreed = agree(found, 10)
        assert (agreed.scales, agreed.target_scale) == ({}, [])


@pytest.mark.parametrize("number", ["1e400", "1" + "0" * 400, "NaN", "true", '"1"'])
def test_a_scale_that_is_no_number_is_refused_in_one_sentence(number: str) -> None:
    text = Schema("y", [], {"x": "number"}, target_scale=[0.0, 1.0]).to_json().replace("[0.0, 1.0]", f"[{number}, 1.0]")
    with pytest.raises(DataError, match="cannot read"):
        Schema.from_json(text)
