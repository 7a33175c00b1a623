"""The last messages of a run: sums for one linear model of all tasks, and every test task's scores by model and baselines.

As in `common.wire.messages`, reading checks everything, and any flaw raises WireError.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from quickbloom.common.baselines.global_ridge import GlobalModel, Sums
from quickbloom.common.baselines.scoring import CONTENDERS
from quickbloom.common.maths.params import Params
from quickbloom.common.wire.arrays import arrays_of, to_arrays
from quickbloom.common.wire.checks import WireError, config_of, floats, ints, nothing_else, reads, record_of, strings, truth
from quickbloom.common.wire.messages import EvaluateRequest

SUMS = "query.sums"
SCORES = "query.scores"

_LARGEST = 1e38
"""Largest size of a score: a model that has diverged may predict anything."""

Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True)
class SumsRequest:
    """Request for the sums over the support and query rows of these training tasks."""

    task_ids: list[str]

    def to_records(self) -> RecordDict:
        return RecordDict({"request": ConfigRecord({"task-ids": self.task_ids})})

    @classmethod
    @reads
    def from_records(cls, records: RecordDict) -> "SumsRequest":
        return cls(strings(config_of(records, "request")["task-ids"], "task-ids"))


@dataclass(frozen=True)
class SumsReply:
    """Sums over all rows asked for: they grow with the number of inputs, not with that of rows."""

    sums: Sums

    def to_records(self) -> RecordDict:
        parts = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in vars(self.sums).items()}
        return RecordDict({"sums": to_arrays(parts)})

    @classmethod
    @reads
    def from_records(cls, records: RecordDict, inputs: int, outputs: int) -> "SumsReply":
        """Read the sums for `inputs` numbers a row and `outputs` targets. Raises WireError."""
        nothing_else(records, {"sums"})
        size = inputs + 1
        wanted = {"gram": (size, size), "cross": (size, outputs), "squares": (outputs,)}
        found = _arrays(arrays_of(records, "sums"), wanted)
        if found["gram"][-1, -1] < 0:
            raise WireError("the number of rows must not be negative")
        return cls(Sums(**found))


@dataclass(frozen=True)
class ScoresRequest:
    """Request to score these test tasks by the model after `steps` steps with rate `lr`, and by the baselines.

    `shared`: the linear model for all tasks; None: there is none. `round`: the one after which the model is this one.
    `lineage` names the training. `seen`: the tasks are training tasks, see `EvaluateRequest`.
    """

    meta: Params
    lr: float
    steps: int
    task_ids: list[str]
    shared: GlobalModel | None = None
    round: int = 0
    lineage: str = ""
    seen: bool = False

    def as_evaluation(self, tried: Sequence[int]) -> EvaluateRequest:
        """Return the request for scores that tells as much of this model.

        `tried`: the numbers of steps for which scores may be asked, ascending. Raises WireError for more than the last.
        """
        if self.steps > tried[-1]:
            raise WireError(f"`steps` must be at most `adapt-steps` ({tried[-1]}), got {self.steps}")
        steps = next(number for number in tried if number >= self.steps)
        return EvaluateRequest(self.meta, [self.lr], steps, self.task_ids, 0, self.round, self.lineage, seen=self.seen)

    def to_records(self, encoded: ArrayRecord | None = None) -> RecordDict:
        fields: dict[str, Any] = {"lr": self.lr, "steps": self.steps, "task-ids": self.task_ids}
        request = ConfigRecord({**fields, "round": self.round, "lineage": self.lineage, "seen": self.seen})
        records = RecordDict({"meta": to_arrays(self.meta) if encoded is None else encoded, "request": request})
        if self.shared is not None:
            parts = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in vars(self.shared).items()}
            records["shared"] = to_arrays(parts)
        return records

    @classmethod
    @reads
    def from_records(cls, records: RecordDict, inputs: int, outputs: int, *, classes: bool) -> "ScoresRequest":
        fields = config_of(records, "request")
        (lr,), (lineage,) = floats([fields["lr"]], "lr"), strings([fields["lineage"]], "lineage")
        steps, round_ = ints([fields["steps"], fields["round"]], "steps and round")
        shared = None
        if "shared" in records:
            wanted = {"weights": (inputs, outputs), "intercept": (outputs,), "shares": (outputs if classes else 0,)}
            shared = GlobalModel(**_arrays(arrays_of(records, "shared"), wanted))
        task_ids = strings(fields["task-ids"], "task-ids")
        seen = truth(fields["seen"], "seen")
        return cls(arrays_of(records, "meta"), lr, steps, task_ids, shared, round_, lineage, seen)


@dataclass(frozen=True)
class ScoresReply:
    """Scores [tasks, contenders, scores]: contenders as in `CONTENDERS`, scores as in `common.scores`; NaN: not known."""

    scores: Numbers

    def to_records(self) -> RecordDict:
        found = np.where(np.abs(self.scores) > _LARGEST, np.nan, self.scores)
        return RecordDict({"metrics": MetricRecord({"scores": found.ravel().tolist()})})

    @classmethod
    @reads
    def from_records(cls, records: RecordDict, num_tasks: int, num_scores: int) -> "ScoresReply":
        nothing_else(records, {"metrics"})
        shape = (num_tasks, len(CONTENDERS), num_scores)
        values = floats(record_of(records, "metrics", MetricRecord)["scores"], "scores", int(np.prod(shape)), finite=False)
        found = np.array(values).reshape(shape)
        if (np.abs(found) > _LARGEST).any():
            raise WireError(f"`scores` must be numbers up to {_LARGEST:g}")
        return cls(found)


def _arrays(found: Params, wanted: dict[str, tuple[int, ...]]) -> dict[str, Numbers]:
    """Return the arrays as float64. Raises WireError unless these and no others have these shapes and finite numbers."""
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    if shapes != wanted:
        raise WireError(f"sums and linear models must have the shapes {wanted}, got {shapes}")
    arrays = {name: value.double().numpy() for name, value in found.items()}
    if not all(np.isfinite(value).all() for value in arrays.values()):
        raise WireError("sums and linear models must be finite")
    return arrays
