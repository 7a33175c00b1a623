"""What a command says, for machines: a line of JSON each on stderr, and a file that is rotated by its size.

Three kinds of lines come together here: those of our own commands (`common.system.terminal`), the log of a program that they
started (`relay`), and Python's logging in a process of Flower's (`forward`). Each line of JSON has `time` (UTC, ISO 8601),
`level`, `logger` and `message`, with `run`, `node` and `round` where they are known, and `exception` where there was one.
"""

import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import typer

from quickbloom.common.errors import ConfigError
from quickbloom.common.printable import one_line
from quickbloom.common.system import terminal

KEEP = 5
"""Earlier files that are kept: FILE.1 is the newest of them."""
VARIABLE = "QUICKBLOOM_LOG"
"""Variable by which a process of Flower's is told, as JSON."""
_TAKEN = "_quickbloom_taken"
_OURS, _WARNINGS = "quickbloom", "py.warnings"
_FLOWERS = re.compile(r"^(?:\x1b\[\d+m)?(DEBUG|INFO|WARNING|ERROR|CRITICAL) *(?:\x1b\[0m)? *: *(.*)$")
_COLOURS = re.compile(r"\x1b\[[\d;]*m")
_SAID = {
    "round": re.compile(r"\bround[ =:]+(\d+)\b", re.IGNORECASE),
    "run": re.compile(r"\brun(?:[_-]?id)?[ =:]+(\d{6,})\b", re.IGNORECASE),
    "node": re.compile(r"\bnode(?:[_-]?id)?[ =:]+(\d{6,})\b", re.IGNORECASE),
}
"""What a line itself says; Flower's ids are long."""


class Format(StrEnum):
    """How lines are written."""

    TEXT = "text"
    JSON = "json"


FormatOption = Annotated[Format, typer.Option("--log-format", help="Lines for people, or a JSON object each on stderr.")]
FileOption = Annotated[
    Path | None,
    typer.Option("--log-file", help="Write them to this file as well.", show_default=False, readable=False),
]
SizeOption = Annotated[
    float, typer.Option("--log-size", help=f"MB after which it is; {KEEP} earlier ones are kept.", min=0.001)
]


@dataclass(frozen=True)
class Settings:
    """What the options of a command ask for. `megabytes`: the largest size of the file."""

    format: Format = Format.TEXT
    file: Path | None = None
    megabytes: float = 10.0

    def __bool__(self) -> bool:
        """Whether anything is asked for."""
        return self.format == Format.JSON or self.file is not None

    def to_environment(self) -> dict[str, str]:
        """Return the variable for `from_environment`; none if nothing is asked for."""
        file = str(self.file.expanduser().absolute()) if self.file else None
        return {VARIABLE: json.dumps(asdict(self) | {"file": file})} if self else {}


class JsonFormatter(logging.Formatter):
    """One JSON object for a record, in one line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return it. What the record's own message says of run, node and round counts before what is known of the process."""
        message = _COLOURS.sub("", record.getMessage()).strip()
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line: dict[str, Any] = {"time": moment, "level": record.levelname, "logger": record.name, "message": message}
        line |= _known | {name: int(said[1]) for name, pattern in _SAID.items() if (said := pattern.search(message))}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _Text(logging.Formatter):
    """A line for people, in a file."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%d %H:%M:%S")
        text = f"{moment} {record.levelname} {record.name}: {one_line(_COLOURS.sub('', record.getMessage()).strip())}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class _File(RotatingFileHandler):
    """A file that only the process which opened it rotates: a fork of it would leave it with the old one."""

    def __init__(self, path: Path, megabytes: float) -> None:
        super().__init__(path, maxBytes=int(megabytes * 1e6), backupCount=KEEP, encoding="utf-8", errors="backslashreplace")
        self._pid = os.getpid()

    def shouldRollover(self, record: logging.LogRecord) -> bool:  # noqa: N802
        """Whether the line would not fit; in a fork, never."""
        return os.getpid() == self._pid and bool(super().shouldRollover(record))


class _Log:
    """Where lines go in this process."""

    def __init__(self, settings: Settings) -> None:
        """Raises ConfigError if the file cannot be written."""
        self.is_json = settings.format == Format.JSON
        formatter = JsonFormatter() if self.is_json else _Text()
        self.handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)] if self.is_json else []
        if settings.file:
            self.handlers.append(_opened(settings.file, settings.megabytes))
        for handler in self.handlers:
            handler.setFormatter(formatter)

    def take(self, record: logging.LogRecord) -> None:
        for handler in self.handlers:
            handler.handle(record)

    def line(self, text: str, level: int, logger: str = _OURS) -> bool:
        """Write a line; return whether it is not to be shown in any other way."""
        if text.strip():
            self.take(logging.LogRecord(logger, level, "", 0, "%s", (text,), None))
        return self.is_json


_log: _Log | None = None
_known: dict[str, str | int] = {}
_level = logging.INFO
"""Of the newest line of `relay` that said its level; the lines of a traceback that follow have none."""


def begin(settings: Settings, **known: str | int) -> None:
    """From here on write what this process says as `settings` ask; with nothing asked for, as before.

    `known`: run, node or round, for all lines. Raises ConfigError if the file cannot be written.
    """
    global _log
    end()
    if settings:
        _log = _Log(settings)
        _known.update(known)
        terminal.hand_to(_log.line)
        if _log.is_json:
            logging.captureWarnings(capture=True)
            forward([logging.getLogger(_WARNINGS)])
            sys.excepthook = _excepted


def end() -> None:
    """Write as before `begin`, and close the file."""
    global _log
    if _log is not None:
        for handler in _log.handlers:
            handler.close()
        _log = None
        terminal.hand_to(None)
        logging.captureWarnings(capture=False)
        sys.excepthook = sys.__excepthook__
    _known.clear()


def know(**known: str | int) -> None:
    """From here on all lines have this run, node or round."""
    if _log is not None:
        _known.update(known)


def is_json() -> bool:
    """Return whether lines are JSON, and nothing else may be written to stderr."""
    return _log is not None and _log.is_json


def relay(line: str) -> bool:
    """Write a line of a program's output, Flower's log say; return whether it is not to be shown in any other way."""
    global _level
    if _log is None:
        return False
    found = _FLOWERS.match(line.rstrip("\n"))
    if found:
        _level = logging.getLevelNamesMapping()[found[1]]
    return _log.line(found[2] if found else line.rstrip("\n"), _level, "flwr")


def check(settings: Settings) -> None:
    """Raise ConfigError if the file of `settings` cannot be written."""
    if settings.file:
        _opened(settings.file, settings.megabytes).close()


def from_environment(environment: Mapping[str, str] = os.environ) -> Settings:
    """Return what VARIABLE asks for; nothing if there is none."""
    if VARIABLE not in environment:
        return Settings()
    asked = json.loads(environment[VARIABLE])
    return Settings(Format(asked["format"]), Path(asked["file"]) if asked["file"] else None, asked["megabytes"])


def forward(loggers: Iterable[logging.Logger]) -> None:
    """Let what these loggers write to a terminal go to the log of this process; to the terminal as well, unless it is JSON."""
    for logger in loggers:
        shown = [one for one in logger.handlers if type(one) is not _Forward and not isinstance(one, logging.FileHandler)]
        for handler in shown:
            logger.addHandler(_Forward(handler))
            if is_json():
                logger.removeHandler(handler)
        if not logger.handlers and (logger.parent is None or logger.name == _WARNINGS):
            logger.addHandler(_Forward(None))


class _Forward(logging.Handler):
    """Hands records on to the log of this process, those that another handler would have written."""

    def __init__(self, like: logging.Handler | None) -> None:
        super().__init__(like.level if like else logging.WARNING)  # that of what Python shows where there is no handler
        self.filters = list(like.filters) if like else []

    def emit(self, record: logging.LogRecord) -> None:
        # A record goes on to the handlers of its logger's parents.
        if _log is not None and not hasattr(record, _TAKEN):
            setattr(record, _TAKEN, True)
            _log.take(record)


def _opened(path: Path, megabytes: float) -> _File:
    try:
        path.expanduser().absolute().parent.mkdir(parents=True, exist_ok=True)
        return _File(path.expanduser().absolute(), megabytes)
    except OSError as error:
        raise ConfigError(
            f"`--log-file` must be a file that can be written, got '{path}' ({error.strerror or error})"
        ) from None


def _excepted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if _log is not None:
        _log.take(logging.LogRecord(_OURS, logging.CRITICAL, "", 0, "%s", (f"{kind.__name__}: {error}",), (kind, error, trace)))
