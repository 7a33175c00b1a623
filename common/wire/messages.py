"""Messages between server and nodes as small dataclasses with `to_records` and `from_records`.

Record fields are named only here and in `common.wire.secure.messages`. Reading checks everything,
because the other side may be broken or run another version. Any flaw raises WireError with a reason
in words, and no other exception.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from quickbloom.common.datasets.base import SPLITS, DataSpec, TaskInfo
from quickbloom.common.maths.params import Params, can_be_squared
from quickbloom.common.printable import as_told, flawed, one_line
from quickbloom.common.wire.arrays import arrays_of
from quickbloom.common.wire.arrays import from_arrays as from_arrays
from quickbloom.common.wire.arrays import to_arrays as to_arrays
from quickbloom.common.wire.checks import WireError as WireError
from quickbloom.common.wire.checks import config_of, floats, ints, nothing_else, reads, record_of, short, strings

PROTOCOL = 7
"""Version of the protocol, raised whenever an old node could not work with a new server."""

ROLL_CALL = "query.roll_call"
TRAIN = "train"
EVALUATE = "evaluate"
KEEP = "query.keep"

_LONGEST_SCHEMA = 5_000_000
"""Limit in characters; 65,536 category keys take a quarter of it."""

LARGEST_LOSS = float(np.finfo(np.float32).max)
"""Largest accepted loss: the float32 maximum. Sums of such numbers cannot overflow in float64."""

LOSS_ROUNDING = 1e-3
"""Tolerance below 0 for losses and errors, which rounding may make slightly negative."""


def roll_call_request(agreed: str = "") -> RecordDict:
    """Return the server's first request to every node. `agreed`: see `tell_agreed`."""
    records = RecordDict({"request": ConfigRecord({"protocol": PROTOCOL})})
    tell_agreed(records, agreed)
    return records


@reads
def check_roll_call(records: RecordDict) -> None:
    """Raise WireError if the server's protocol differs from this node's."""
    theirs = config_of(records, "request").get("protocol", PROTOCOL)
    if theirs != PROTOCOL:
        raise WireError(f"the server speaks protocol {theirs!r}, this node speaks {PROTOCOL}: install the same release")


@dataclass(frozen=True)
class RollCallReply:
    """A node's answer to the roll call: shapes, counts and versions, but no example.

    `left_out`: unusable tasks by name, each with the reason. `keeps`: whether the node can store
    personal models.
    """

    spec: DataSpec
    tasks: list[TaskInfo]
    versions: dict[str, str]
    protocol: int = PROTOCOL
    left_out: Mapping[str, str] = field(default_factory=dict)
    keeps: bool = False

    def to_records(self) -> RecordDict:
        fields: dict[str, Any] = {
            "protocol": self.protocol,
            "kind": self.spec.kind,
            "input-shape": list(self.spec.input_shape),
            "outputs": self.spec.outputs,
            "tokens": self.spec.tokens,
            "schema": self.spec.schema,
            "packages": list(self.versions),
            "versions": list(self.versions.values()),
            "task-ids": [task.task_id for task in self.tasks],
            "keeps": self.keeps,
            "left-out": list(self.left_out),
            "reasons": list(self.left_out.values()),
            "groups": [task.group for task in self.tasks],
            "splits": [task.split for task in self.tasks],
            "num-support": [task.num_support for task in self.tasks],
            "num-query": [task.num_query for task in self.tasks],
            "num-test": [task.num_test for task in self.tasks],
        }
        return RecordDict({"roll-call": ConfigRecord(fields)})

    @classmethod
    @reads
    def from_records(cls, records: RecordDict) -> "RollCallReply":
        fields = config_of(records, "roll-call")
        if fields["protocol"] != PROTOCOL:
            raise WireError(
                f"it speaks protocol {fields['protocol']!r}, this server speaks {PROTOCOL}: install the same release"
            )
        kind: Any = fields["kind"]
        if kind not in ("classification", "regression"):
            raise WireError(f"`kind` must be classification or regression, got {kind!r}")
        shape = tuple(ints(fields["input-shape"], "input-shape", least=1))
        (outputs,) = ints([fields["outputs"]], "outputs", least=1)
        tokens = fields["tokens"]
        if not isinstance(tokens, bool):
            raise WireError(f"`tokens` must be true or false, got {short(tokens)}")
        keeps = fields["keeps"]
        if not isinstance(keeps, bool):
            raise WireError(f"`keeps` must be true or false, got {short(keeps)}")
        (schema,) = strings([fields["schema"]], "schema")
        if len(schema) > _LONGEST_SCHEMA:
            raise WireError(f"`schema` has {len(schema)} characters, {_LONGEST_SCHEMA} are the most")
        columns = [strings(fields[name], name) for name in ("task-ids", "groups", "splits")]
        counts = [ints(fields[name], name) for name in ("num-support", "num-query", "num-test")]
        tasks = [
            TaskInfo(task_id, support, query, test, group, split)
            for task_id, group, split, support, query, test in zip(*columns, *counts, strict=True)
        ]
        if any(task.split not in ("", *SPLITS) for task in tasks):
            raise WireError(f"`splits` must be empty or one of {SPLITS}")
        if len({task.task_id for task in tasks}) != len(tasks):
            raise WireError("it names a task twice")
        reasons = (as_told(reason) for reason in strings(fields["reasons"], "reasons"))
        left_out = dict(zip(strings(fields["left-out"], "left-out"), reasons, strict=True))
        packages = dict(zip(strings(fields["packages"], "packages"), strings(fields["versions"], "versions"), strict=True))
        if wrong := flawed([*columns[0], *columns[1], *left_out]):
            raise WireError(f"the name '{wrong[0]}' of a task cannot be used: {wrong[1]}")
        if wrong := flawed([*packages, *packages.values()]):
            raise WireError(f"its software has the version '{wrong[0]}': {wrong[1]}")
        if one_line(schema) != schema:
            raise WireError("`schema` must be printable, on one line")
        spec = DataSpec(kind, shape, outputs, tokens, schema)
        return cls(spec, tasks, packages, PROTOCOL, left_out, keeps)


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
    seconds: float
    within: float = 0.0

    def to_records(self) -> RecordDict:
        fields: dict[str, Any] = {"weight": self.weight, "losses": self.losses, "seconds": self.seconds, "within": self.within}
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
        nothing_else(fields, {"weight", "losses", "seconds", "within"})
        names = ("weight", "seconds", "within")
        numbers = floats([fields[name] for name in names], "weight, seconds and within")
        losses = _losses(fields["losses"], "losses", num_tasks)
        for name, number in zip(names, numbers, strict=True):
            if number < 0:
                raise WireError(f"`{name}` must not be negative, got {number}")
        weight, seconds, within = numbers
        if within > weight:
            raise WireError(f"`within` is {within}, more than the `weight` of all its tasks, {weight}")
        if (weight > 0) != any(map(math.isfinite, losses)):
            raise WireError(f"`weight` is {weight}, but {np.isfinite(losses).sum()} of its tasks contributed")
        gradient = arrays_of(records, "gradient", take=take)
        for name, value in gradient.items():
            if not can_be_squared(value):
                raise WireError(f"the tensor `{name}` holds NaN, infinity or numbers that are too large")
        return cls(gradient, weight, losses, seconds, within)


@dataclass(frozen=True)
class EvaluateRequest:
    """Request to adapt these held-out tasks with each of `lrs` and score them after 0..steps steps.

    `shots`: adapt only on the first so many support examples of each class (regression: in all); 0:
    on all of them. `round`: the round after which the model is scored; `lineage` names the
    training.
    """

    meta: Params
    lrs: list[float]
    steps: int
    task_ids: list[str]
    shots: int = 0
    round: int = 0
    lineage: str = ""

    def to_records(self, encoded: ArrayRecord | None = None) -> RecordDict:
        fields: dict[str, Any] = {"lrs": self.lrs, "steps": self.steps, "task-ids": self.task_ids, "shots": self.shots}
        request = ConfigRecord({**fields, "round": self.round, "lineage": self.lineage})
        return RecordDict({"meta": to_arrays(self.meta) if encoded is None else encoded, "request": request})

    @classmethod
    @reads
    def from_records(cls, records: RecordDict) -> "EvaluateRequest":
        fields = config_of(records, "request")
        (steps,), (shots,), (round_,) = (ints([fields[name]], name) for name in ("steps", "shots", "round"))
        task_ids, (lineage,) = strings(fields["task-ids"], "task-ids"), strings([fields["lineage"]], "lineage")
        return cls(arrays_of(records, "meta"), floats(fields["lrs"], "lrs"), steps, task_ids, shots, round_, lineage)


@dataclass(frozen=True)
class EvaluateReply:
    """Scores of held-out tasks: `losses` and `metrics` [tasks, learning rates, steps + 1], in the order asked for.

    The metric is accuracy in 0..1, or the mean squared error for regression. `second`: a second
    metric of the same shape for a user's own data, either the accuracy with equal weight for every
    class of a task, or the root of the error in the target's unit.
    """

    losses: np.ndarray[Any, Any]
    metrics: np.ndarray[Any, Any]
    seconds: float
    second: np.ndarray[Any, Any] | None = None

    def to_records(self) -> RecordDict:
        losses, scores = self.losses.ravel().tolist(), self.metrics.ravel().tolist()
        fields: dict[str, Any] = {"losses": losses, "scores": scores, "seconds": self.seconds}
        if self.second is not None:
            fields["second"] = self.second.ravel().tolist()
        return RecordDict({"metrics": MetricRecord(fields)})

    @classmethod
    @reads
    def from_records(cls, records: RecordDict, num_tasks: int, num_lrs: int, steps: int) -> "EvaluateReply":
        nothing_else(records, {"metrics"})
        fields = _metrics(records)
        nothing_else(fields, {"losses", "scores", "seconds", "second"})
        shape = (num_tasks, num_lrs, steps + 1)
        length = num_tasks * num_lrs * (steps + 1)
        losses, scores = (_losses(fields[name], name, length) for name in ("losses", "scores"))
        (seconds,) = floats([fields["seconds"]], "seconds")
        if seconds < 0:
            raise WireError(f"`seconds` must not be negative, got {seconds}")
        second = np.array(_losses(fields["second"], "second", length)).reshape(shape) if "second" in fields else None
        return cls(np.array(losses).reshape(shape), np.array(scores).reshape(shape), seconds, second)


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
    seconds: float

    def to_records(self) -> RecordDict:
        return RecordDict({"metrics": MetricRecord({"kept": self.kept, "seconds": self.seconds})})

    @classmethod
    @reads
    def from_records(cls, records: RecordDict) -> "KeepReply":
        fields = _metrics(records)
        (kept,), (seconds,) = ints([fields["kept"]], "kept"), floats([fields["seconds"]], "seconds")
        return cls(kept, seconds)


def tell_settings(records: RecordDict, settings: Mapping[str, bool | int | float | str]) -> None:
    """Add settings of the run to a request, for nodes that cannot know them: those of a resumed run."""
    if settings:
        records["settings"] = ConfigRecord(dict(settings))


@reads
def told_settings(records: RecordDict) -> dict[str, Any]:
    """Return the settings that `tell_settings` added to a request; {} if none."""
    return dict(config_of(records, "settings")) if "settings" in records else {}


def tell_agreed(records: RecordDict, schema: str) -> None:
    """Add the schema that the nodes agreed on (`DataSpec.schema`) to a request; "" if all found the same by themselves."""
    if schema:
        records["agreed"] = ConfigRecord({"schema": schema})


@reads
def told_agreed(records: RecordDict) -> str:
    """Return the schema that `tell_agreed` added to a request; "" if none."""
    if "agreed" not in records:
        return ""
    (schema,) = strings([config_of(records, "agreed")["schema"]], "schema")
    return schema


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


def _metrics(records: RecordDict) -> MetricRecord:
    return record_of(records, "metrics", MetricRecord)


def _losses(values: Any, name: str, length: int) -> list[float]:
    """Return losses, errors or accuracies. NaN and infinity are allowed, since a task can diverge."""
    numbers = floats(values, name, length, finite=False)
    if not all(-LOSS_ROUNDING <= number <= LARGEST_LOSS or math.isnan(number) or number == math.inf for number in numbers):
        raise WireError(f"`{name}` must be numbers from 0 to {LARGEST_LOSS:.3g}, got {short(values)}")
    return numbers
