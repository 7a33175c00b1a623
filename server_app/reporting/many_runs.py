"""Several runs beside each other: one table, their curves, what their settings differ in, and how to repeat each."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from quickbloom.common.config.parts import PRIVACY
from quickbloom.common.config.run import Scalar
from quickbloom.common.errors import DataError
from quickbloom.common.formatting import data_name, duration, size
from quickbloom.common.maths.intervals import half_width
from quickbloom.common.metric import ACCURACY, Metric
from quickbloom.server_app.reporting.drawing import LONGEST_NAME, every, few_numbers, picture, short, style, whole_numbers
from quickbloom.server_app.reporting.page import Code, Fold, Part, Section, Table, Text
from quickbloom.server_app.reporting.run_record import RunFacts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST = 24
"""Runs in one report: more lines cannot be told apart."""
_PLACES = ("output-dir", "resume-from", "data-dir")


def sections_of_runs(runs: Sequence[RunFacts]) -> list[Section]:
    """The page of several runs. Raises DataError where they cannot be compared."""
    if len(runs) > _MOST:
        raise DataError(f"a report compares at most {_MOST} runs, got {len(runs)}: give fewer directories")
    # A run in which nothing was scored yet fits beside all others.
    metrics = {run.metric: run for run in runs if run.evaluations or run.clients}
    if len(metrics) > 1:
        paths = " and ".join(f"'{run.path}' ({metric.name})" for metric, run in metrics.items())
        raise DataError(f"runs with different scores cannot be compared: {paths}; give runs that are scored alike")
    metric = next(iter(metrics), ACCURACY)
    labels = _labels(runs)
    made = [
        Section("Result", _result(runs, labels, metric)),
        Section("Curves", [*_learning(runs, labels, metric), *_adaptation(runs, labels, metric)]),
        Section("Clients", _clients(runs, labels, metric)),
        Section("Configuration", _configuration(runs, labels)),
        Section("Repeat them", [_repeat(run, label) for run, label in zip(runs, labels, strict=True)]),
    ]
    return [section for section in made if section.parts]


def _labels(runs: Sequence[RunFacts]) -> list[str]:
    """What tells the runs apart in few words: algorithm, data set, seed and mode as far as they differ, else a number."""
    words = [
        (str(c["algorithm"]), data_name(c), f"seed {c['seed']}", str(c.get("mode", "sync")))
        for c in (run.config for run in runs)
    ]
    told = [i for i, of_all in enumerate(zip(*words, strict=True)) if len(set(of_all)) > 1] or [0]
    names = [", ".join(of_one[i] for i in told) for of_one in words]
    return [f"{names[:i].count(name) + 1}: {name}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _result(runs: Sequence[RunFacts], labels: Sequence[str], metric: Metric) -> list[Part]:
    headings = ["run", "before", "after", "worst 10 %", "against the first", "rate x steps", "rounds"]
    headings += ["seconds", "bytes up", "bytes down", "failures", "directory"]
    rows = []
    for run, label in zip(runs, labels, strict=True):
        test, summary = (run.summary or {}).get("test"), run.summary
        if summary and test:
            step, scores = summary["chosen"]["adapt_steps"], test[metric.name]
            cells = [metric.score(scores["mean"][i], scores["ci95"][i]) for i in (0, step)]
            cells.append(metric.score(scores["worst10"][step]))
            cells += [_against(run, runs[0], metric), f"{summary['chosen']['adapt_lr']:g} x {step}", str(summary["rounds"])]
        else:
            cells = ["-"] * 5 + [f"{len(run.rounds)} of {run.config['rounds']}" if not summary else str(summary["rounds"])]
        failures = summary["failures"] if summary else sum(len(record["failures"]) for record in run.rounds)
        cells += [duration(run.seconds), size(run.traffic["up"]), size(run.traffic["down"]), str(failures), run.path.name]
        rows.append([label, *cells])
    what = metric.title_for(runs[0].target)
    parts: list[Part] = [Table(f"Unseen clients: {what}, mean with its 95 % interval over clients", headings, rows)]
    parts.append(
        Text(
            "Against the first: mean difference over the clients that both runs tested, with its 95 % interval. It says "
            "nothing of other seeds: for those, and for rates chosen for all alike, use `quickbloom compare`."
        )
    )
    if len({frozenset(client.task for client in run.clients) for run in runs if run.clients}) > 1:
        parts.append(
            Text("These runs tested different clients (a seed decides which): their means differ for that reason, too.")
        )
    return parts


def _against(run: RunFacts, first: RunFacts, metric: Metric) -> str:
    """The mean difference over the test tasks of both runs, each with itself."""
    if run is first or _data(run) != _data(first):
        return "-"
    others = {client.task: client.after for client in first.clients}
    gaps = np.array([client.after - others[client.task] for client in run.clients if client.task in others])
    if len(gaps) < 2 or not np.isfinite(gaps).all():
        return "-"
    return ("+" if gaps.mean() >= 0 else "") + metric.score(float(gaps.mean()), float(half_width(gaps)))


def _data(run: RunFacts) -> tuple[object, object]:
    return run.config["dataset"], run.config.get("own.path")


def _learning(runs: Sequence[RunFacts], labels: Sequence[str], metric: Metric) -> list[Part]:
    known = [(i, run.evaluations) for i, run in enumerate(runs) if run.evaluations]
    if not known:
        return []

    def draw(axes: "Axes") -> None:
        for i, found in known:
            _line(axes, [entry[0] for entry in found], metric.scaled(entry[2] for entry in found), i, labels[i])
        axes.set(xlabel="round", ylabel=metric.axis)
        _legend(axes)
        whole_numbers(axes)

    told = "; ".join(f"{labels[i]}: {metric.score(found[-1][2])} in round {found[-1][0]}" for i, found in known)
    return [
        Text("Validation clients are scored after the step that was best in the round. Nothing is smoothed."),
        picture("Validation clients", f"{told}.", draw),
        *_by_hours(runs, labels, metric),
    ]


def _by_hours(runs: Sequence[RunFacts], labels: Sequence[str], metric: Metric) -> list[Part]:
    """The same against virtual time, of the runs that have it."""
    known = {
        i: [(run.hours[entry[0]], entry[2]) for entry in run.evaluations if entry[0] in run.hours] for i, run in enumerate(runs)
    }
    known = {i: found for i, found in known.items() if found}
    if not known:
        return []

    def draw(axes: "Axes") -> None:
        for i, found in known.items():
            hours, after = zip(*found, strict=True)
            _line(axes, hours, metric.scaled(after), i, labels[i])
        axes.set(xlabel="virtual hours", ylabel=metric.axis, xlim=(0, None))
        few_numbers(axes)
        _legend(axes)

    told = "; ".join(f"{labels[i]}: {metric.score(found[-1][1])} after {found[-1][0]:.3g}" for i, found in known.items())
    return [picture("Validation clients by virtual time", f"{told} virtual hours.", draw)]


def _line(axes: "Axes", places: Sequence[float], scores: Sequence[float], number: int, label: str) -> None:
    axes.plot(places, scores, label=_in_legend(label), markevery=every(len(places)), **style(number))


def _adaptation(runs: Sequence[RunFacts], labels: Sequence[str], metric: Metric) -> list[Part]:
    known = [(i, run.summary["test"]) for i, run in enumerate(runs) if run.summary and run.summary["test"]]
    if not known:
        return []

    def draw(axes: "Axes") -> None:
        for i, test in known:
            mean = metric.scaled(test[metric.name]["mean"])
            axes.plot(test["steps"], mean, label=_in_legend(labels[i]), markevery=every(len(mean)), **style(i))
        axes.set(xlabel="steps of adaptation", ylabel=metric.axis)
        _legend(axes)
        whole_numbers(axes)

    told = "; ".join(f"{labels[i]}: {metric.change(t[metric.name]['mean'][0], t[metric.name]['mean'][-1])}" for i, t in known)
    return [picture("Unseen clients, step by step", f"{told} after the last step.", draw)]


def _clients(runs: Sequence[RunFacts], labels: Sequence[str], metric: Metric) -> list[Part]:
    after = [[v for v in metric.scaled(c.after for c in run.clients) if math.isfinite(v)] for run in runs]
    known = [i for i, values in enumerate(after) if len(values) > 1]
    if not known:
        return []

    def draw(axes: "Axes") -> None:
        boxes = axes.boxplot([after[i] for i in known], orientation="horizontal", widths=0.6, patch_artist=True)
        for i, box, middle in zip(known, boxes["boxes"], boxes["medians"], strict=True):
            box.set(facecolor="none", edgecolor=style(i)["color"], linewidth=1.8)
            middle.set(color=style(i)["color"], linewidth=2.5)
        axes.set_yticks(range(1, len(known) + 1), [_in_legend(labels[i]) for i in known])
        axes.invert_yaxis()
        axes.set(xlabel=metric.axis)

    quartiles = {i: [metric.score(float(q) / metric.scale) for q in np.quantile(after[i], (0.25, 0.5, 0.75))] for i in known}
    told = "; ".join(f"{labels[i]}: quartiles {', '.join(quartiles[i])}" for i in known)
    text = "Box: the middle half of the clients with its median; whiskers: at most 1.5 boxes; circles: clients beyond."
    return [Text(text), picture("Unseen clients after adaptation", f"{told}.", draw, height=1.4 + 0.4 * len(known))]


def _configuration(runs: Sequence[RunFacts], labels: Sequence[str]) -> list[Part]:
    keys = dict.fromkeys(key for run in runs for key in run.config if key not in _PLACES)
    rows = [[key, *(_setting(key, run.config) for run in runs)] for key in keys]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    return (
        [Table("Settings that differ", ["setting", *labels], differing)] if differing else [Text("All settings are the same.")]
    )


def _setting(key: str, config: Mapping[str, Scalar]) -> str:
    """The value of a setting, "-" where the run makes no use of it: a setting of another algorithm, say."""
    table = key.rpartition(".")[0]
    used = not table or table in (config["algorithm"], config["dataset"], config["model"], PRIVACY)
    return str(config.get(key, "-")) if used else "-"


def _repeat(run: RunFacts, label: str) -> Part:
    return Fold(label, [Code(f"Command that repeats {label}", run.command())])


def _in_legend(label: str) -> str:
    return short(label, LONGEST_NAME + 8)


def _legend(axes: "Axes") -> None:
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
