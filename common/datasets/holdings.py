"""Who holds what of a table that is spread over simulated users: examples by class and part, as a table of text."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quickbloom.common.errors import as_told
from quickbloom.common.formatting import counted

Array = np.ndarray[Any, Any]
PARTS = ("support", "query", "test")
_MOST_USERS, _MOST_CLASSES = 100, 20
"""Rows and columns of the table of text."""
_WIDEST = 12


@dataclass(frozen=True)
class Holdings:
    """Who holds what: int64 [users, classes, 3], the examples in support, query and test. A quantity has one class, ""."""

    users: list[str]
    classes: list[str]
    counts: Array

    @property
    def sizes(self) -> Array:
        """The examples of every user: int64 [users]."""
        return self.counts.sum(axis=(1, 2))  # type: ignore[no-any-return]


def held(classes: Sequence[str], labels: Mapping[str, Sequence[Array]]) -> Holdings:
    """Return the holdings of users, by the classes in their three parts."""
    counts = [[np.bincount(part, minlength=len(classes)) for part in parts] for parts in labels.values()]
    by_part = np.array(counts, dtype=np.int64).reshape(-1, len(PARTS), len(classes))
    return Holdings(list(labels), list(classes), by_part.swapaxes(1, 2))


def in_words(found: Holdings) -> str:
    """Return one line on the sizes: "300 examples of 10 users, 8 to 45 each, half of them at least 30; .."."""
    sizes, some = found.sizes, (found.counts.sum(axis=2) > 0).sum(axis=1)
    of = f"{counted(int(sizes.sum()), 'example')} of {counted(len(sizes), 'user')}"
    line = f"{of}, {sizes.min()} to {sizes.max()} each, half of them at least {int(np.median(sizes))}"
    return line if found.classes == [""] else f"{line}; {some.min()} to {some.max()} of {len(found.classes)} classes each"


def table_of(found: Holdings) -> Iterator[str]:
    """Yield the lines of a table: a row for each user, their three parts, and how many examples they have of each class."""
    shown = [] if found.classes == [""] else found.classes[:_MOST_CLASSES]
    names = ["user", *PARTS, *(as_told(name, _WIDEST) for name in shown)]
    by_part, by_class = found.counts.sum(axis=1), found.counts.sum(axis=2)
    rows = [
        [as_told(user, 24), *map(str, by_part[place]), *(str(count or ".") for count in by_class[place, : len(shown)])]
        for place, user in enumerate(found.users[:_MOST_USERS])
    ]
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    for cells in (names, *rows):
        yield "  ".join(
            cell.ljust(width) if not at else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
    if len(found.users) > _MOST_USERS:
        yield f"and {len(found.users) - _MOST_USERS} more users"
    if len(shown) < len(found.classes) and shown:
        yield f"and {len(found.classes) - len(shown)} more classes"
