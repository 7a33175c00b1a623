"""Messages by which nodes tell the sum of an encoder's features over their training rows, so that all are centred by the mean.

In a secure sum, `MaskedRequest` carries the request and the node's row is masked. As in `common.wire.messages`, reading checks
everything, and any flaw raises WireError.
"""

from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from quickbloom.common.wire.checks import WireError, config_of, floats, nothing_else, reads, short, strings

MEANS = "query.means"
MASKED_MEANS = "query.masked_means"


@dataclass(frozen=True)
class MeansRequest:
    """Request for the sum of the features of these training tasks. `by_task`: each counts alike, for privacy."""

    task_ids: list[str]
    by_task: bool = False

    def to_records(self, encoded: ArrayRecord | None = None) -> RecordDict:
        return RecordDict({"request": ConfigRecord({"task-ids": self.task_ids, "by-task": self.by_task})})

    @classmethod
    @reads
    def from_records(cls, records: RecordDict) -> "MeansRequest":
        fields = config_of(records, "request")
        by_task = fields["by-task"]
        if not isinstance(by_task, bool):
            raise WireError(f"`by-task` must be true or false, got {short(by_task)}")
        return cls(strings(fields["task-ids"], "task-ids"), by_task)


@dataclass(frozen=True)
class MeansReply:
    """A node's sum, see `Own.feature_sum`."""

    total: list[float]
    weight: float

    def to_records(self) -> RecordDict:
        fields: dict[str, Any] = {"total": self.total, "weight": self.weight}
        return RecordDict({"means": ConfigRecord(fields)})

    @classmethod
    @reads
    def from_records(cls, records: RecordDict, size: int) -> "MeansReply":
        fields = config_of(records, "means")
        nothing_else(fields, {"total", "weight"})
        (weight,) = floats([fields["weight"]], "weight", 1)
        if weight < 0:
            raise WireError(f"`weight` must be 0 or more, got {short(weight)}")
        return cls(floats(fields["total"], "total", size), weight)
