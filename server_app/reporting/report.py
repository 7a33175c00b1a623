"""One self-contained HTML file about a run: what it learned, for whom, at what price, and how to do it again."""

import json
import math
import shlex
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from quickbloom.common.baselines.scoring import CONTENDERS
from quickbloom.common.errors import DataError
from quickbloom.common.formatting import counted, duration, size
from quickbloom.common.metric import LOSS, Metric, named
from quickbloom.server_app.reporting.against_baselines import title_of, verdict
from quickbloom.server_app.reporting.asynchronous import asynchronous
from quickbloom.server_app.reporting.clients import clients_of, seen_users_of
from quickbloom.server_app.reporting.curves import adaptation, learning
from quickbloom.server_app.reporting.drawing import SERIES, every, picture, style, whole_numbers
from quickbloom.server_app.reporting.many_runs import sections_of_runs
from quickbloom.server_app.reporting.page import (
    LISTED,
    Code,
    Figures,
    Fold,
    Part,
    Section,
    Table,
    Text,
    require_packages,
    write_page,
)
from quickbloom.server_app.reporting.partition import partition
from quickbloom.server_app.reporting.result_table import ONE_TASK, kept_line, own_unit, privacy_line
from quickbloom.server_app.reporting.run_record import RunFacts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TROUBLES = 200


def write_report(run_dirs: Path | Sequence[Path], output: Path | None) -> Path:
    """Write the report of a run, or of several beside each other, and return its path. Raises DataError.

    `output`: by default report.html, of one run in its directory, of several in the current one.
    """
    require_packages()
    paths = [run_dirs] if isinstance(run_dirs, Path) else list(run_dirs)
    runs = [RunFacts.read(path) for path in paths]
    try:
        if len(runs) == 1:
            return write_page(output or paths[0] / "report.html", runs[0].title, _lead(runs[0]), _sections(runs[0]))
        lead = f"{len(runs)} runs beside each other."
        return write_page(output or Path("report.html"), "Runs compared", lead, sections_of_runs(runs))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        names = ", ".join(f"'{path}'" for path in paths)
        raise DataError(
            f"files of {names} lack what a report needs ({error!r}): they are damaged or of another release"
        ) from None


def _lead(run: RunFacts) -> str:
    total, done = int(run.config["rounds"]), len(run.rounds)
    if run.summary:
        tasks = run.summary["tasks"]
        trained, chose = (counted(tasks[split], "client") for split in ("train", "validation"))
        begin = f"{counted(run.summary['rounds'], 'round')} of federated training on {trained}, in {duration(run.seconds)}. "
        what = "A client is one task: a user, a writer, a hospital."
        if not run.summary["test"]:
            return f"{begin}{what}"
        return (
            f"{begin}{chose} chose the rate and {tasks['test']} unseen ones tested the result: none of these took part in "
            f"training. {what}"
        )
    return f"The run has not finished: {done} rounds so far, of {total}."


def _sections(run: RunFacts) -> list[Section]:
    made = [
        Section("Result", _result(run)),
        Section("Warnings", [Text(sentence) for sentence in run.warnings]),
        Section("Seen users", seen_users_of(run)),
        Section("Baselines", _baselines(run)),
        Section("Learning", learning(run)),
        Section("Asynchronous training", asynchronous(run)),
        Section("Adaptation", adaptation(run)),
        Section("Clients", clients_of(run)),
        Section("Partition", partition(run)),
        Section("Nodes", _nodes(run)),
        Section("Cost", _cost(run)),
        Section("Configuration", _configuration(run)),
        Section("Repeat it", _repeat(run)),
    ]
    return [section for section in made if section.parts]


def _baselines(run: RunFacts) -> list[Part]:
    """Every score of the model and of all baselines on the test clients, and on seen ones."""
    summary = run.summary or {}
    known = {"test client": summary.get("baselines"), "seen client": (summary.get("seen") or {}).get("baselines")}
    return [part for who, content in known.items() if content for part in _beside(content, who)]


def _beside(content: dict[str, Any], who: str) -> list[Part]:
    metrics = [named(name) for name, found in content["scores"].items() if found]
    rows = [
        [
            title_of(contender, metrics[0]),
            *(_mean_of(content["scores"][metric.name].get(contender), metric) for metric in metrics),
        ]
        for contender in CONTENDERS
        if any(contender in content["scores"][metric.name] for metric in metrics)
    ]
    said = verdict(content)
    of = "Of seen clients " if who == "seen client" else ""
    parts: list[Part] = [Text(f"{of}{said if of else f'{said[0].upper()}{said[1:]}'}.")] if said else []
    caption = f"The model and the baselines on the same {counted(content['tasks'], who)}, means over clients"
    return [*parts, Table(caption, ("", *(metric.title for metric in metrics)), rows)]


def _mean_of(cell: dict[str, Any] | None, metric: Metric) -> str:
    return metric.score(cell["mean"]) if cell else "-"


# ---- what came out


def _result(run: RunFacts) -> list[Part]:
    metric, name = run.metric, run.metric.title_for(run.target)
    if not run.summary:
        if not run.evaluations:
            return [Text("Nothing was evaluated yet.")]
        number, before, after, tasks = run.evaluations[-1]
        note = f"in round {number}, on {counted(tasks, 'validation client')}; the test comes after the last round"
        return [Figures([(f"{name}, provisional", metric.change(before, after), note)])]
    summary, test = run.summary, run.summary["test"]
    parts: list[Part] = []
    if test:
        step, scores = summary["chosen"]["adapt_steps"], test[metric.name]
        tasks, before, after = summary["tasks"]["test"], scores["mean"][0], scores["mean"][step]
        half = _half(scores["ci95"][step])
        interval = f"{metric.margin(half)}, 95 % interval over {counted(tasks, 'client')}" if half is not None else ONE_TASK
        steps = counted(step, "step")
        parts.append(
            Figures(
                [
                    (f"{name} for unseen clients, before → after {steps}", metric.change(before, after), interval),
                    ("worst 10 % of them, after", metric.score(scores["worst10"][step]), "their mean"),
                    ("training took", _took(run), f"{size(run.traffic['up'])} up, {size(run.traffic['down'])} down"),
                ]
            )
        )
    chosen = "chosen on the validation clients" if summary["validation"] else "there were no validation clients to choose on"
    adapted = "Every client adapted the model on its support examples and was scored on its test examples, "
    parts.append(Text(f"{adapted}with rate {summary['chosen']['adapt_lr']:g} ({chosen})."))
    if kept := kept_line(summary):
        parts.append(Text(f"{kept[0].upper()}{kept[1:]}."))
    if edge := summary.get("edge"):
        parts.append(Text(f"{edge[0].upper()}{edge[1:]}."))
    if rows := _rows(run):
        headings = ("clients", "measure", "before", "after", "worst 10 % after")
        parts.append(Table("Held-out clients, before and after", headings, rows))
    if any(
        _half(scores["ci95"][0]) is None for scores in (summary[s][metric.name] for s in ("validation", "test") if summary[s])
    ):
        parts.append(Text(f"A single client has {ONE_TASK}."))
    if said := own_unit(metric, str(run.config["dataset"])):
        parts.append(Text(f"{said.capitalize()}."))
    if summary.get("privacy"):
        parts.append(Text(privacy_line(summary["privacy"]).capitalize() + "."))
    return parts


def _took(run: RunFacts) -> str:
    """In the time of the devices, which is virtual where they are simulated."""
    return f"{max(run.hours.values()):.3g} virtual hours" if run.hours else duration(run.seconds)


def _rows(run: RunFacts) -> list[list[str]]:
    assert run.summary
    rows = []
    for split in ("validation", "test"):
        for metric in (run.metric,) if run.metric.is_loss else (run.metric, LOSS):
            if scores := (run.summary[split] or {}).get(metric.name):
                step = run.summary["chosen"]["adapt_steps"]
                cells = [metric.score(scores["mean"][i], scores["ci95"][i]) for i in (0, step)]
                named = metric.title_for(run.target)
                rows.append([f"{split} ({run.summary['tasks'][split]})", named, *cells, metric.score(scores["worst10"][step])])
    return rows


# ---- who took part


def _nodes(run: RunFacts) -> list[Part]:
    parts: list[Part] = []
    if run.nodes:
        known = any(node.trained is not None for node in run.nodes.values())
        headings = ["node", *(["rounds"] if known else []), "failures", "late answers", "rounds away"]
        rows = [
            [name, *([str(node.trained)] if known else []), str(node.failures), str(node.late), str(node.away)]
            for name, node in run.nodes.items()
        ]
        note = "" if len(rows) <= LISTED else f", the first {LISTED} of {len(rows)}"
        parts.append(
            Table(f"Nodes in {len(run.rounds)} rounds{note}: rounds with a usable answer to training", headings, rows[:LISTED])
        )
    if joined := [record for record in run.rounds if record.get("joined")]:
        nodes, tasks = (sum(len(record["joined"][part]) for record in joined) for part in ("nodes", "tasks"))
        where = ", ".join(str(record["round"]) for record in joined[:LISTED])
        beyond = f" and {len(joined) - LISTED} more" if len(joined) > LISTED else ""
        came = f"{counted(nodes, 'node')} joined during the run with {counted(tasks, 'task')}"
        parts.append(Text(f"{came}, in round {where}{beyond}."))
    if run.troubles:
        told = [[t.who, t.reason, str(t.times), str(t.first), str(t.last)] for t in run.troubles[:_TROUBLES]]
        more = len(run.troubles) - len(told)
        rest = f" (the {len(told)} most frequent; history.jsonl has {more} more)" if more else ""
        parts.append(Table(f"Failures{rest}", ("who", "what", "times", "first round", "last round"), told))
    elif run.rounds:
        parts.append(Text("Nothing failed in any round."))
    skipped = [record["round"] for record in run.rounds if "skipped" in record]
    if skipped:
        parts.append(Text(f"{len(skipped)} rounds were skipped for want of answers, the first of them round {skipped[0]}."))
    return parts


# ---- at what price


def _cost(run: RunFacts) -> list[Part]:
    if not run.rounds:
        return []
    seconds = [record["seconds"] for record in run.rounds]
    numbers = [record["round"] for record in run.rounds]
    ways = {way: [record["bytes"][way] for record in run.rounds] for way in ("up", "down")}
    rows = [
        ["seconds", f"{run.seconds:.4g}", f"{median(seconds):.3g}"],
        *_virtual(run),
        ["bytes up from clients", size(run.traffic["up"]), size(median(ways["up"]))],
        ["bytes down to clients", size(run.traffic["down"]), size(median(ways["down"]))],
    ]
    if run.summary:
        rows.append(["processor seconds of the server", f"{run.summary['seconds']['cpu']:.4g}", ""])

    def draw_bytes(axes: "Axes") -> None:
        for i, (way, counts) in enumerate(ways.items()):
            axes.plot(
                numbers, [total / 1e6 for total in accumulate(counts)], label=way, markevery=every(len(numbers)), **style(i)
            )
        axes.set(xlabel="round", ylabel="MB so far", ylim=(0, None))
        axes.legend()
        whole_numbers(axes)

    def draw_seconds(axes: "Axes") -> None:
        axes.plot(numbers, seconds, color=SERIES[0], lw=1.2)
        axes.set(xlabel="round", ylabel="seconds of the round", ylim=(0, None))
        whole_numbers(axes)

    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    return [
        Table("Price of the run: in all, and the median of a round", ("", "in all", "a round"), rows),
        picture("Bytes", f"{size(sum(ways['up']))} up and {size(sum(ways['down']))} down in the rounds.", draw_bytes),
        picture(
            "Time",
            f"median {median(seconds):.3g} s; slowest round {numbers[slowest]} with {seconds[slowest]:.3g} s.",
            draw_seconds,
        ),
    ]


def _virtual(run: RunFacts) -> list[list[str]]:
    """The virtual time of a run with simulated devices, in all and of a round."""
    if not run.hours:
        return []
    ends = sorted(run.hours.values())
    return [["virtual hours", f"{ends[-1]:.4g}", f"{median(np.diff([0.0, *ends])):.3g}"]]


# ---- how to do it again


def _configuration(run: RunFacts) -> list[Part]:
    rows = [[key, _value(value), _value(default)] for key, (value, default) in run.changed().items()]
    everything = "\n".join(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in run.config.items())
    parts: list[Part] = [Table("Settings that matter here", ("setting", "value", "by default"), rows)]
    return [*parts, Fold(f"All {len(run.config)} settings", [Code("All settings", everything)])]


def _value(value: Any) -> str:
    return "-" if value is None else '""' if value == "" else str(value)


def _repeat(run: RunFacts) -> list[Part]:
    parts: list[Part] = [Code("Command that repeats the run", run.command())]
    if run.config["dataset"] == "own" and not run.config.get("own.path"):
        parts.append(Text("The data are files of the nodes' own, which this command does not name."))
    if run.summary:
        versions = ", ".join(f"{name} {version}" for name, version in run.summary["versions"].items())
        noise = " but for the noise of privacy, which is never the same" if run.summary.get("privacy") else ""
        parts.append(Text(f"Made with {versions}. With these on the same kind of machine the result is the same{noise}."))
        if run.summary["resumed"]:
            parts.append(Text(f"The run was cut off and resumed {run.summary['resumed']} times; that changes nothing."))
    else:
        parts += [
            Text("To go on with this one if it was cut off:"),
            Code("Command that goes on", shlex.join(["quickbloom", "run", "--resume", str(run.path)])),
        ]
    return parts


def _half(value: float) -> float | None:
    return value if math.isfinite(value) else None
