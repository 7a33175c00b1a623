"""Words of others as part of what a person reads: always one printable line, in logs, errors, tables and files.

A line break in the name of a task could otherwise end a line of the log and begin one that looks like the server's own; an
escape sequence could rewrite what a terminal shows, and marks that turn the direction of text what a reader sees.
"""

import logging
import unicodedata
from collections.abc import Iterable

MOST = 200
"""Characters of the name of a task."""
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Control characters, marks without a shape of their own, halves of characters, and what breaks lines."""
_JOINERS = "\u200c\u200d"
"""Marks that belong to words of some languages."""


def one_line(text: str) -> str:
    """`text` with a blank for every character that is not to be seen."""
    return text if text.isascii() and text.isprintable() else "".join(" " if _hidden(sign) else sign for sign in text)


def as_told(text: str, most: int = 300) -> str:
    """What another machine said, as part of a sentence: printable, on one line, at most `most` characters."""
    # Cut before it is looked at: it may be as long as a message can be.
    printable = "".join(sign if sign.isprintable() else " " for sign in text[: 4 * most])
    words = " ".join(printable.split())
    return words if len(words) <= most and len(text) <= 4 * most else words[: most - 3] + "..."


def flaw_of(name: str) -> str | None:
    """What is wrong with the name of a task, in words; None if it can be told as it is."""
    if len(name) > MOST:
        return f"it has {len(name)} characters, {MOST} are the most"
    sign = next((sign for sign in name if _hidden(sign)), None)
    return None if sign is None else f"it holds the character U+{ord(sign):04X}, which is not to be seen"


def flawed(names: Iterable[str]) -> tuple[str, str] | None:
    """(the first of these names that cannot be told as it is, shown so that it can; what is wrong with it), or None."""
    for name in names:
        if flaw := flaw_of(name):
            return as_told(name, 60), flaw
    return None


class OneLine(logging.Filter):
    """Makes one printable line of every message; tabs that it begins with stay."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        rest = text.lstrip("\t")
        record.msg, record.args = text[: len(text) - len(rest)] + one_line(rest), None
        return True


_FILTER = OneLine()


def keep_log_to_lines() -> None:
    """From now on whatever this process tells Flower's log is one printable line a time."""
    logger = logging.getLogger("flwr")
    if _FILTER not in logger.filters:
        logger.addFilter(_FILTER)


def _hidden(sign: str) -> bool:
    return sign not in _JOINERS and unicodedata.category(sign) in _HIDDEN
