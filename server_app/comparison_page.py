"""comparison.html: the table of a comparison and its curves, in one self-contained file."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from server_app.comparison import caption, failures, table
from server_app.page import Plot, nan_for_null, require_packages, write_page

_PAGE = """
{% block result %}
<table><tr>{% for heading in headings %}<th>{{ heading }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>
{% for sentence in caption + missing %}<p class="note">{{ sentence }}</p>{% endfor %}
{% endblock %}
{% block details %}
<h2>To repeat it</h2><pre>{{ command }}</pre>
<p class="note">Runs that are finished in its directory are not repeated. The runs of the table, one by one:</p>
<pre>{{ commands }}</pre>
{% for name, settings in configurations %}
<details><summary>Settings of {{ name }}</summary><pre>{{ settings }}</pre></details>
{% endfor %}
{% endblock %}
"""

Row = Mapping[str, Any]
Points = Callable[[Row], Mapping[float, float]]


def write_comparison_page(result: Mapping[str, Any], path: Path) -> Path:
    """Write the page of a comparison (see `comparison.assemble`) and return its path. Raises DataError."""
    require_packages()
    headings, rows = table(result)
    plots, missing = _plots(result)
    return write_page(
        path,
        _PAGE,
        title=f"{', '.join(row['algorithm'] for row in result['algorithms'])} on {result['dataset']}",
        headings=headings,
        rows=rows,
        caption=caption(result),
        plots=plots,
        missing=missing,
        failures=failures(result),
        command=result["command"],
        commands="\n".join(run["command"] for row in result["algorithms"] for run in row["runs"]),
        configurations=[
            (row["algorithm"], "\n".join(f"{key} = {json.dumps(value)}" for key, value in row["configuration"].items()))
            for row in result["algorithms"]
        ],
    )


def _plots(result: Mapping[str, Any]) -> tuple[list[Plot], list[str]]:
    """(plots of what there are numbers for, why the others are missing, in sentences). Nothing is smoothed."""
    metric = result["metric"]
    band = "Line: mean over seeds; band: one standard deviation." if len(result["seeds"]) > 1 else "One seed."
    described: list[tuple[str, str, str, Points]] = [
        (
            "Validation tasks while training",
            f"Scored every {result['evaluate_every']} rounds with the rate and step that were best then. {band}",
            "round",
            lambda run: {number: score for number, score, _ in run["curve"]},
        ),
        (
            "Test tasks, step by step",
            f"After 0, 1, 2, ... steps of adaptation with the rate that the validation tasks chose. {band}",
            "adaptation steps",
            lambda run: dict(enumerate(run["steps"])),
        ),
        (
            "Test tasks, with few examples",
            f"Adapted on the first examples of each class alone, at the chosen rate and step. {band}",
            "support examples per class" if metric == "accuracy" else "support examples",
            lambda run: {int(count): score for count, score in run["shots"].items()},
        ),
    ]
    target = result["target"]["validation"]
    plots, missing = [], []
    for number, (heading, text, label, points) in enumerate(described):
        lines = {row["algorithm"]: _over_seeds(row["runs"], points) for row in result["algorithms"]}
        lines = {name: line for name, line in lines.items() if line}
        if lines:
            figure = _figure(lines, label, metric, target if number == 0 else None)
            plots.append(Plot.of(heading, text, figure))
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


def _figure(lines: Mapping[str, Sequence[tuple[float, float, float]]], label: str, metric: str, target: float | None) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4))
    axes = figure.subplots()
    for name, line in lines.items():
        x, mean, sd = (np.array(part) for part in zip(*line, strict=True))
        axes.plot(x, mean, "o-", ms=4, label=name)
        axes.fill_between(x, mean - sd, mean + sd, alpha=0.15, color=axes.lines[-1].get_color())
    if target is not None:
        axes.axhline(target, color="0.6", ls="--", lw=1, label="target")
    axes.set(xlabel=label, ylabel=metric)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return figure
