"""events.jsonl in a run directory: one line of JSON for each event, as it happens."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from quickbloom.common.system.whole_files import whole
from quickbloom.server_app.events.kinds import Ended, Event, Stopped, from_line, to_line

FILE = "events.jsonl"


class EventFile:
    """Adds every event to the file, where it can be read at once."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def __call__(self, event: Event) -> None:
        self._file.write(to_line(event) + "\n")
        self._file.flush()


@contextmanager
def written(directory: Path, before: Iterable[Event] = ()) -> Iterator[EventFile]:
    """Return a new file that begins with the events `before`; those of an older file are replaced at once, or not at all."""
    path = directory / FILE
    with whole(path) as file:
        file.writelines(to_line(event) + "\n" for event in before)
    with path.open("a", encoding="ascii") as file:
        yield EventFile(file)


def read_events(directory: Path) -> list[Event]:
    """Return the events of a run so far. A line that is damaged or still being written is left out."""
    path = directory / FILE
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return [event for line in lines if (event := from_line(line)) is not None]


def events_until(directory: Path, last_round: int) -> list[Event]:
    """Return the events of an interrupted run up to this round, without its end."""
    events = read_events(directory)
    return [event for event in events if not isinstance(event, Ended | Stopped) and getattr(event, "round", 0) <= last_round]
