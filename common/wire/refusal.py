"""The server's word to a node that does not take part: why, for the owner of the device.

Only a node whose answer to the roll call says that it `hears` gets it, since an older one would answer with an error.
"""

from dataclasses import dataclass

from flwr.app import ConfigRecord, RecordDict

from quickbloom.common.printable import as_told
from quickbloom.common.wire.checks import config_of, reads, strings

REFUSED = "query.refused"

OTHER = "other"
KINDS = {
    "columns": "other columns or classes",
    "form": "data of another form",
    "encoder": "another encoder",
    "constants": "another model",
    "task": "a task of another node",
    "tasks": "no task that can take part",
    OTHER: "another reason",
}
"""What does not fit, in the server's words. None of them quotes data."""
_LONGEST = 1500


class Misfit(str):
    """Why a node does not take part, in words. `kind`: one of KINDS."""

    __slots__ = ("kind",)
    kind: str

    def __new__(cls, kind: str, reason: str) -> "Misfit":
        made = super().__new__(cls, reason)
        made.kind = kind
        return made


@dataclass(frozen=True)
class Refusal:
    """Why the node does not take part. `kind`: one of KINDS; `reason`: one printable line for its owner."""

    kind: str
    reason: str

    @classmethod
    def of(cls, reason: str) -> "Refusal":
        """Return the refusal for a reason in words, which may be a Misfit."""
        return cls(reason.kind if isinstance(reason, Misfit) else OTHER, reason)

    def to_records(self) -> RecordDict:
        return RecordDict({"refusal": ConfigRecord({"kind": self.kind, "reason": str(self.reason)})})

    @classmethod
    @reads
    def from_records(cls, records: RecordDict) -> "Refusal":
        """Read what a server sent. A kind that a later release added becomes OTHER. Raises WireError."""
        fields = config_of(records, "refusal")
        kind, reason = strings([fields["kind"], fields["reason"]], "kind and reason")
        return cls(kind if kind in KINDS else OTHER, as_told(reason, _LONGEST))
