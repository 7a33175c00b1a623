"""The advice for a person: lines and tables of a terminal, and advice.html."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from quickbloom.common.baselines.scoring import BASELINES
from quickbloom.common.errors import as_told
from quickbloom.common.formatting import counted, duration, size
from quickbloom.common.metric import Metric, named
from quickbloom.server_app.advising.advice import decision
from quickbloom.server_app.reporting.against_baselines import in_words
from quickbloom.server_app.reporting.drawing import picture, style
from quickbloom.server_app.reporting.page import Code, Part, Section, Text, require_packages, write_page
from quickbloom.server_app.reporting.page import Table as PageTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_NAMED = 5
_FEW_TO_CHOOSE_BY = 5


def table(found: Mapping[str, Any]) -> Table:
    """Return everything that was tried, for a terminal."""
    metric = named(found["metric"])
    shown = Table(title=f"what was tried: {metric.title}")
    for heading, side in zip(_headings(found), ("left", "right", "right", "right"), strict=True):
        shown.add_column(heading, justify=side)  # type: ignore[arg-type]  # rich names its sides by literals
    for row in _rows(found, metric):
        shown.add_row(*row)
    return shown


def lines(found: Mapping[str, Any]) -> list[str]:
    """Return the advice in sentences."""
    metric = named(found["metric"])
    said = [f"{decision(found, metric)}."]
    for name, other in (("own rows", found["own_rows"]), ("one model", found["one_model"])):
        gain = found["gains"].get(name)
        if other and gain and gain["mean"] is not None:
            said.append(_gain(gain, other, metric, found))
    said += [one for one in (_shots(found, metric), _losers(found, metric)) if one]
    cost = found["cost"]
    if found["kind"] == "model":
        said.append(
            f"Cost: {counted(cost['rounds'], 'round')}, at most {size(cost['bytes_per_node'])} to and from each node in all; "
            f"here a run took {duration(cost['seconds'])}."
        )
    if found["few_users"]:
        said.append(
            f"There are only {counted(found['users']['told'], 'user')}: each was held out once, and the choice has seen all of "
            "these scores, so new users may fare worse."
        )
    elif found["users"]["chose"] < _FEW_TO_CHOOSE_BY:
        said.append(f"Only {counted(found['users']['chose'], 'user')} decided: another split (`--seed`) may choose otherwise.")
    return said


def write(found: Mapping[str, Any], path: Path) -> Path:
    """Write advice.html and return its path. Raises DataError."""
    require_packages()
    metric = named(found["metric"])
    parts: list[Part] = [Text(sentence) for sentence in lines(found)]
    tried = PageTable(f"What was tried: {metric.title}", _headings(found), _rows(found, metric))
    sections = [Section("Advice", parts), Section("Candidates", [tried])]
    if found["shots"]:
        sections.append(Section("Rows of a user", [_curve(found, metric)]))
    if found.get("command"):
        sections.append(Section("Do it", [Code("Command that trains it", found["command"])]))
    chose, told = (found["users"][part] for part in ("chose", "told"))
    others = "the same" if found["few_users"] else f"{told} others"
    lead = f"Chosen by the scores of {counted(chose, 'user')}; what it is worth is told of {others}."
    return write_page(path, f"Advice for {found['data']}", lead, sections)


def _headings(found: Mapping[str, Any]) -> tuple[str, str, str, str]:
    chose, told = found["users"]["chose"], found["users"]["told"]
    others = "the same users" if found["few_users"] else counted(told, "other user")
    return "", "rounds", f"{counted(chose, 'user')} to choose by", others


def _rows(found: Mapping[str, Any], metric: Metric) -> list[list[str]]:
    return [
        [
            in_words(row["name"], metric) if row["name"] in BASELINES else row["name"],
            str(row["rounds"] or ""),
            metric.score(row["choosing"]),
            metric.score(row["telling"]),
        ]
        for row in found["candidates"]
    ]


def _gain(gain: Mapping[str, Any], other: str, metric: Metric, found: Mapping[str, Any]) -> str:
    by = metric.score(abs(gain["mean"]), gain["half"])
    verb = "is better than" if gain["mean"] > 0 else "is worse than" if gain["mean"] < 0 else "equals"
    certain = "" if gain["half"] is not None and abs(gain["mean"]) > gain["half"] else ", which is not certain"
    return f"For {counted(gain['users'], 'user')}, {_model(found)} {verb} {in_words(other, metric)}" + (
        f" by {by}{certain}." if gain["mean"] else "."
    )


def _shots(found: Mapping[str, Any], metric: Metric) -> str:
    """Return from how many rows on the model beats what needs no federation, by its means."""
    own = _alone(found)
    if not found["shots"] or own is None:
        return ""
    enough = None
    for point in reversed(found["shots"]):
        if not metric.is_better(point["score"], own):
            break
        enough = point["shots"]
    of_each = " of each class" if metric.kind == "classification" else ""
    if enough is None:
        most = counted(found["shots"][-1]["shots"], "row")
        return (
            f"With {most}{of_each} of a user or fewer, {_model(found)} does not beat all own rows alone ({metric.score(own)})."
        )
    rows = counted(enough, "row")
    return f"From {rows}{of_each} of a user on, {_model(found)} is better than all own rows alone ({metric.score(own)})."


def _losers(found: Mapping[str, Any], metric: Metric) -> str:
    lost, told = found["losers"], found["users"]["told"]
    if not found["own_rows"]:
        return ""
    if not lost:
        return f"With {_model(found)} none of {counted(told, 'user')} loses against own rows alone."
    some = ", ".join(
        f"{as_told(one['task'], 60)} ({metric.score(one['own'])} alone, {metric.score(one['model'])})"
        for one in lost[:_MOST_NAMED]
    )
    more = f" and {len(lost) - _MOST_NAMED} more" if len(lost) > _MOST_NAMED else ""
    lose = "loses" if len(lost) == 1 else "lose"
    return f"With {_model(found)} {len(lost)} of {counted(told, 'user')} {lose} against own rows alone: {some}{more}."


def _model(found: Mapping[str, Any]) -> str:
    """Return the best of the trained models, whether it is taken or not."""
    return f"`{found['model']['algorithm']}` ({found['model']['model']})"


def _alone(found: Mapping[str, Any]) -> float | None:
    """Return the score of own rows alone, by all rows of a user; None if it is not known."""
    known: list[float | None] = [row["telling"] for row in found["candidates"] if row["name"] == found["own_rows"]]
    return known[0] if known else None


def _curve(found: Mapping[str, Any], metric: Metric) -> Part:
    x, y = ([point[name] for point in found["shots"]] for name in ("shots", "score"))
    own = _alone(found)

    def draw(axes: "Axes") -> None:
        axes.plot(x, metric.scaled(y), label=found["model"]["algorithm"], **style(0))
        if own is not None:
            axes.axhline(metric.scale * own, label="all own rows alone", ls="--", color=style(1)["color"])
        axes.set(xlabel="support rows" + (" of each class" if metric.kind == "classification" else ""), ylabel=metric.axis)
        axes.legend()

    ends = ", ".join(f"{shots}: {metric.score(score)}" for shots, score in zip(x, y, strict=True))
    return picture("Score by the number of a user's rows", f"By support rows: {ends}.", draw)
