"""What a device knows of itself, in its owner's words: does it take part, if not why, and what to do."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from quickbloom.client_app.owner.diary import DEVICE, Facts, is_there, number, read, section
from quickbloom.common.errors import ConfigError, as_told
from quickbloom.common.formatting import counted
from quickbloom.common.wire.refusal import OTHER

_CHECK = "look at your file with `quickbloom-edge check-data`"
_ASK = "whoever runs the federation"
REFUSALS = {
    "columns": (
        "the columns or classes of its file are not those of the other devices",
        f"{_CHECK}, and rename columns or classes as the others call them; or ask {_ASK} to choose with `own.features` and "
        "`own.classes`",
    ),
    "form": (
        "its data have another form than those of the other devices, such as other columns or another number of classes",
        f"{_CHECK}, and ask {_ASK} which columns and classes the run has",
    ),
    "encoder": (
        "its encoder is another one than that of the other devices",
        f"get the files of the encoder from {_ASK}, and name them with `--encoder`",
    ),
    "constants": (
        "the part of its model that is not trained is another one than the server's",
        "install the server's release of quickbloom, and use the same file of weights (`--set weights=FILE`)",
    ),
    "task": (
        "another device takes part with a task of the same name",
        "give yours another name with `--task-name` or in the file; if the other one is this device with an older key, wait "
        "until the server has noticed that it is away",
    ),
    "tasks": (
        "none of its tasks can take part in this run",
        "leave the device as it is: it is asked again in the next run",
    ),
    OTHER: ("the server does not let it take part", f"ask {_ASK}"),
}
"""For every kind of refusal what does not fit, and what to do."""


def refusal_in_words(by: str, kind: str, reason: str) -> list[str]:
    """Return sentences on a refusal. `by`: who noticed; a sentence of this device's own says what to do by itself."""
    if by == DEVICE:
        return [f"{reason}."]
    sentence, todo = REFUSALS.get(kind, REFUSALS[OTHER])
    return [f"{sentence}.", f"What to do: {todo}.", f"The server says: {as_told(reason, 1500)}."]


@dataclass(frozen=True)
class Status:
    """What the folder `state` of a device says. `there`: whether `quickbloom-edge join` runs now, None if not known."""

    state: Path
    facts: Facts
    there: bool | None

    @classmethod
    def of(cls, state: Path) -> "Status":
        """Read a folder. Raises ConfigError if no device has noted anything there."""
        if not (facts := read(state)):
            raise ConfigError(
                f"`--state` must be the folder of a device that has taken part, got '{state}', which holds no readable "
                "status.json: name the one that `quickbloom-edge join` was given"
            )
        return cls(state, facts, is_there(state))

    @property
    def well(self) -> bool:
        """Whether nothing waits for the owner: the device takes part, or was stopped by them, and nothing does not fit."""
        return not any(self._troubles())

    def _troubles(self) -> Iterator[str]:
        """Yield what the owner should look at."""
        join, tasks = section(self.facts, "join"), section(self.facts, "tasks")
        if why := join.get("why"):
            yield f"It stopped at {_time(join.get('ended'))}: {_text(why)}."
        elif join and "ended" not in join and self.there is False:
            yield (
                f"It joined at {_time(join.get('began'))} and does not run any more, without having said why: the machine was "
                "switched off, or the program was killed. Start it again."
            )
        if refusal := self._refusal(current=True):
            yield f"It does not take part since {_time(refusal.get('at'))}: {_reason(refusal)}"
        if tasks and not number(tasks, "usable") and number(tasks, "left-out-in-all"):
            yield "None of its tasks can be used, for the reasons below."

    def _refusal(self, *, current: bool) -> Facts:
        """Return the last refusal if it came before this `join`, or, if `current`, since then; else {}."""
        refusal = section(self.facts, "refusal")
        since = str(section(self.facts, "join").get("began", ""))
        return refusal if (str(refusal.get("at", "")) >= since) == current else {}

    def lines(self) -> list[str]:
        """Return all of it in sentences."""
        join = section(self.facts, "join")
        where = _text(join["server"]) if "server" in join else "a federation that it did not join by `quickbloom-edge join`"
        return [f"Device of {where}, folder {self.state}", *self._presence(), *self._troubles(), *self._remarks()]

    def _presence(self) -> Iterator[str]:
        join = section(self.facts, "join")
        if self.there:
            yield f"It runs since {_time(join.get('began'))}."
            if connected := join.get("connected"):
                yield f"The server answered at {_time(connected)}, and took this device's clock."
            else:
                yield "The server has not answered yet."
        elif join.get("ended") and not join.get("why"):
            yield f"It was stopped at {_time(join['ended'])}, as its owner asked."
        elif not join or self.there is None:
            yield "Whether it runs now is not known here."

    def _remarks(self) -> Iterator[str]:
        if earlier := self._refusal(current=False):
            yield f"Before it joined for the last time, at {_time(earlier.get('at'))}, it did not take part: {_reason(earlier)}"
        message, run = section(self.facts, "message"), section(self.facts, "run")
        yield f"Last message of the server: {_time(message.get('at'))}." if message else "The server has sent nothing yet."
        if run:
            rounds, last, in_all = number(run, "rounds"), run.get("round"), number(self.facts, "rounds")
            which = f", the last of them round {_text(last)}" if rounds else ""
            yield (
                f"Last run: number {_text(run.get('id'))}, from {_time(run.get('began'))} to {_time(run.get('at'))}; "
                f"it trained in {counted(rounds, 'round')}{which}. In all runs: {counted(in_all, 'round')}."
            )
        yield from self._of_tasks()
        if personal := section(self.facts, "personal"):
            count = number(personal, "count")
            yield (
                f"Personal models: {count}, made at {_time(personal.get('at'))} from the run {_text(personal.get('run'))}, in "
                f"{self.state / 'personal'}."
            )

    def _of_tasks(self) -> Iterator[str]:
        tasks = section(self.facts, "tasks")
        if tasks:
            yield f"Tasks that it offers: {number(tasks, 'usable')}."
        left_out, count = section(tasks, "left-out"), number(tasks, "left-out-in-all")
        if left_out:
            yield f"Left out: {counted(count, 'task')}."
            yield from (f"  {_text(task)}: {_text(why)}" for task, why in left_out.items())
            if count > len(left_out):
                yield f"  and {count - len(left_out)} more"

    def to_json(self) -> dict[str, Any]:
        """Return the facts for a program, with `state`, `well`, `running` and the troubles in words."""
        return {
            "state": str(self.state),
            "well": self.well,
            "running": self.there,
            "troubles": list(self._troubles()),
            **{name: facts for name, facts in self.facts.items() if name != "state"},
        }


def folders(base: Path) -> list[Path]:
    """Return the folders of this user's devices in `base`, the newest word first."""
    found = [file.parent for file in base.glob("*/status.json") if read(file.parent)]
    return sorted(found, key=lambda folder: (folder / "status.json").stat().st_mtime, reverse=True)


def _reason(refusal: Facts) -> str:
    return " ".join(refusal_in_words(_text(refusal.get("by")), _text(refusal.get("kind")), _text(refusal.get("reason"))))


def _text(value: object) -> str:
    return as_told(str(value), 1500)


def _time(value: object) -> str:
    """Return a moment for people, such as "2026-11-30 12:10 UTC"."""
    try:
        return f"{datetime.fromisoformat(str(value)):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return "an unknown time"
