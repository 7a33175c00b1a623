"""The roll call, which begins every run: the messages between the server and all its nodes before anything is trained.

As in `common.wire.messages`, reading checks everything, and any flaw raises WireError.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from quickbloom.common.datasets.base import SPLITS, DataSpec, TaskInfo
from quickbloom.common.datasets.own.columns import LARGEST_NUMBER
from quickbloom.common.datasets.own.scales import Moments
from quickbloom.common.printable import as_told, flawed, one_line
from quickbloom.common.wire.checks import WireError, config_of, floats, ints, nothing_else, reads, short, strings, truth

PROTOCOL = 11
"""Version of the protocol, raised whenever an old node could not work with a new server."""

ROLL_CALL = "query.roll_call"
MOMENTS = "query.moments"
CONSTANTS = "query.constants"

_LONGEST_SCHEMA = 5_000_000
"""Limit in characters; 65,536 category keys take a quarter of it."""


def roll_call_request(agreed: str = "", scales: str = "") -> RecordDict:
    """Return the server's first request to every node. `agreed` and `scales`: see `tell_agreed`."""
    records = RecordDict({"request": ConfigRecord({"protocol": PROTOCOL})})
    tell_agreed(records, agreed, scales)
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
    personal models. `hears`: whether it understands a refusal (`common.wire.refusal`); older nodes do not say so, and do not.
    """

    spec: DataSpec
    tasks: list[TaskInfo]
    versions: dict[str, str]
    protocol: int = PROTOCOL
    left_out: Mapping[str, str] = field(default_factory=dict)
    keeps: bool = False
    hears: bool = False

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
        if self.hears:
            fields["hears"] = True
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
        (tokens,) = ints([fields["tokens"]], "tokens")
        keeps = fields["keeps"]
        if not isinstance(keeps, bool):
            raise WireError(f"`keeps` must be true or false, got {short(keeps)}")
        hears = truth(fields.get("hears", False), "hears")
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
        return cls(spec, tasks, packages, PROTOCOL, left_out, keeps, hears)


def tell_agreed(records: RecordDict, schema: str, scales: str = "") -> None:
    """Add what the nodes agreed on to a request.

    `schema`: that of the data (`DataSpec.schema`); "" if all found the same by themselves. `scales`: those that all tasks
    share, as `scales_to_json` writes them; "" if there are none, or the schema has them.
    """
    if schema or scales:
        records["agreed"] = ConfigRecord({"schema": schema, "scales": scales})


@reads
def told_agreed(records: RecordDict) -> tuple[str, str]:
    """Return the schema and the scales that `tell_agreed` added to a request; "" for what is not there."""
    if "agreed" not in records:
        return "", ""
    fields = config_of(records, "agreed")
    schema, scales = strings([fields["schema"], fields["scales"]], "schema and scales")
    return schema, scales


@dataclass(frozen=True)
class ConstantsReply:
    """A node's answer to the question for what its model has besides what is trained.

    `digest`: SHA-256 of these constants in hexadecimal, see `Learner.digest`; "" for none.
    """

    digest: str

    def to_records(self) -> RecordDict:
        return RecordDict({"constants": ConfigRecord({"digest": self.digest})})

    @classmethod
    @reads
    def from_records(cls, records: RecordDict) -> "ConstantsReply":
        fields = config_of(records, "constants")
        nothing_else(fields, {"digest"})
        (digest,) = strings([fields["digest"]], "digest")
        if not re.fullmatch("([0-9a-f]{64})?", digest):
            raise WireError(f"`digest` must be a SHA-256 in hexadecimal, got {short(digest)}")
        return cls(digest)


@dataclass(frozen=True)
class MomentsRequest:
    """Request for what the rows of these training tasks show together of every column of numbers."""

    task_ids: list[str]

    def to_records(self) -> RecordDict:
        return RecordDict({"request": ConfigRecord({"task-ids": self.task_ids})})

    @classmethod
    @reads
    def from_records(cls, records: RecordDict) -> "MomentsRequest":
        return cls(strings(config_of(records, "request")["task-ids"], "task-ids"))


@dataclass(frozen=True)
class MomentsReply:
    """Count, mean and sum of squared differences from it of every column of numbers, and of a target that is one.

    `classes`: rows of each class, [] for numbers.
    """

    moments: dict[str, Moments]
    classes: list[int]

    def to_records(self) -> RecordDict:
        found = self.moments.values()
        fields: dict[str, Any] = {
            "columns": list(self.moments),
            "counts": [one.count for one in found],
            "means": [one.mean for one in found],
            "squares": [one.squares for one in found],
            "classes": self.classes,
        }
        return RecordDict({"moments": ConfigRecord(fields)})

    @classmethod
    @reads
    def from_records(cls, records: RecordDict) -> "MomentsReply":
        fields = config_of(records, "moments")
        nothing_else(fields, {"columns", "counts", "means", "squares", "classes"})
        columns, counts = strings(fields["columns"], "columns"), ints(fields["counts"], "counts")
        means, squares = (floats(fields[name], name, len(columns)) for name in ("means", "squares"))
        if any(abs(mean) > LARGEST_NUMBER for mean in means):
            raise WireError(f"`means` must be at most {LARGEST_NUMBER:g}, got {short(means)}")
        if any(not 0 <= number <= count * (2 * LARGEST_NUMBER) ** 2 for number, count in zip(squares, counts, strict=True)):
            raise WireError(f"`squares` must be those of so many numbers up to {LARGEST_NUMBER:g}, got {short(squares)}")
        moments = map(Moments, counts, means, squares)
        return cls(dict(zip(columns, moments, strict=True)), ints(fields["classes"], "classes"))
