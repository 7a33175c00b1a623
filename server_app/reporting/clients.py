"""For whom it works: the spread over unseen clients, and the worst tenth of them by name."""

import math
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from quickbloom.common.formatting import counted
from quickbloom.common.metric import Metric
from quickbloom.server_app.reporting.drawing import QUIET, SERIES, picture, short
from quickbloom.server_app.reporting.page import LISTED, Fold, Part, Picture, Table, Text
from quickbloom.server_app.reporting.result_table import USERS_HEADINGS, users_rows
from quickbloom.server_app.reporting.run_record import Client, RunFacts, tenth

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMED = 40
"""Clients that a picture has a line and a name for."""


def clients_of(run: RunFacts) -> list[Part]:
    clients = run.clients
    if not clients:
        return []
    metric = run.metric
    lost = sum(metric.is_better(client.before, client.after) for client in clients)
    headings = ("client", "before", "after", "support examples", "test examples")

    def rows(listed: Sequence[Client]) -> list[list[str]]:
        return [
            [
                client.task,
                metric.score(client.before),
                metric.score(client.after),
                str(client.support),
                str(client.test),
            ]
            for client in listed
        ]

    worst = list(tenth(clients))
    verb = "is" if lost == 1 else "are"
    told = f"{lost} of {counted(len(clients), 'unseen client')} {verb} worse off after adaptation than before."
    parts: list[Part] = [Text(told)]
    parts += [_distribution(clients, metric)] if len(clients) > 1 else []
    parts += [_one_by_one(clients, metric)] if len(clients) <= _NAMED else []
    note = f" (the first {LISTED} of {len(worst)}; per_task.csv has all)" if len(worst) > LISTED else ""
    parts.append(Table(f"The worst 10 % after adaptation{note}", headings, rows(worst[:LISTED])))
    if len(clients) > len(worst):
        note = f"the worst {LISTED} of {len(clients)}; per_task.csv has all" if len(clients) > LISTED else f"all {len(clients)}"
        parts.append(
            Fold(f"Every unseen client ({note})", [Table("Unseen clients, the worst first", headings, rows(clients[:LISTED]))])
        )
    return parts


def seen_users_of(run: RunFacts) -> list[Part]:
    """Training clients on test examples of their own, beside the unseen ones."""
    rows = users_rows(run.summary) if run.summary else []
    if not rows:
        return []
    said = (
        "Seen clients took part in training. Each was scored once, after the last round, on test examples of its own that no "
    )
    said += "gradient saw, from what it keeps on its node; they chose nothing."
    parts: list[Part] = [Text(said), Table(f"Unseen and seen clients: {run.metric.heading}", USERS_HEADINGS, rows)]
    clients, metric = run.seen_clients, run.metric
    if clients:
        worst = list(tenth(clients))[:LISTED]
        cells = [
            [one.task, metric.score(one.before), metric.score(one.after), str(one.support), str(one.test)] for one in worst
        ]
        headings = ("client", "before", "after", "examples it adapts on", "test examples")
        parts.append(Fold("The worst 10 % of the seen clients", [Table("Seen clients, the worst first", headings, cells)]))
    return parts


def _distribution(clients: Sequence[Client], metric: Metric) -> Picture:
    before, after = ([v for v in metric.scaled(values) if math.isfinite(v)] for values in _before_after(clients))

    def draw(axes: "Axes") -> None:
        import numpy as np

        both = before + after or [0.0]
        edges: Any = np.histogram_bin_edges(
            both, bins=min(20, max(5, len(clients) // 4)), range=(0, 100) if metric.share else None
        )
        axes.hist(before, bins=edges, histtype="stepfilled", color=QUIET, alpha=0.35, label="before")
        axes.hist(after, bins=edges, histtype="step", color=SERIES[0], lw=2, label="after")
        axes.set(xlabel=metric.axis, ylabel="clients")
        axes.legend()

    told = [
        f"median {metric.score(median(v) / metric.scale)} {when}" for v, when in ((before, "before"), (after, "after")) if v
    ]
    return picture("How many clients end where", f"{counted(len(clients), 'unseen client')}, {', '.join(told)}.", draw)


def _one_by_one(clients: Sequence[Client], metric: Metric) -> Picture:
    before, after = (metric.scaled(values) for values in _before_after(clients))

    def draw(axes: "Axes") -> None:
        axes.hlines(range(len(clients)), before, after, color=QUIET, lw=1)
        axes.plot(before, range(len(clients)), "s", color=QUIET, label="before")
        axes.plot(after, range(len(clients)), "o", color=SERIES[0], label="after")
        axes.set_yticks(range(len(clients)), [short(client.task) for client in clients])
        axes.invert_yaxis()
        axes.set(xlabel=metric.axis)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)

    text = f"the worst is {short(clients[0].task)}, {metric.change(clients[0].before, clients[0].after)}; the table has all."
    return picture("Client by client", text, draw, height=max(2.6, 0.9 + 0.21 * len(clients)))


def _before_after(clients: Sequence[Client]) -> tuple[list[float], list[float]]:
    return [client.before for client in clients], [client.after for client in clients]
