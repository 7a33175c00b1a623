"""Messages between server and nodes as small dataclasses with `to_records` and `from_records`.

Record fields are named only here and in `common.wire.secure.messages`. Reading checks everything,
because the other side may be broken or run another version. Any flaw raises WireError with a reason
in words, and no other exception.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from quickbloom.common.maths.params import Params, can_be_squared
from quickbloom.common.printable import as_told
from quickbloom.common.wire.arrays import arrays_of
from quickbloom.common.wire.arrays import from_arrays as from_arrays
from quickbloom.common.wire.arrays import to_arrays as to_arrays
from quickbloom.common.wire.checks import WireError as WireError
from quickbloom.common.wire.checks import config_of, floats, ints, nothing_else, reads, record_of, short, strings, truth

TRAIN = "train"
EVALUATE = "evaluate"
KEEP = "query.keep"

LARGEST_LOSS = float(np.finfo(np.float32).max)
"""Largest accepted loss: the float32 maximum. Sums of such numbers cannot overflow in float64."""

LOSS_ROUNDING = 1e-3
"""Tolerance below 0 for losses and errors, which rounding may make slightly negative."""


@dataclass(frozen=True)
class TrainRequest:
    """Request for the meta-gradient of these tasks in this round.

    `lineage` names the training that the tasks' state on their nodes belongs to; a resumed run
    keeps the lineage of the run before. `clip`: scale every task's meta-gradient down to this norm
    and let all tasks weigh 1; 0: neither.

    In all requests, `to_records(encoded)` sends these arrays in place of `meta`, so that many
    messages share them.
    """

    meta: Params
    round: int
    seed: int
    task_ids: list[str]
    lineage: str = ""
    clip: float = 0.0

    def to_records(self, encoded: ArrayRecord | None = None) -> RecordDict:
        fields: dict[str, Any] = {"round": self.round, "seed": self.seed, "task-ids": self.task_ids, "lineage": self.lineage}
        request = ConfigRecord({**fields, "clip": self.clip})
        return RecordDict({"meta": to_arrays(self.meta) if encoded is None else encoded, "request": request})

    @classmethod
    @reads
    def from_records(cls, records: RecordDict) -> "TrainRequest":
        fields = config_of(records, "request")
        round_, seed = ints([fields["round"], fields["seed"]], "round and seed")
        (lineage,) = strings([fields["lineage"]], "lineage")
        (clip,) = floats([fields["clip"]], "clip")
        if clip < 0:
            raise WireError(f"`clip` must not be negative, got {clip}")
        return cls(arrays_of(records, "meta"), round_, seed, strings(fields["task-ids"], "task-ids"), lineage, clip)


@dataclass(frozen=True)
class TrainReply:
    """A node's weighted mean meta-gradient.

    `losses`: one per task in the order asked for, NaN for a task that did not contribute. `within`:
    number of tasks that did not need clipping, if clipping was asked for.
    """

    gradient: Params
    weight: float
    losses: list[float]
    within: float = 0.0

    def to_records(self) -> RecordDict:
        fields: dict[str, Any] = {"weight": self.weight, "losses": self.losses, "within": self.within}
        metrics = MetricRecord(fields)
        return RecordDict({"gradient": to_arrays(self.gradient), "metrics": metrics})

    @classmethod
    @reads
    def from_records(cls, records: RecordDict, num_tasks: int, *, take: bool = False) -> "TrainReply":
        """Read a reply about `num_tasks` tasks. Raises WireError.

        `take`: remove the meta-gradient from the record while reading it, to save memory.
        """
        nothing_else(records, {"gradient", "metrics"})
        fields = _metrics(records)
        nothing_else(fields, {"weight", "losses", "within"})
        names = ("weight", "within")
        numbers = floats([fields[name] for name in names], "weight and within")
        losses = _losses(fields["losses"], "losses", num_tasks)
        for name, number in zip(names, numbers, strict=True):
            if number < 0:
                raise WireError(f"`{name}` must not be negative, got {number}")
        weight, within = numbers
        if within > weight:
            raise WireError(f"`within` is {within}, more than the `weight` of all its tasks, {weight}")
        if (weight > 0) != any(map(math.isfinite, losses)):
            raise WireError(f"`weight` is {weight}, but {np.isfinite(losses).sum()} of its tasks contributed")
        gradient = arrays_of(records, "gradient", take=take)
        for name, value in gradient.items():
            if not can_be_squared(value):
                raise WireError(f"the tensor `{name}` holds NaN, infinity or numbers that are too large")
        return cls(gradient, weight, losses, within)


@dataclass(frozen=True)
class EvaluateRequest:
    """Request to adapt these held-out tasks with each of `lrs` and score them after 0..steps steps.

    `shots`: adapt only on the first so many support examples of each class (regression: in all); 0:
    on all of them. `round`: the round after which the model is scored; `lineage` names the
    training. `metric`: what to measure, a name of `common.metric`; "": what the data are measured by. `seen`: the tasks are
    training tasks, which adapt what they keep on the node to all that they trained on, and are scored on their own test part.
    """

    meta: Params
    lrs: list[float]
    steps: int
    task_ids: list[str]
    shots: int = 0
    round: int = 0
    lineage: str = ""
    metric: str = ""
    seen: bool = False

    def to_records(self, encoded: ArrayRecord | None = None) -> RecordDict:
        fields: dict[str, Any] = {"lrs": self.lrs, "steps": self.steps, "task-ids": self.task_ids, "shots": self.shots}
        fields |= {"round": self.round, "lineage": self.lineage, "metric": self.metric, "seen": self.seen}
        request = ConfigRecord(fields)
        return RecordDict({"meta": to_arrays(self.meta) if encoded is None else encoded, "request": request})

    @classmethod
    @reads
    def from_records(cls, records: RecordDict) -> "EvaluateRequest":
        fields = config_of(records, "request")
        (steps,), (shots,), (round_,) = (ints([fields[name]], name) for name in ("steps", "shots", "round"))
        task_ids, (lineage, metric) = strings(fields["task-ids"], "task-ids"), strings(_two(fields), "lineage and metric")
        lrs, seen = floats(fields["lrs"], "lrs"), truth(fields["seen"], "seen")
        return cls(arrays_of(records, "meta"), lrs, steps, task_ids, shots, round_, lineage, metric, seen)


@dataclass(frozen=True)
class EvaluateReply:
    """Scores of held-out tasks: `losses` and `metrics` [tasks, learning rates, steps + 1], in the order asked for.

    The metric is accuracy in 0..1, or the mean squared error for regression. `second`: a second
    metric of the same shape for a user's own data, either the accuracy with equal weight for every
    class of a task, or the root of the error in the target's unit.
    """

    losses: np.ndarray[Any, Any]
    metrics: np.ndarray[Any, Any]
    second: np.ndarray[Any, Any] | None = None

    def to_records(self) -> RecordDict:
        losses, scores = self.losses.ravel().tolist(), self.metrics.ravel().tolist()
        fields: dict[str, Any] = {"losses": losses, "scores": scores}
        if self.second is not None:
            fields["second"] = self.second.ravel().tolist()
        return RecordDict({"metrics": MetricRecord(fields)})

    @classmethod
    @reads
    def from_records(cls, records: RecordDict, num_tasks: int, num_lrs: int, steps: int) -> "EvaluateReply":
        nothing_else(records, {"metrics"})
        fields = _metrics(records)
        nothing_else(fields, {"losses", "scores", "second"})
        shape = (num_tasks, num_lrs, steps + 1)
        length = num_tasks * num_lrs * (steps + 1)
        losses, scores = (_losses(fields[name], name, length) for name in ("losses", "scores"))
        second = np.array(_losses(fields["second"], "second", length)).reshape(shape) if "second" in fields else None
        return cls(np.array(losses).reshape(shape), np.array(scores).reshape(shape), second)


@dataclass(frozen=True)
class KeepRequest:
    """Request to adapt this round's model to the node's own tasks, with rate `lr` in `steps` steps, and keep the results there.

    `lineage` names the training; `run` names its directory (last part only), for people.
    """

    meta: Params
    lr: float
    steps: int
    round: int
    lineage: str = ""
    run: str = ""

    def to_records(self, encoded: ArrayRecord | None = None) -> RecordDict:
        numbers: dict[str, Any] = {"lr": self.lr, "steps": self.steps, "round": self.round}
        request = ConfigRecord({**numbers, "lineage": self.lineage, "run": self.run})
        return RecordDict({"meta": to_arrays(self.meta) if encoded is None else encoded, "request": request})

    @classmethod
    @reads
    def from_records(cls, records: RecordDict) -> "KeepRequest":
        fields = config_of(records, "request")
        (lr,) = floats([fields["lr"]], "lr")
        steps, round_ = ints([fields["steps"], fields["round"]], "steps and round")
        lineage, run = strings([fields["lineage"], fields["run"]], "lineage and run")
        return cls(arrays_of(records, "meta"), lr, steps, round_, lineage, run)


@dataclass(frozen=True)
class KeepReply:
    """The number of personal models that the node has kept, and nothing else about them."""

    kept: int

    def to_records(self) -> RecordDict:
        return RecordDict({"metrics": MetricRecord({"kept": self.kept})})

    @classmethod
    @reads
    def from_records(cls, records: RecordDict) -> "KeepReply":
        fields = _metrics(records)
        (kept,) = ints([fields["kept"]], "kept")
        return cls(kept)


def tell_settings(records: RecordDict, settings: Mapping[str, bool | int | float | str]) -> None:
    """Add settings of the run to a request, for nodes that cannot know them: those of a resumed run."""
    if settings:
        records["settings"] = ConfigRecord(dict(settings))


@reads
def told_settings(records: RecordDict) -> dict[str, Any]:
    """Return the settings that `tell_settings` added to a request; {} if none."""
    return dict(config_of(records, "settings")) if "settings" in records else {}


def kept_to_records(records: RecordDict, owner: str, kept: Params) -> None:
    """Put the state of a task, `owner`, into the node's own records. It is never part of a message."""
    records[f"kept/{owner}"] = to_arrays(kept)


def kept_from_records(records: RecordDict, owner: str) -> Params | None:
    """Return the state of `owner` from the node's own records; None if there is none."""
    name = f"kept/{owner}"
    return arrays_of(records, name) if name in records else None


def error_records(reason: str) -> RecordDict:
    """Return a node's reply that it cannot do what was asked, with the reason in words."""
    return RecordDict({"error": ConfigRecord({"reason": reason})})


def error_reason(records: RecordDict) -> str | None:
    """Return the reason if the reply reports an error, else None."""
    record = records.get("error")
    if not isinstance(record, ConfigRecord):
        return None
    reason = record.get("reason")
    return as_told(reason) if isinstance(reason, str) and reason else "no reason given"


def payload_bytes(records: RecordDict) -> int:
    """Return the bytes of a message's tensors, keys and envelopes; its few other numbers are not counted."""
    tensors = sum(len(array.data) for record in records.array_records.values() for array in record.values())
    lists = [value for record in records.config_records.values() for value in record.values() if isinstance(value, list)]
    return tensors + sum(len(value) for values in lists for value in values if isinstance(value, bytes))


def _two(fields: ConfigRecord) -> list[Any]:
    return [fields["lineage"], fields["metric"]]


def _metrics(records: RecordDict) -> MetricRecord:
    return record_of(records, "metrics", MetricRecord)


def _losses(values: Any, name: str, length: int) -> list[float]:
    """Return losses, errors or accuracies. NaN and infinity are allowed, since a task can diverge."""
    numbers = floats(values, name, length, finite=False)
    if not all(-LOSS_ROUNDING <= number <= LARGEST_LOSS or math.isnan(number) or number == math.inf for number in numbers):
        raise WireError(f"`{name}` must be numbers from 0 to {LARGEST_LOSS:.3g}, got {short(values)}")
    return numbers
