"""What a report says of mode async: how fast the model takes steps, how old contributions are, and who contributes."""

from collections import Counter
from itertools import accumulate
from typing import TYPE_CHECKING

from quickbloom.common.errors import as_told
from quickbloom.common.formatting import counted
from quickbloom.server_app.events.kinds import mean_staleness
from quickbloom.server_app.reporting.drawing import SERIES, few_numbers, picture, whole_numbers
from quickbloom.server_app.reporting.page import Figures, Part, Picture, Table, Text
from quickbloom.server_app.reporting.run_record import RunFacts

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def asynchronous(run: RunFacts) -> list[Part]:
    """The section on mode async; [] for a run in mode sync, or before its first step."""
    steps = [record for record in run.rounds if "async" in record]
    if not steps:
        return []
    staleness: Counter[int] = Counter()
    for record in steps:
        staleness.update({int(age): number for age, number in record["async"]["staleness"].items()})
    dropped = sum(record["async"]["dropped"] for record in steps)
    items = [_pace(run, len(steps)), *_age(staleness)]
    items.append(("contributions dropped", str(dropped), "older than async-max-staleness allows"))
    told = "A round is one step: the server takes it whenever `async-buffer` contributions have come in, and waits for no one."
    return [Text(told), Figures(items), _steps(run), *_histogram(staleness), *_who(run)]


def _pace(run: RunFacts, steps: int) -> tuple[str, str, str]:
    """Steps by the minute of the clock, or by the hour of virtual time."""
    total = f"{counted(steps, 'step')} in all"
    if run.hours:
        hours = max(run.hours.values())
        return "steps per virtual hour", f"{steps / hours:.3g}" if hours else "-", total
    seconds = sum(record["seconds"] for record in run.rounds)
    return "steps per minute", f"{60 * steps / seconds:.3g}" if seconds else "-", total


def _age(staleness: Counter[int]) -> list[tuple[str, str, str]]:
    """The mean staleness of the contributions."""
    mean = mean_staleness({str(age): number for age, number in staleness.items()})
    if mean is None:
        return []
    fresh = staleness[0] / staleness.total()
    return [
        (
            "mean staleness, in steps",
            f"{mean:.2f}",
            f"{fresh:.0%} of {staleness.total()} contributions were of the newest model",
        )
    ]


def _steps(run: RunFacts) -> Picture:
    """How many steps there were by when."""
    numbers = [record["round"] for record in run.rounds]
    if run.hours:
        times, unit = [record.get("virtual_hours", 0.0) for record in run.rounds], "virtual hours"
    else:
        times, unit = [seconds / 60 for seconds in accumulate(record["seconds"] for record in run.rounds)], "minutes"

    def draw(axes: "Axes") -> None:
        axes.plot([0, *times], [numbers[0] - 1, *numbers], color=SERIES[0], lw=1.3)
        axes.set(xlabel=unit, ylabel="steps", xlim=(0, None), ylim=(0, None))
        few_numbers(axes)

    return picture("Steps of the model", f"{numbers[-1]} after {times[-1]:.3g} {unit}.", draw)


def _histogram(staleness: Counter[int]) -> list[Picture]:
    """How old the contributions were."""
    if not staleness:
        return []
    ages = sorted(staleness)

    def draw(axes: "Axes") -> None:
        axes.bar(ages, [staleness[age] for age in ages], width=0.8, color=SERIES[0])
        axes.set(xlabel="staleness, in steps", ylabel="contributions")
        whole_numbers(axes)

    middle = sorted(staleness.elements())[staleness.total() // 2]
    text = f"{staleness[0]} of {staleness.total()} contributions with none, median {middle}, the oldest {ages[-1]} steps."
    return [picture("Staleness of the contributions", text, draw)]


def _who(run: RunFacts) -> list[Part]:
    """Who contributed how often; known at the end."""
    found = ((run.summary or {}).get("async") or {}).get("contributions")
    if not found:
        return []
    numbers = [[str(found["least"]), f"{found['median']:g}", str(found["most"])]]
    parts: list[Part] = [
        Table("Contributions of a training client to the steps", ("least", "median", "most"), numbers),
    ]
    if rarely := found["rarely"]:
        names = ", ".join(as_told(task, 60) for task in rarely)
        parts.append(Text(f"Hardly ever contributing, less than half as often as the median: {names}."))
    else:
        parts.append(Text("Every training client contributed at least half as often as the median."))
    return parts
