"""Untrusted text made safe to print: always one printable line, in logs, errors, tables and files.

A line break in a task's name could forge a line of the server's log. An escape sequence could rewrite the
terminal, and marks that change the direction of text could mislead the reader.
"""

import logging
import unicodedata
from collections.abc import Iterable

MOST = 200
"""Longest allowed name of a task, in characters."""
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories to hide: control and format characters, lone surrogates, line and paragraph separators."""
_JOINERS = "\u200c\u200d"
"""Zero-width joiners, which some languages need inside words."""


def one_line(text: str) -> str:
    """Return `text` with a space in place of every hidden character."""
    return text if text.isascii() and text.isprintable() else "".join(" " if _hidden(sign) else sign for sign in text)


def as_told(text: str, most: int = 300) -> str:
    """Return text from another machine for use in a sentence: printable, on one line, at most `most` characters."""
    # Cut first: the text may be as long as a whole message.
    printable = "".join(sign if sign.isprintable() else " " for sign in text[: 4 * most])
    words = " ".join(printable.split())
    return words if len(words) <= most and len(text) <= 4 * most else words[: most - 3] + "..."


def flaw_of(name: str) -> str | None:
    """Return in words what makes a task's name unfit to print; None if nothing does."""
    if len(name) > MOST:
        return f"it has {len(name)} characters, {MOST} are the most"
    if name.isascii() and name.isprintable():
        return None  # nearly always so, and a simulation looks at the names of all tasks once for every node
    sign = next((sign for sign in name if _hidden(sign)), None)
    return None if sign is None else f"it holds the character U+{ord(sign):04X}, which is invisible"


def flawed(names: Iterable[str]) -> tuple[str, str] | None:
    """Return the first name that is unfit to print, made printable, and its flaw; None if all are fit."""
    for name in names:
        if flaw := flaw_of(name):
            return as_told(name, 60), flaw
    return None


class OneLine(logging.Filter):
    """A log filter that makes every message one printable line and keeps its leading tabs."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        rest = text.lstrip("\t")
        record.msg, record.args = text[: len(text) - len(rest)] + one_line(rest), None
        return True


_FILTER = OneLine()


def keep_log_to_lines() -> None:
    """Make every message that this process writes to Flower's log one printable line."""
    logger = logging.getLogger("flwr")
    if _FILTER not in logger.filters:
        logger.addFilter(_FILTER)


def _hidden(sign: str) -> bool:
    return sign not in _JOINERS and unicodedata.category(sign) in _HIDDEN
