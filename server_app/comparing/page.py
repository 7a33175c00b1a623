"""comparison.html: the table of a comparison and its curves, in one self-contained file."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quickbloom.common.metric import Metric, named
from quickbloom.server_app.comparing import modes, paired
from quickbloom.server_app.comparing.result import label as title_of
from quickbloom.server_app.comparing.table import caption, failures, footing, table
from quickbloom.server_app.reporting.drawing import QUIET, every, few_numbers, picture, possible, style, whole_numbers
from quickbloom.server_app.reporting.page import (
    Code,
    Fold,
    Part,
    Picture,
    Section,
    Table,
    Text,
    nan_for_null,
    require_packages,
    write_page,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
Points = Callable[[Row], Mapping[float, float]]
Line = Sequence[tuple[float, float, float]]
_AT_SIGHT = {modes.SYNC: "--", modes.ASYNC: "-"}
"""How the lines of the modes differ, in the colour of their algorithm."""


def write_comparison_page(result: Mapping[str, Any], path: Path) -> Path:
    """Write the page of a comparison (see `comparison.assemble`) and return its path. Raises DataError."""
    require_packages()
    plots, missing = _plots(result)
    title = f"{', '.join(dict.fromkeys(map(modes.title, result['algorithms'])))} on {result['data']}"
    said = caption(result)
    sections = [
        Section(
            "Result",
            [Table("Test tasks before and after adaptation", *table(result)), *(Text(sentence) for sentence in said[1:])],
        ),
        Section("Tests", [Table("Better, or luck?", *paired.table(result))] if paired.table(result)[1] else []),
        Section("Modes", _modes(result)),
        Section("Curves", [Text(_band(result)), *plots, *(Text(sentence) for sentence in missing)]),
        Section("Failures", [Text(failure) for failure in failures(result)]),
        Section("Repeat it", _repeat(result)),
    ]
    return write_page(path, title, said[0], [section for section in sections if section.parts])


def _repeat(result: Mapping[str, Any]) -> list[Part]:
    runs = "\n".join(run["command"] for row in result["algorithms"] for run in row["runs"])
    parts: list[Part] = [
        Code("Command that repeats the comparison", result["command"]),
        Text("Runs that are finished in its directory are not repeated."),
        *(Text(sentence) for sentence in footing(result)),
        Fold("The runs of the table, one by one", [Code("Commands of all runs", runs)]),
    ]
    for row in result["algorithms"]:
        settings = "\n".join(f"{key} = {json.dumps(value)}" for key, value in row["configuration"].items())
        parts.append(Fold(f"Settings of {title_of(row)}", [Code(f"Settings of {title_of(row)}", settings)]))
    return parts


def _band(result: Mapping[str, Any]) -> str:
    return "Lines: mean over seeds; bands: one standard deviation." if len(result["seeds"]) > 1 else "One seed."


def _plots(result: Mapping[str, Any]) -> tuple[list[Picture], list[str]]:
    """(plots of what there are numbers for, why the others are missing, in sentences). Nothing is smoothed."""
    metric = named(result["metric"])
    described: list[tuple[str, str, str, Points]] = [
        (
            "Validation tasks while training",
            f"Scored every {result['evaluate_every']} rounds with the rate and step that were best then.",
            "round",
            lambda run: {number: score for number, score, _ in run["curve"]},
        ),
        (
            "Test tasks, step by step",
            "After 0, 1, 2, ... steps of adaptation with the rate that the validation tasks chose.",
            "adaptation steps",
            lambda run: dict(enumerate(run["steps"])),
        ),
        (
            "Test tasks, with few examples",
            "Adapted on the first examples of each class alone, at the chosen rate and step.",
            "support examples per class" if metric.kind == "classification" else "support examples",
            lambda run: {int(count): score for count, score in run["shots"].items()},
        ),
    ]
    target = result["target"]["validation"]
    plots, missing = [], []
    for number, (heading, text, label, points) in enumerate(described):
        lines = {title_of(row): _over_seeds(row["runs"], points) for row in result["algorithms"]}
        lines = {name: line for name, line in lines.items() if line}
        if lines:
            plots.append(_picture(heading, text, lines, label, metric, target if number == 0 else None))
        else:
            missing.append(f'No plot "{heading}": {_why_missing(result, label)}.')
    return plots, missing


def _why_missing(result: Mapping[str, Any], label: str) -> str:
    if all(run["failure"] for row in result["algorithms"] for run in row["runs"]):
        return "no run has scores"
    if label.startswith("support"):
        return "every number of `test-shots` is above the support examples that the test tasks have, or there is none"
    return "no evaluation has a score of every run"


def _over_seeds(runs: Sequence[Row], points: Points) -> list[tuple[float, float, float]]:
    """(x, mean, standard deviation) at every x that all runs with scores have."""
    series = [points(nan_for_null(dict(run))) for run in runs if not run["failure"]]
    shared = sorted(set.intersection(*(set(one) for one in series))) if series else []
    values = [[one[x] for one in series] for x in shared]
    return [
        (x, float(np.mean(v)), float(np.std(v, ddof=1)) if len(v) > 1 else 0.0) for x, v in zip(shared, values, strict=True)
    ]


def _modes(result: Mapping[str, Any]) -> list[Part]:
    """The table of the modes, and their scores by time and by bytes."""
    if not result["modes"]:
        return []
    unit, metric = result["modes"]["unit"], named(result["metric"])
    parts: list[Part] = [Table("The same algorithm in mode sync and async", *modes.table(result))]
    for heading, axis, column, scale in (
        (f"Validation tasks by {unit}", unit, 3, 1.0),
        ("Validation tasks by bytes", "MB up and down", 2, 1e-6),
    ):
        lines = {title_of(row): _by(row["runs"], column, scale) for row in result["algorithms"]}
        if any(lines.values()):
            parts.append(_by_mode(heading, axis, {name: line for name, line in lines.items() if line}, result, metric))
    return [*parts, Text("At each round that was evaluated: the mean over seeds of the score, and of the time or the bytes.")]


def _by(runs: Sequence[Row], column: int, scale: float) -> list[tuple[float, float]]:
    """(x, score), each the mean over the runs at a round that all of them evaluated; x: that column of their `timeline`."""
    series = [{point[0]: (scale * point[column], point[1]) for point in run["timeline"]} for run in runs if not run["failure"]]
    shared = sorted(set.intersection(*(set(one) for one in series))) if series else []
    means = (np.mean([one[number] for one in series], axis=0) for number in shared)
    return [(float(x), float(score)) for x, score in means]


def _by_mode(
    heading: str, axis: str, lines: Mapping[str, Sequence[tuple[float, float]]], result: Mapping[str, Any], metric: Metric
) -> Picture:
    rows = {title_of(row): row for row in result["algorithms"]}
    algorithms = list(dict.fromkeys(map(modes.title, result["algorithms"])))

    def draw(axes: "Axes") -> None:
        for name, line in lines.items():
            row = rows[name]
            looks = {**style(algorithms.index(modes.title(row))), "ls": _AT_SIGHT[row["mode"]]}
            places, scores = zip(*line, strict=True)
            axes.plot(places, metric.scaled(scores), label=name, markevery=every(len(line)), **looks)
        axes.set(xlabel=axis, ylabel=metric.axis, xlim=(0, None))
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
        few_numbers(axes)

    ends = "; ".join(f"{name} {metric.score(line[-1][1])} after {line[-1][0]:.3g} {axis}" for name, line in lines.items())
    return picture(heading, f"{ends}.", draw)


def _picture(heading: str, text: str, lines: Mapping[str, Line], label: str, metric: Metric, target: float | None) -> Picture:
    scale = metric.scale

    def draw(axes: "Axes") -> None:
        for number, (name, line) in enumerate(lines.items()):
            x, mean, sd = (np.array(part) for part in zip(*line, strict=True))
            axes.plot(x, scale * mean, label=name, markevery=every(len(x)), **style(number))
            low, high = (possible(list(scale * edge), metric) for edge in (mean - sd, mean + sd))
            axes.fill_between(x, low, high, alpha=0.15, color=style(number)["color"], lw=0)
        if target is not None:
            axes.axhline(scale * target, color=QUIET, ls="--", lw=1, label="target")
        axes.set(xlabel=label, ylabel=metric.axis)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
        whole_numbers(axes)

    ends = ", ".join(f"{name} {metric.score(line[-1][1])}" for name, line in lines.items())
    return picture(heading, f"{text} At the end: {ends}.", draw)
