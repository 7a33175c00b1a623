"""Errors that a user can mend. Any other exception is a defect of this program."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from quickbloom.common.printable import as_told as as_told
from quickbloom.common.printable import one_line as one_line


class OneLineError(Exception):
    """An error whose message may quote other machines or files: always one printable line."""

    def __init__(self, sentence: str = "") -> None:
        super().__init__(one_line(sentence))

    def __reduce__(self) -> tuple[Any, ...]:
        """Let another process have the error as it is, without calling `__init__`, whose arguments differ from kind to kind."""
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[OneLineError], arguments: tuple[Any, ...], facts: dict[str, Any]) -> OneLineError:
    error = kind.__new__(kind, *arguments)
    error.__dict__.update(facts)
    return error


class QuickbloomError(OneLineError):
    """Base of the errors whose message is written for the user: one sentence that says what to change.

    `quoted`: parts of the message copied from the user's data, exactly as they appear in it.
    """

    def __init__(self, sentence: str, *quoted: str) -> None:
        super().__init__(sentence)
        self.quoted = quoted

    def for_others(self) -> str:
        """Return the message without its `quoted` parts, so that it can leave the device."""
        sentence = str(self)
        for part in self.quoted:
            sentence = sentence.replace(one_line(part), "(not told)")
        return sentence


class ConfigError(QuickbloomError):
    """A setting is unknown, has a wrong type, or has a value that cannot work."""


class DataError(QuickbloomError):
    """A data file is missing or unreadable, or its content does not fit the settings."""


class RunError(QuickbloomError):
    """The run cannot go on: too few nodes answer, or the model is not finite any more."""


class JoinError(QuickbloomError):
    """This device cannot take part in a federation. The text says why and how to mend it."""


FILE_TROUBLE = "a file could not be read or written"
"""Start of the error message when a file operation fails, for example on a full disk."""


def did_you_mean(name: str, known: Iterable[str], shown: Mapping[str, str] | None = None) -> str:
    """Return a suggestion that ends an error message: ": did you mean `rounds`?", or "" if no name is close.

    `shown` maps a known name to the text to suggest, where that is more than the name itself.
    """
    spelled = {other.casefold(): other for other in known}
    close = get_close_matches(name.casefold(), list(spelled), n=1)
    meant = spelled[close[0]] if close else ""
    return f": did you mean `{(shown or {}).get(meant, meant)}`?" if close else ""


def in_one_line(error: BaseException) -> str:
    """Return the type and message of a foreign exception on one line, the message cut to 300 characters."""
    text = " ".join(one_line(str(error)).split())
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:297] + '...'}".removesuffix(": ").rstrip(".")
