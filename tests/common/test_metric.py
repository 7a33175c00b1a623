"""How scores are compared and written: by hand, and the table against what code elsewhere takes for granted."""

import math
from dataclasses import replace
from typing import get_args

import pytest

from quickbloom.common.config.run import RunConfig
from quickbloom.common.datasets.base import DataSpec
from quickbloom.common.errors import DataError
from quickbloom.common.metric import (
    ACCURACY,
    CHOSEN_BY,
    LOSS,
    METRICS,
    MSE,
    RMSE,
    TO_CHOOSE_BY,
    Metric,
    chosen_for,
    metric_of,
    named,
    of_kind,
    shown,
)
from quickbloom.common.scores import names


def test_names_are_told_apart_and_second_scores_are_in_the_table() -> None:
    every = [metric.name for metric in METRICS]
    assert len(set(every)) == len(every)
    assert {metric.second for metric in METRICS if metric.second} == {"balanced_accuracy", "accuracy", "rmse"}
    for metric in METRICS:
        assert named(metric.name) is metric
        if metric.second:
            assert named(metric.second).kind == metric.kind
            assert named(metric.second).higher_is_better == metric.higher_is_better


@pytest.mark.parametrize(("kind", "name"), [("classification", "accuracy"), ("regression", "mse")])
def test_the_form_of_the_data_says_what_is_measured(kind: str, name: str) -> None:
    assert of_kind(kind).name == name
    assert DataSpec(kind, (2,), 3).metric is of_kind(kind)  # type: ignore[arg-type]
    assert [metric.kind for metric in CHOSEN_BY].count(kind) == 1  # type: ignore[arg-type]


def test_an_unknown_name_is_one_sentence() -> None:
    with pytest.raises(DataError, match=r"^a score must be one of accuracy, .*, got 'au roc': it is of another release"):
        named("au\x1broc")


@pytest.mark.parametrize(
    ("metric", "value", "half", "written"),
    [
        (ACCURACY, 0.755, 0.031, "75.5 ± 3.1 %"),
        (ACCURACY, 0.755, None, "75.5 %"),
        (ACCURACY, 0.755, math.nan, "75.5 %"),
        (ACCURACY, 1, 0.0, "100.0 ± 0.0 %"),
        (named("balanced_accuracy"), 0.5, 0.125, "50.0 ± 12.5 %"),
        (MSE, 0.35149, 0.0204, "0.3515 ± 0.02"),
        (RMSE, 1234.56, None, "1235"),
        (LOSS, 12, math.inf, "12"),
        (ACCURACY, None, 0.1, "diverged"),
        (MSE, math.inf, 0.1, "diverged"),
    ],
)
def test_scores_are_written_with_their_half_width(metric: Metric, value: float, half: float | None, written: str) -> None:
    assert metric.score(value, half) == written
    assert metric.number(value, half) == written.removesuffix(" %")


def test_what_float32_adds_does_not_round_a_digit_up() -> None:
    # float32(0.7535) is 0.75349998..; 75.35 as a float64 is below the half, 0.7535000443 is above it.
    assert ACCURACY.score(0.7535000443) == ACCURACY.score(0.7535) == "75.3 %"


@pytest.mark.parametrize(
    ("metric", "axis", "heading", "title", "margin"),
    [
        (ACCURACY, "accuracy, %", "accuracy in %", "accuracy", "± 3.1 %"),
        (named("balanced_accuracy"), "balanced accuracy, %", "balanced accuracy in %", "balanced accuracy", "± 3.1 %"),
        (MSE, "mean squared error", "mean squared error", "mean squared error of price", "± 0.031"),
        (RMSE, "rmse, in its unit", "rmse, in its unit", "rmse, in its unit", "± 0.031"),
    ],
)
def test_titles_name_percent_and_the_target(metric: Metric, axis: str, heading: str, title: str, margin: str) -> None:
    assert (metric.axis, metric.heading, metric.title_for("price"), metric.margin(0.031)) == (axis, heading, title, margin)
    assert metric.title_for("") == metric.title


def test_changes_have_an_arrow_between_them() -> None:
    assert ACCURACY.change(0.2, None) == "20.0 % → diverged"
    assert MSE.change(4.0, 0.5, "->") == "4 -> 0.5"


def test_values_are_drawn_in_percent_only_if_they_are_shares() -> None:
    assert ACCURACY.scaled([0.25, 1]) == [25, 100]
    assert MSE.scaled([0.25]) == [0.25]


def test_better_is_higher_for_accuracy_and_lower_for_errors() -> None:
    assert ACCURACY.is_better(0.6, than=0.5)
    assert MSE.is_better(0.5, than=0.6)
    for metric in (ACCURACY, MSE):
        assert not metric.is_better(0.5, than=0.5)
        assert not metric.is_better(math.nan, than=0.5)
        assert not metric.is_better(0.5, than=math.nan)
        assert metric.reaches(0.5, 0.5)
        assert not metric.reaches(math.nan, 0.5)
    assert (ACCURACY.best([0.2, 0.9, math.nan]), MSE.best([math.inf, 4.0, 3.0])) == (0.9, 3.0)


def test_what_is_not_finite_is_sorted_behind_everything() -> None:
    assert sorted([math.nan, 0.2, 0.9], key=ACCURACY.cost)[:2] == [0.9, 0.2]
    assert sorted([math.inf, -math.inf, 5.0, 1.0], key=MSE.cost)[:2] == [1.0, 5.0]


def test_a_run_is_scored_by_what_its_scores_hold() -> None:
    assert metric_of({"steps": [0], "accuracy": {}, "loss": {}}) is ACCURACY
    # The first of them is what the run was decided by.
    assert metric_of({"mse": {}, "rmse": {}}) is MSE
    assert metric_of({"rmse": {}, "mse": {}}) is RMSE
    assert metric_of({"loss": {}, "auroc": {}, "accuracy": {}}) is named("auroc")
    for held, said in ((("crps", "loss"), "crps, loss"), ((), "none")):
        with pytest.raises(DataError, match=rf"must hold accuracy or mse, got {said}: "):
            metric_of(dict.fromkeys(held))


@pytest.mark.parametrize(
    ("counts", "name"),
    [
        ([75, 25], "balanced_accuracy"),  # two classes: halfway between a half and all
        ([74, 25], "accuracy"),
        ([25, 75], "balanced_accuracy"),
        ([4, 1, 1], "balanced_accuracy"),  # three: halfway between a third and all is two thirds
        ([65, 18, 17], "accuracy"),
        ([5], "accuracy"),
        ([], "accuracy"),
        ([0, 0], "accuracy"),
    ],
)
def test_where_one_class_prevails_classes_count_alike(counts: list[int], name: str) -> None:
    assert chosen_for("classification", counts).name == name
    assert chosen_for("regression", counts) is MSE


def test_a_table_leaves_the_loss_out_where_it_is_the_score_itself() -> None:
    scores = dict.fromkeys(("loss", "accuracy", "balanced_accuracy", "steps"))
    assert [metric.name for metric in shown(scores)] == ["accuracy", "balanced_accuracy", "loss"]
    assert [metric.name for metric in shown(dict.fromkeys(("auroc", "loss", "accuracy")))] == ["auroc", "accuracy", "loss"]
    assert [metric.name for metric in shown(dict.fromkeys(("loss", "mse", "rmse")))] == ["mse", "rmse"]


def test_what_a_setting_may_name_is_of_one_kind_and_what_settings_offer() -> None:
    offered = RunConfig.model_fields["metric"].annotation
    assert set(get_args(offered)) == {"auto", *TO_CHOOSE_BY}
    assert all(named(name).kind for name in TO_CHOOSE_BY)
    assert not {"coverage_90", "width_90", "r2", "calibration_error"} & set(TO_CHOOSE_BY)  # to be good at these alone is easy
    for kind in ("classification", "regression"):
        assert {metric.name for metric in METRICS if metric.kind == kind} >= set(names(kind))


def test_a_score_that_is_better_when_higher_needs_no_percent() -> None:
    r2 = replace(ACCURACY, name="r2", title="R²", share=False)
    assert (r2.score(0.5), r2.axis, r2.best([0.1, 0.5])) == ("0.5", "R²", 0.5)
