"""The kinds of events of a run, and each of them as one line of JSON.

A reader passes over what it does not know: an event of a kind or a field that only a newer version has, and a line that is
damaged. A number that is not finite (a run that diverges) is null in JSON, and NaN when it is read.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter

from quickbloom.common.errors import DataError
from quickbloom.common.metric import named

Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]

_DATA, _RESULT = ("algorithm", "dataset", "seed", "tasks"), ("rounds", "chosen", "test", "validation")
IN_SUMMARY = frozenset((*_DATA, *_RESULT, "run_dir", "bytes", "seconds", "failures"))
"""What every summary has."""


def _known(name: str) -> str:
    try:
        return named(name).name
    except DataError as error:  # a reader passes over scores by a metric that only a newer version has
        raise ValueError(str(error)) from None


@dataclass(frozen=True)
class Started:
    """The run has a directory. `done`: rounds that are done already, of a run that goes on."""

    run_dir: str
    algorithm: str
    data: str
    seed: int
    rounds: int
    done: int = 0
    kind: Literal["started"] = "started"


@dataclass(frozen=True)
class RollCalled:
    """The nodes have said which tasks they host. `tasks`: how many are in each split.

    `software`: how many nodes run each combination of releases, as "flwr 1.39.0, python 3.12.3, ..".
    """

    nodes: int
    tasks: dict[str, int]
    software: dict[str, int] = field(default_factory=dict)
    kind: Literal["roll-call"] = "roll-call"


@dataclass(frozen=True)
class Scored:
    """The validation tasks were scored after a round: the mean before and after `adapt_steps` steps with `adapt_lr`.

    `metric`: the name of one of `common.metric`, such as "accuracy" (0..1); `tasks`: how many were scored.
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

    `asked` and `answered` count messages, `away` nodes that host tasks but cannot be asked, `failures` answers that were of no
    use or did not come. `up` and `down`: bytes. `skipped`: why the model stayed as it is, "" if it did not.
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
    kind: Literal["round"] = "round"

    @classmethod
    def of(cls, record: dict[str, Any], rounds: int) -> "RoundEnded":
        """That of a line of history.jsonl, in a run of so many rounds."""
        # A round that was only scored has no training.
        train = record.get("train") or {"loss": None, "tasks": 0}
        nodes, sent = record["nodes"], record["bytes"]
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
        )


@dataclass(frozen=True)
class Warned:
    """Something that a person should know. `round`: the one in which it was found, 0 before the first."""

    sentence: str
    round: int = 0
    kind: Literal["warning"] = "warning"


@dataclass(frozen=True)
class Failed:
    """An answer that is of no use, or did not come. `who`: "node 7" or "task A"."""

    who: str
    reason: str
    round: int = 0
    kind: Literal["failure"] = "failure"

    @property
    def sentence(self) -> str:
        """In words: "Node 7: its reply is of no use"."""
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
    """The run cannot go on. `reason`: one sentence for the user."""

    reason: str
    kind: Literal["stop"] = "stop"


Event = Started | RollCalled | Scored | RoundEnded | Warned | Failed | Saved | Ended | Stopped
KINDS: tuple[type[Event], ...] = get_args(Event)
_READER: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])


def to_line(event: Event) -> str:
    """An event as one line of JSON, in ASCII; whatever could break a line or move a cursor is escaped."""
    return json.dumps(finite({"kind": event.kind, **asdict(event)}), allow_nan=False).replace("\x7f", "\\u007f")


def from_line(line: str | bytes) -> Event | None:
    """The event that `to_line` made this line of; None if it is none, or one of a kind that is not known here."""
    try:
        event = _READER.validate_python(json.loads(line))
    except (ValueError, RecursionError):
        return None
    return None if isinstance(event, Ended) and not event.summary.keys() >= IN_SUMMARY else event


def finite(value: Any) -> Any:
    """The same for JSON: null for NaN and infinity, as the standard wants it."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
