"""One self-contained HTML file about a run: the result, the learning curve, the adaptation curve, the spread over tasks."""

import csv
import json
from pathlib import Path
from typing import Any

from common.errors import DataError
from server_app.history import read_history
from server_app.live import privacy_line
from server_app.page import Plot, nan_for_null, require_packages, write_page

_PAGE = """
{% block result %}
{% if summary %}
<p>Held-out tasks took no part in training: each adapted on its support examples and was scored on its test examples.
Rate {{ summary.chosen.adapt_lr }}, {{ summary.chosen.adapt_steps }} steps
({{ "chosen on the validation tasks" if summary.validation else "there were no validation tasks to choose on" }}).</p>
<table><tr><th>tasks</th><th>measure</th><th>before</th><th>after</th><th>worst 10 % after</th></tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>
{% if summary.privacy %}<p>{{ privacy(summary.privacy) }}</p>{% endif %}
{% else %}<p class="note">The run has not finished: {{ num_rounds }} rounds so far.</p>{% endif %}
{% endblock %}
{% block details %}
<details><summary>Settings</summary><pre>{{ config }}</pre></details>
{% if summary %}<details><summary>summary.json</summary><pre>{{ summary_text }}</pre></details>{% endif %}
{% endblock %}
"""


def write_report(run_dir: Path, output: Path | None) -> Path:
    """Write the report of `run_dir` to `output` (default: report.html in it) and return its path. Raises DataError."""
    require_packages()
    if not (run_dir / "config.json").is_file():
        raise DataError(f"'{run_dir}' is no directory of a run: it holds no config.json")
    config = json.loads((run_dir / "config.json").read_text())
    rounds = nan_for_null(read_history(run_dir))
    file = run_dir / "summary.json"
    text = file.read_text() if file.is_file() else "null"
    summary: dict[str, Any] | None = nan_for_null(json.loads(text))
    return write_page(
        output or run_dir / "report.html",
        _PAGE,
        title=f"{config['algorithm']} on {config['dataset']}, seed {config['seed']}",
        summary=summary,
        summary_text=text,
        rows=_rows(summary) if summary else [],
        privacy=lambda account: privacy_line(account).capitalize() + ".",
        num_rounds=len(rounds),
        plots=_plots(rounds, summary, run_dir),
        failures=[f"round {r['round']}: {f['who']}: {f['reason']}" for r in rounds for f in r["failures"]],
        config="\n".join(f"{key} = {json.dumps(value)}" for key, value in config.items()),
    )


def _rows(summary: dict[str, Any]) -> list[list[str]]:
    rows = []
    for split in ("validation", "test"):
        for name in ("accuracy", "mse", "loss"):
            scores = (summary[split] or {}).get(name)
            if scores:
                step, scale = summary["chosen"]["adapt_steps"], 100 if name == "accuracy" else 1
                cells = [f"{scale * scores['mean'][i]:.4g} ± {scale * scores['ci95'][i]:.2g}" for i in (0, step)]
                rows.append([split, name + " in %" * (scale == 100), *cells, f"{scale * scores['worst10'][step]:.4g}"])
    return rows


def _plots(rounds: list[dict[str, Any]], summary: dict[str, Any] | None, run_dir: Path) -> list[Plot]:
    """Every plot that there are numbers for. Nothing is smoothed."""
    from matplotlib.figure import Figure

    plots = []
    if rounds:
        figure = Figure(figsize=(9, 3.2))
        left, right = figure.subplots(1, 2)
        left.plot([r["round"] for r in rounds], [r["train"]["loss"] for r in rounds], lw=1)
        left.set(xlabel="round", ylabel="query loss after adaptation", title="training tasks")
        scored = [r for r in rounds if "validation" in r]
        if scored:
            name = "accuracy" if "accuracy" in scored[0]["validation"] else "mse"
            curves = [r["validation"][name] for r in scored]
            best = max if name == "accuracy" else min
            right.plot([r["round"] for r in scored], [c[0] for c in curves], "o-", label="before", color="0.6")
            right.plot([r["round"] for r in scored], [best(c[1:]) for c in curves], "o-", label="after (best step)")
            right.set(xlabel="round", ylabel=name, title="validation tasks")
            right.legend()
        text = "Training tasks in every round; validation tasks with the rate that was best in that round."
        plots.append(Plot.of("Learning curve", text, figure))
    if summary and summary["test"]:
        name = "accuracy" if "accuracy" in summary["test"] else "mse"
        figure = Figure(figsize=(6, 3.6))
        axes = figure.subplots()
        for split in ("validation", "test"):
            if summary[split]:
                steps, scores = summary[split]["steps"], summary[split][name]
                axes.errorbar(steps, scores["mean"], yerr=scores["ci95"], marker="o", capsize=3, label=split)
                axes.plot(steps, scores["worst10"], ":", color=axes.lines[-1].get_color(), label=f"{split}, worst 10 %")
        axes.axvline(summary["chosen"]["adapt_steps"], color="0.8", zorder=0)
        axes.set(xlabel="adaptation steps", ylabel=name)
        axes.legend()
        text = "Mean over held-out tasks with its 95 % half-width; grey line: the chosen number of steps."
        plots.append(Plot.of("Adaptation curve", text, figure))
        plots.append(_per_task(run_dir, name, summary["chosen"]["adapt_steps"]))
    return plots


def _per_task(run_dir: Path, name: str, step: int) -> Plot:
    from matplotlib.figure import Figure

    with (run_dir / "per_task.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    rows.sort(key=lambda row: float(row[f"{name}_step{step}"]))
    figure = Figure(figsize=(9, 3.2))
    axes = figure.subplots()
    before, after = ([float(row[f"{name}_step{i}"]) for row in rows] for i in (0, step))
    axes.vlines(range(len(rows)), before, after, color="0.8")
    axes.plot(before, "o", color="0.6", label="before")
    axes.plot(after, "o", label="after")
    axes.set(ylabel=name, xlabel="test tasks, sorted")
    axes.set_xticks(range(len(rows)), [row["task"] for row in rows] if len(rows) <= 40 else [""] * len(rows), rotation=90)
    axes.legend()
    text = "Before and after adaptation; each dot is one task that the model never saw in training."
    return Plot.of("Every test task", text, figure)
