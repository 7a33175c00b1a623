"""Numbers of a run that are worth a curve, by the names that TensorBoard, MLflow and Weights & Biases show."""

from collections.abc import Iterator, Mapping
from typing import Any

from quickbloom.common.metric import CHOSEN_BY, LOSS

FOLDER = "tensorboard"
"""Folder of the event files in a run directory."""
_MEASURES = [metric.name for metric in (*CHOSEN_BY, LOSS)]


def scalars(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield (name, value) of the numbers to plot in a line of history.jsonl, without null."""
    found = {"train/loss": line["train"]["loss"], "train/tasks": line["train"]["tasks"], "round/seconds": line["seconds"]}
    found |= {f"round/bytes_{way}": count for way, count in line["bytes"].items()}
    found |= {"round/failures": len(line["failures"]), "round/nodes": line.get("nodes", {}).get("answered")}
    validation = line.get("validation") or {}
    for measure in _MEASURES:
        if measure in validation:
            found |= {
                f"validation/{measure}_before": validation[measure][0],
                f"validation/{measure}_after": validation[measure][-1],
            }
    yield from ((name, float(value)) for name, value in found.items() if value is not None)


def adaptation(summary: Mapping[str, Any]) -> Iterator[tuple[str, int, float]]:
    """Yield (name, step of adaptation, mean over the test tasks) of a finished run, without null."""
    for measure in _MEASURES:
        for step, value in enumerate(((summary["test"] or {}).get(measure) or {"mean": []})["mean"]):
            if value is not None:
                yield f"test/{measure}_by_step", step, float(value)
