"""The errors that a user can mend; whatever else is raised is a defect of this program."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from quickbloom.common.printable import as_told as as_told
from quickbloom.common.printable import one_line as one_line


class OneLineError(Exception):
    """An error whose message may quote what others have said: always one printable line."""

    def __init__(self, sentence: str = "") -> None:
        super().__init__(one_line(sentence))


class QuickbloomError(OneLineError):
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
            sentence = sentence.replace(one_line(part), "(not told)")
        return sentence


class ConfigError(QuickbloomError):
    """A setting is unknown, has a wrong type, or has a value that cannot work."""


class DataError(QuickbloomError):
    """A data file is missing or unreadable, or its content does not fit the settings."""


FILE_TROUBLE = "a file could not be read or written"
"""How the sentence begins that ends a command for a full disk and the like."""


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
    text = " ".join(one_line(str(error)).split())
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:297] + '...'}".removesuffix(": ").rstrip(".")
