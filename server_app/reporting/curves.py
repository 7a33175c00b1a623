"""The curves of a report: how the clients' scores changed from round to round, and from step to step of adaptation."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from quickbloom.common.metric import Metric
from quickbloom.server_app.reporting.drawing import QUIET, SERIES, every, few_numbers, picture, possible, style, whole_numbers
from quickbloom.server_app.reporting.page import Fold, Part, Picture, Table, Text
from quickbloom.server_app.reporting.run_record import RunFacts

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def learning(run: RunFacts) -> list[Part]:
    if not run.rounds:
        return []
    rounds = [record["round"] for record in run.rounds]
    losses = [record["train"]["loss"] for record in run.rounds]
    losses = [math.nan if loss is None else loss for loss in losses]

    def train(axes: "Axes") -> None:
        axes.plot(rounds, losses, color=SERIES[0], lw=1.3)
        axes.set(xlabel="round", ylabel="query loss after adaptation")
        whole_numbers(axes)

    known = [loss for loss in losses if math.isfinite(loss)]
    told = f"from {known[0]:.3g} in the first round to {known[-1]:.3g} in the last" if known else "never finite"
    parts: list[Part] = [Text("Nothing is smoothed.")]
    if run.evaluations:
        parts += [_validation(run), *_by_hours(run)]
    return [*parts, picture("Loss of the training clients", told + ".", train)]


def _validation(run: RunFacts) -> Picture:
    metric = run.metric
    numbers, before, after, _ = zip(*run.evaluations, strict=True)
    last = f"before {metric.score(before[-1])}, after {metric.score(after[-1])}"
    text = f"in round {numbers[0]} after adaptation {metric.score(after[0])}; in round {numbers[-1]} {last}."

    def draw(axes: "Axes") -> None:
        _before_and_after(axes, numbers, before, after, metric)
        axes.set(xlabel="round")
        whole_numbers(axes)

    return picture(f"Validation clients: {metric.axis}", text, draw)


def _by_hours(run: RunFacts) -> list[Picture]:
    """The same against virtual time: when the model that was scored was there."""
    metric = run.metric
    known = [(run.hours[number], before, after) for number, before, after, _ in run.evaluations if number in run.hours]
    if not known:
        return []
    hours, before, after = zip(*known, strict=True)

    def draw(axes: "Axes") -> None:
        _before_and_after(axes, hours, before, after, metric)
        axes.set(xlabel="virtual hours", xlim=(0, None))
        few_numbers(axes)

    text = f"after {hours[0]:.3g} virtual hours {metric.score(after[0])}; after {hours[-1]:.3g} {metric.score(after[-1])}."
    return [picture(f"Validation clients by virtual time: {metric.axis}", text, draw)]


def _before_and_after(
    axes: "Axes", places: Sequence[float], before: Sequence[float], after: Sequence[float], metric: Metric
) -> None:
    for i, (values, label) in enumerate(((after, "after (best step)"), (before, "before"))):
        line = {**style(i), "color": QUIET} if i else style(i)
        axes.plot(places, metric.scaled(values), label=label, markevery=every(len(places)), **line)
    axes.set(ylabel=metric.axis)
    axes.legend()


def adaptation(run: RunFacts) -> list[Part]:
    if not run.summary:
        return []
    splits = [split for split in ("test", "validation", "seen") if run.summary.get(split)]
    if not splits:
        return []
    metric = run.metric
    scored = {split: run.summary[split][metric.name] for split in splits}
    steps, chosen = run.summary[splits[0]]["steps"], run.summary["chosen"]["adapt_steps"]

    def draw(axes: "Axes") -> None:
        axes.axvline(chosen, color=QUIET, ls=":", lw=1.2, label="chosen step")
        for i, (split, scores) in enumerate(scored.items()):
            mean, half = (metric.scaled(scores[part]) for part in ("mean", "ci95"))
            axes.plot(steps, mean, label=split, markevery=every(len(steps)), **style(i))
            low, high = ([m + sign * (0 if math.isnan(h) else h) for m, h in zip(mean, half, strict=True)] for sign in (-1, 1))
            axes.fill_between(steps, possible(low, metric), possible(high, metric), color=SERIES[i], alpha=0.15, lw=0)
        worst = metric.scaled(scored[splits[0]]["worst10"])
        axes.plot(steps, worst, color=SERIES[0], ls="--", lw=1.2, label=f"{splits[0]}, worst 10 %")
        axes.set(xlabel="steps of adaptation", ylabel=metric.axis)
        axes.legend()
        whole_numbers(axes)

    first = scored[splits[0]]["mean"]
    told = ", ".join(f"{metric.score(first[k])} after {k}" for k in sorted({0, 1, chosen, steps[-1]}) if k < len(first))
    made: list[Part] = [Text("Mean over the clients; the band is its 95 % interval.")]
    made.append(picture("Step by step", f"{splits[0]} clients, steps of adaptation: {told}.", draw))
    if shots := _shots(run):
        made.append(shots)
    headings = ["steps", *(f"{split}{part}" for split in splits for part in ("", ", worst 10 %"))]
    rows = [
        [
            str(k),
            *(
                cell
                for s in scored.values()
                for cell in (metric.score(s["mean"][k], s["ci95"][k]), metric.score(s["worst10"][k]))
            ),
        ]
        for k in steps
    ]
    return [
        *made,
        Fold("Every step as a table", [Table(f"{metric.title.capitalize()} after each step", headings, rows)]),
    ]


def _shots(run: RunFacts) -> Picture | None:
    shots = (run.summary or {}).get("shots")
    if not shots:
        return None
    metric = run.metric
    numbers, scores = shots["shots"], shots[metric.name]

    def draw(axes: "Axes") -> None:
        mean = metric.scaled(scores["mean"])
        half = [0 if math.isnan(value) else value for value in metric.scaled(scores["ci95"])]
        axes.errorbar(numbers, mean, yerr=half, capsize=3, **style(0))
        axes.set(xlabel="support examples" + " per class" * (metric.kind == "classification"), ylabel=metric.axis)
        axes.set_xticks(numbers)

    told = ", ".join(f"{metric.score(m)} with {k}" for k, m in zip(numbers, scores["mean"], strict=True))
    return picture("Test clients with few examples", f"{told}.", draw)
