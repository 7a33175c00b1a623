"""How figures are told, the same in the terminal and in reports."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quickbloom.common.formatting import score

ONE_TASK = "no interval: the spread over tasks cannot be told from a single one"


def metric_of(scores: Mapping[str, Any]) -> str:
    """ "accuracy" or "mse": what `scores` holds."""
    return "accuracy" if "accuracy" in scores else "mse"


def metric_name(metric: str, target: str = "") -> str:
    """What `metric`, as a summary names it, is called. `target`: the name of the column that is predicted, if known."""
    if metric != "mse":
        return {"balanced_accuracy": "balanced accuracy", "rmse": "rmse, in its unit"}.get(metric, metric)
    return f"mean squared error of {target}" if target else "mean squared error"


def data_name(config: Mapping[str, Any]) -> str:
    """What the data of a run with these settings are called: of a user's own the file, without the folder that it lies in."""
    if config.get("dataset") != "own":
        return str(config.get("dataset"))
    # Without a file in the settings every node has one of its own.
    return Path(str(config.get("own.path", ""))).name or "the nodes' own data"


def unit(metric: str, dataset: str) -> str:
    """What an error is measured in, "" where the number says it all.

    A target of one's own data is standardised from each task's own support part (see docs/own-data.md).
    """
    if metric != "mse" or dataset != "own":
        return ""
    return "the error is in variances of each task's own support examples: 1 is what always guessing their mean costs"


def axis_name(metric: str) -> str:
    """The same in few words, for an axis of a picture."""
    return "accuracy, %" if metric == "accuracy" else "mean squared error"


def margin(half: float, metric: str) -> str:
    """A half-width by itself: "± 3.1 %" or "± 0.02"."""
    return f"± {100 * half:.1f} %" if metric == "accuracy" else f"± {half:.2g}"


def change(before: float | None, after: float | None, metric: str) -> str:
    """A score before and after."""
    return f"{score(before, metric)} → {score(after, metric)}"


def duration(seconds: float) -> str:
    """8072 -> "2 h 15 min", 75 -> "1 min 15 s", 12.34 -> "12.3 s"."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
