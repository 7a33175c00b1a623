"""What the HTML files share: one self-contained page of sections, without scripts. Needs the extra `report`.

Everything that a page shows is text that jinja2 escapes, or a picture in an <img>, where nothing runs; a policy in the page
forbids scripts and whatever lies elsewhere. Names of tasks and nodes come from other people's files.
"""

import importlib.util
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from quickbloom.common.errors import DataError
from quickbloom.common.system.extras import needs
from quickbloom.common.system.whole_files import whole

_PACKAGES = ("matplotlib", "jinja2")
LISTED = 1000
"""Rows of a table at most; files of the run have the rest."""
_TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar = "text"
    text: str


@dataclass(frozen=True)
class Figures:
    """The few numbers that matter: (what, number, what one has to know of it)."""

    kind: ClassVar = "figures"
    items: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first cell names its row."""

    kind: ClassVar = "table"
    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """An SVG drawing for light and one for dark pages, as base64; `text` says the same to whoever does not see it."""

    kind: ClassVar = "picture"
    title: str
    text: str
    light: str
    dark: str


@dataclass(frozen=True)
class Code:
    """Lines as they stand in a terminal or a file; `label` names them."""

    kind: ClassVar = "code"
    label: str
    text: str


@dataclass(frozen=True)
class Fold:
    """What is only shown to whoever opens it."""

    kind: ClassVar = "fold"
    summary: str
    parts: Sequence["Part"]


Part: TypeAlias = Text | Figures | Table | Picture | Code | Fold


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    heading: str
    parts: Sequence[Part]

    @cached_property
    def anchor(self) -> str:
        return re.sub(r"\W+", "-", self.heading.lower()).strip("-")

    @cached_property
    def groups(self) -> list[list[Part]]:
        """The parts, with pictures that follow each other in one group: they stand side by side where there is room."""
        groups: list[list[Part]] = []
        for part in self.parts:
            if groups and isinstance(part, Picture) and isinstance(groups[-1][0], Picture):
                groups[-1].append(part)
            else:
                groups.append([part])
        return groups


def missing_packages() -> list[str]:
    """The packages of the extra `report` that are not installed."""
    return [name for name in _PACKAGES if importlib.util.find_spec(name) is None]


def require_packages() -> None:
    """Raise DataError with what to install."""
    for name in _PACKAGES:
        needs("report", name, "a report", error=DataError, load=False)


def write_page(path: Path, title: str, lead: str, sections: Sequence[Section]) -> Path:
    """Write a page to `path`, and return that. Raises DataError if it cannot be written. `lead`: a sentence below the title."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    html = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(title=title, lead=lead, sections=sections)
    try:
        with whole(path) as file:
            file.write(html)
    except OSError as error:
        raise DataError(f"the report '{path}' cannot be written ({error.strerror or error})") from None
    return path


def nan_for_null(value: Any) -> Any:
    """Lists of numbers with NaN where JSON has null: plots leave a gap there."""
    if isinstance(value, dict):
        return {key: nan_for_null(item) for key, item in value.items()}
    if isinstance(value, list):
        return [math.nan if item is None else nan_for_null(item) for item in value]
    return value
