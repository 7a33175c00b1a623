"""The kinds of events of a run, each of which can be one line of JSON.

A reader ignores what it does not know: kinds and fields of a newer version, and damaged lines. A
number that is not finite (from a run that diverges) is null in JSON, and NaN when it is read.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter

from quickbloom.common.errors import DataError
from quickbloom.common.formatting import counted
from quickbloom.common.metric import named

Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]

_DATA, _RESULT = ("algorithm", "dataset", "seed", "tasks"), ("rounds", "chosen", "test", "validation")
IN_SUMMARY = frozenset((*_DATA, *_RESULT, "run_dir", "bytes", "seconds", "failures"))
"""Keys of every summary."""


def _known(name: str) -> str:
    try:
        return named(name).name
    except DataError as error:  # a reader passes over scores by a metric that only a newer version has
        raise ValueError(str(error)) from None


@dataclass(frozen=True)
class Started:
    """The run has a directory. `done`: rounds that a continued run has done before."""

    run_dir: str
    algorithm: str
    data: str
    seed: int
    rounds: int
    done: int = 0
    kind: Literal["started"] = "started"


@dataclass(frozen=True)
class RollCalled:
    """The nodes have reported their tasks. `tasks`: number of tasks in each split.

    `software`: number of nodes that run each combination of releases, as "flwr 1.39.0, python 3.12.3, ..".
    """

    nodes: int
    tasks: dict[str, int]
    software: dict[str, int] = field(default_factory=dict)
    kind: Literal["roll-call"] = "roll-call"


@dataclass(frozen=True)
class Joined:
    """A node that came during the run takes part with its new tasks from here on. `round`: the one that goes on, or is next."""

    node: int
    tasks: int
    round: int = 0
    kind: Literal["joined"] = "joined"

    @property
    def sentence(self) -> str:
        """Return the event in words: "Node 7 joined with 4 tasks"."""
        return f"Node {self.node} joined with {counted(self.tasks, 'task')}"


@dataclass(frozen=True)
class Refused:
    """A node does not take part. `misfit`: what does not fit, such as "other columns or classes"; it quotes no data."""

    node: int
    misfit: str
    round: int = 0
    kind: Literal["refused"] = "refused"


@dataclass(frozen=True)
class Scored:
    """The validation tasks were scored after a round: the mean before and after `adapt_steps` steps with `adapt_lr`.

    `metric`: the name of one of `common.metric`, such as "accuracy" (0..1); `tasks`: number of scored tasks.
    """

    round: int
    metric: Annotated[str, AfterValidator(_known)]
    before: Number
    after: Number
    adapt_lr: float
    adapt_steps: int
    tasks: int
    kind: Literal["scores"] = "scores"


@dataclass(frozen=True)
class RoundEnded:
    """A round is over. `loss`: the mean query loss of its `tasks` training tasks after their inner loop.

    `asked` and `answered` count messages, `away` nodes that host tasks but cannot be asked,
    `failures` answers that were invalid or missing. `up` and `down`: bytes. `skipped`: why the
    model did not change, "" if it did. `virtual_hours`: virtual time of simulated devices, None without them.

    In mode async, else None, 0 and []: `staleness`: the mean over the contributions to this step, in steps; `dropped`:
    contributions that were too old for it; `at_work`: tasks that compute now; `rarely`: some that hardly ever contribute.
    """

    round: int
    rounds: int
    loss: Number
    tasks: int
    seconds: float
    asked: int = 0
    answered: int = 0
    away: int = 0
    failures: int = 0
    up: int = 0
    down: int = 0
    skipped: str = ""
    virtual_hours: float | None = None
    staleness: float | None = None
    dropped: int = 0
    at_work: int = 0
    rarely: list[str] = field(default_factory=list)
    kind: Literal["round"] = "round"

    @classmethod
    def of(cls, record: dict[str, Any], rounds: int, rarely: Sequence[str] = ()) -> "RoundEnded":
        """Return the event of a line of history.jsonl, in a run of so many rounds. `rarely`: who hardly ever contributes."""
        # A round that was only scored has no training.
        train = record.get("train") or {"loss": None, "tasks": 0}
        nodes, sent, asynchronous = record["nodes"], record["bytes"], record.get("async") or {}
        return cls(
            record.get("round", 0),
            rounds,
            train["loss"],
            train["tasks"],
            record["seconds"],
            nodes["asked"],
            nodes["answered"],
            len(nodes["away"]),
            len(record["failures"]),
            sent["up"],
            sent["down"],
            record.get("skipped", ""),
            record.get("virtual_hours"),
            mean_staleness(asynchronous.get("staleness", {})),
            asynchronous.get("dropped", 0),
            asynchronous.get("at-work", 0),
            list(rarely),
        )


def mean_staleness(counted: Mapping[str, int]) -> float | None:
    """Return the mean over contributions, in steps. `counted`: contributions by their staleness; None if there is none."""
    contributions = sum(counted.values())
    return sum(int(steps) * number for steps, number in counted.items()) / contributions if contributions else None


@dataclass(frozen=True)
class Warned:
    """A warning for a person. `round`: the round in which it was found, 0 before the first."""

    sentence: str
    round: int = 0
    kind: Literal["warning"] = "warning"


@dataclass(frozen=True)
class Failed:
    """An answer that is invalid or missing. `who`: "node 7" or "task A"."""

    who: str
    reason: str
    round: int = 0
    kind: Literal["failure"] = "failure"

    @property
    def sentence(self) -> str:
        """Return the event in words: "Node 7: its reply is of no use"."""
        return f"{self.who[:1].upper()}{self.who[1:]}: {self.reason}"


@dataclass(frozen=True)
class Saved:
    """A checkpoint was written. `file`: its path in the run directory."""

    round: int
    file: str
    kind: Literal["checkpoint"] = "checkpoint"


@dataclass(frozen=True)
class Ended:
    """The run came to its end. `summary`: as in summary.json."""

    summary: dict[str, Any] = field(default_factory=dict)
    kind: Literal["end"] = "end"


@dataclass(frozen=True)
class Stopped:
    """The run cannot continue. `reason`: one sentence for the user."""

    reason: str
    kind: Literal["stop"] = "stop"


Event = Started | RollCalled | Joined | Refused | Scored | RoundEnded | Warned | Failed | Saved | Ended | Stopped
KINDS: tuple[type[Event], ...] = get_args(Event)
_READER: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])


def to_line(event: Event) -> str:
    """Return an event as one line of ASCII JSON; characters that could break a line or move a cursor are escaped."""
    return json.dumps(finite({"kind": event.kind, **asdict(event)}), allow_nan=False).replace("\x7f", "\\u007f")


def from_line(line: str | bytes) -> Event | None:
    """Return the event of a line from `to_line`; None for another line, or an unknown kind."""
    try:
        event = _READER.validate_python(json.loads(line))
    except (ValueError, RecursionError):
        return None
    return None if isinstance(event, Ended) and not event.summary.keys() >= IN_SUMMARY else event


def finite(value: Any) -> Any:
    """Return values for JSON: null for NaN and infinity, as the standard requires."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
