"""What happened last on this device, in the file `status.json` of its `state-dir`, for its owner alone. It is never sent.

Only this module writes it. The file is small whatever a server or a data set says, and replaced whole. A device that cannot
write it works all the same. The reader takes any file: what it cannot read it leaves out.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quickbloom import __version__
from quickbloom.common.errors import QuickbloomError, as_told
from quickbloom.common.system import locks
from quickbloom.common.system.locks import is_locked, locked
from quickbloom.common.system.whole_files import write_private

FILE = "status.json"
_WRITING, _THERE = "status.lock", "join.lock"
"""Files whose locks are held while the diary is changed, and as long as `quickbloom-edge join` goes on."""
_MOST_TASKS = 50
"""Most tasks that are left out to name."""
_LONGEST = 1500
_LARGEST = 1_000_000
"""Bytes above which a file is none of this module's."""

SERVER, DEVICE = "the server", "this device"
_WORK = ("train", "evaluate", "query.keep")
"""Messages that only a node gets that takes part."""

Facts = dict[str, Any]


def read(state: Path) -> Facts:
    """Return what is known of the device with this folder, by section; {} if there is no file, or one that cannot be read."""
    try:
        file = state / FILE
        facts = json.loads(file.read_text(encoding="utf-8")) if file.stat().st_size <= _LARGEST else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def section(facts: Mapping[str, Any], name: str) -> Facts:
    """Return a section of the facts; {} if there is none."""
    found = facts.get(name)
    return found if isinstance(found, dict) else {}


def number(facts: Mapping[str, Any], name: str) -> int:
    """Return a count; 0 if there is none."""
    found = facts.get(name)
    return found if isinstance(found, int) and found > 0 else 0


def is_there(state: Path) -> bool | None:
    """Return whether `quickbloom-edge join` goes on with this folder; None where that cannot be known (Windows)."""
    if locks.fcntl is None:
        return None
    try:
        return is_locked(state / _THERE)
    except OSError:
        return False


def _change(state_dir: str, change: Callable[[Facts], None]) -> None:
    """Change the facts of a device. Nothing happens without a folder, or where it cannot be written."""
    if not state_dir:
        return
    with suppress(OSError, RuntimeError):  # RuntimeError: a user without a home directory
        folder = Path(state_dir).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / _WRITING, create=True, wait=True):
            facts = read(folder)
            change(facts)
            facts["version"] = __version__
            write_private(folder / FILE, json.dumps(facts, indent=1) + "\n")


class Visit:
    """One run of `quickbloom-edge join`. `code`: its exit code, once it has one."""

    def __init__(self, state_dir: str) -> None:
        self._state_dir = state_dir
        self.code: int | None = None

    def connected(self) -> None:
        """Note that the checks are done, and the server answered."""
        self._set(connected=_now())

    def _set(self, **told: Any) -> None:
        def change(facts: Facts) -> None:
            facts["join"] = section(facts, "join") | told

        _change(self._state_dir, change)


@contextmanager
def visiting(state_dir: str, server: str) -> Iterator[Visit]:
    """Note that the device takes part in the federation at `server` until the block ends, and how it ends."""
    visit = Visit(state_dir)

    def begin(facts: Facts) -> None:
        facts["join"] = {"server": as_told(server), "began": _now()}

    _change(state_dir, begin)
    with ExitStack() as held:
        if state_dir:
            with suppress(OSError, RuntimeError):
                held.enter_context(locked(Path(state_dir).expanduser() / _THERE, create=True))
        try:
            yield visit
        except QuickbloomError as error:
            visit._set(ended=_now(), why=as_told(str(error), _LONGEST))
            raise
        except KeyboardInterrupt:
            visit._set(ended=_now(), why="")
            raise
        why = f"Flower's SuperNode ended with exit code {visit.code}: its last lines in the log say why" if visit.code else ""
        visit._set(ended=_now(), why=why)


def note_roll_call(state_dir: str, tasks: int, left_out: Mapping[str, str]) -> None:
    """Note what this device told in a roll call: its number of tasks, and those that cannot be used, each with the reason."""

    def change(facts: Facts) -> None:
        named = list(left_out.items())[:_MOST_TASKS]
        told = {as_told(task): as_told(why) for task, why in named}
        facts["tasks"] = {"at": _now(), "usable": tasks, "left-out": told, "left-out-in-all": len(left_out)}

    _change(state_dir, change)


def note_kept(state_dir: str, count: int, run: str) -> None:
    """Note how many personal models this device made of the model of a run."""

    def change(facts: Facts) -> None:
        facts["personal"] = {"at": _now(), "count": count, "run": as_told(run)}

    _change(state_dir, change)


def note_message(state_dir: str, kind: str, run: str, number_: str, error: str = "") -> None:
    """Note a message of a run and what became of it. `number_`: its round in words; `error`: why there was no result, or ""."""

    def change(facts: Facts) -> None:
        now = _now()
        facts["message"] = {"at": now, "what": as_told(kind)}
        last = section(facts, "run")
        if last.get("id") != run:
            last = {"id": run, "began": now, "rounds": 0}
        last["at"] = now
        if error:
            facts["refusal"] = _refusal(DEVICE, kind, error)
        elif kind.startswith(_WORK) or section(facts, "refusal").get("by") == DEVICE:
            facts.pop("refusal", None)
        if kind.startswith("train") and not error and last.get("round") != number_:
            last |= {"round": as_told(number_), "rounds": number(last, "rounds") + 1}
            facts["rounds"] = number(facts, "rounds") + 1
        facts["run"] = last

    _change(state_dir, change)


def note_refusal(state_dir: str, kind: str, reason: str) -> None:
    """Note that the server does not let this device take part. `kind`: one of `refusal.KINDS`."""

    def change(facts: Facts) -> None:
        facts["refusal"] = _refusal(SERVER, kind, reason)

    _change(state_dir, change)


def _refusal(by: str, kind: str, reason: str) -> Facts:
    return {"at": _now(), "by": by, "kind": as_told(kind), "reason": as_told(reason, _LONGEST)}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
