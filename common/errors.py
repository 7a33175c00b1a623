"""The errors that a user can mend; whatever else is raised is a defect of this program."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches


class QuickbloomError(Exception):
    """Base of the errors whose message is written for the user: one sentence that says what to change.

    `quoted`: the parts of it that are contents of the user's data, as they stand in it.
    """

    def __init__(self, sentence: str, *quoted: str) -> None:
        super().__init__(sentence)
        self.quoted = quoted

    def for_others(self) -> str:
        """The sentence without what it quotes, fit to leave the device."""
        sentence = str(self)
        for part in self.quoted:
            sentence = sentence.replace(" ".join(part.splitlines()), "(not told)")
        return sentence


class ConfigError(QuickbloomError):
    """A setting is unknown, has a wrong type, or has a value that cannot work."""


class DataError(QuickbloomError):
    """A data file is missing or unreadable, or its content does not fit the settings."""

    def __str__(self) -> str:
        # A name from a user's file, which the sentence quotes, may hold line breaks.
        return " ".join(super().__str__().splitlines())


FILE_TROUBLE = "a file could not be read or written"
"""How the sentence begins that ends a command for a full disk and the like."""


def as_told(text: str, most: int = 300) -> str:
    """What another machine said, as part of a sentence: printable, on one line, at most `most` characters."""
    # Cut before it is looked at: it may be as long as a message can be.
    printable = "".join(sign if sign.isprintable() else " " for sign in text[: 4 * most])
    words = " ".join(printable.split())
    return words if len(words) <= most and len(text) <= 4 * most else words[: most - 3] + "..."


def did_you_mean(name: str, known: Iterable[str], shown: Mapping[str, str] | None = None) -> str:
    """The end of a sentence that refuses `name`: ": did you mean `rounds`?", or nothing if none of `known` is like it.

    `shown`: what is to be typed for one that is known, if that is more than its name.
    """
    spelled = {other.casefold(): other for other in known}
    close = get_close_matches(name.casefold(), list(spelled), n=1)
    meant = spelled[close[0]] if close else ""
    return f": did you mean `{(shown or {}).get(meant, meant)}`?" if close else ""


def in_one_line(error: BaseException) -> str:
    """An exception of somebody else's as part of a sentence: its type and its text, without line breaks."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:297] + '...'}".removesuffix(": ").rstrip(".")
