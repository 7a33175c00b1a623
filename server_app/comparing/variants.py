"""Named rows of a comparison, and grids over settings: how they are written, and what each run of them gets after `--set`.

A variant is an algorithm with settings of its own and a name, so that a table can have one algorithm twice. A grid is a setting
with the values to choose from; it holds for every variant that knows the setting and does not set it by itself.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.config.checks import check_choice
from quickbloom.common.config.key_value import assignment, scalar
from quickbloom.common.config.run import RunConfig, Scalar
from quickbloom.common.errors import ConfigError
from quickbloom.server_app.launch.settings import parse_assignments

ELSEWHERE = {"algorithm": "--algorithms", "dataset": "--dataset", "seed": "--seeds", "output-dir": "--output"}
"""Settings that a comparison has options for."""
_SHARED = {"rounds": "--rounds", "validation-tasks": "--set", "test-tasks": "--set", "split": "--set", "metric": "--set"}
"""Settings that must be the same for all rows, and where they are set: else rows had other rounds, tasks or scores."""
_NAME = re.compile(r"[^\s,:|=/\\&][^,:|=/\\&\n\r\t]{0,59}")
_SHAPE = "`--variant` must look like NAME:ALGORITHM,setting=value or NAME:ALGORITHM.setting=value"


@dataclass(frozen=True)
class Variant:
    """A row of the table. `settings`: texts "key=value" that it has beside those of all runs."""

    name: str
    algorithm: str
    settings: tuple[str, ...] = ()

    @property
    def keys(self) -> set[str]:
        """The settings that it decides by itself, with their tables."""
        return set(parse_assignments(list(self.settings), self.algorithm))

    def __str__(self) -> str:
        """As it is written after `--variant`."""
        return f"{self.name}:{','.join([self.algorithm, *self.settings])}"


@dataclass(frozen=True)
class Grid:
    """A setting and the values to choose from, as texts in the order in which they were given."""

    key: str
    values: tuple[str, ...]

    def key_for(self, algorithm: str) -> str | None:
        """The setting with its table, as runs of this algorithm have it; None if it is one of another algorithm."""
        (key,) = parse_assignments([f"{self.key}={self.values[0]}"], algorithm)
        table = key.rpartition(".")[0]
        if table in ALGORITHMS and table != algorithm:
            return None
        return key if table or key in {field.alias for field in RunConfig.model_fields.values()} else None

    def __str__(self) -> str:
        """As it is written after `--grid`."""
        return f"{self.key}={','.join(self.values)}"


def plain(algorithm: str) -> Variant:
    """An algorithm under its own name, with no settings of its own."""
    return Variant(algorithm, algorithm)


def parse_variant(text: str) -> Variant:
    """Return the variant of "fedrep:heads,heads.head-steps=5" or "fedper:heads.head-steps=0". Raises ConfigError.

    A part without "=" belongs to the value before it: "x:heads,heads.head=a,b".
    """
    name, colon, rest = text.partition(":")
    if not colon or not _NAME.fullmatch(name.strip()):
        raise ConfigError(f"{_SHAPE}, got '{text}'")
    parts: list[str] = []
    for part in map(str.strip, rest.split(",")):
        if "=" in part or not parts or "=" not in parts[-1]:
            parts.append(part)
        else:
            parts[-1] += f",{part}"
    algorithm, settings = ("", parts) if "=" in parts[0] else (parts[0], parts[1:])
    if not all(re.fullmatch(r"[^=\s]+\s*=.*", one) for one in settings):
        raise ConfigError(f"{_SHAPE}, got '{text}'")
    return _checked(Variant(name.strip(), algorithm or _algorithm_of(settings, text), tuple(settings)), text)


def _checked(found: Variant, text: str) -> Variant:
    check_choice("algorithm", found.algorithm, ALGORITHMS)
    for key in found.keys:
        _refuse_shared(key, f"`--variant {text}`")
    return found


def variant_of(name: str, settings: Mapping[str, Scalar]) -> Variant:
    """Return the variant of settings by name, with the algorithm among them or in a setting's table. Raises ConfigError."""
    texts = [assignment(key.replace("_", "-"), value) for key, value in settings.items() if key != "algorithm"]
    algorithm = str(settings.get("algorithm") or _algorithm_of(texts, f"{name}:{','.join(texts)}"))
    if any("," in text for text in texts):  # the text form would cut them
        return _checked(Variant(name, algorithm, tuple(texts)), name)
    return parse_variant(f"{name}:{','.join([algorithm, *texts])}")


def _algorithm_of(settings: Sequence[str], text: str) -> str:
    tables = {table for one in settings if (table := one.partition("=")[0].rpartition(".")[0].strip()) in ALGORITHMS}
    if len(tables) != 1:
        raise ConfigError(f"`--variant {text}` must name one algorithm: write NAME:ALGORITHM,setting=value")
    return tables.pop()


def parse_grid(text: str) -> Grid:
    """Return the grid of "inner-lr=0.01,0.1". Raises ConfigError."""
    key, equals, rest = (part.strip() for part in text.partition("="))
    values = tuple(dict.fromkeys(value for part in rest.split(",") if (value := part.strip())))
    if not equals or not key or not values:
        raise ConfigError(f"`--grid` must look like setting=value,value,value, got '{text}'")
    _refuse_shared(key, f"`--grid {text}`")
    return Grid(key, values)


def _refuse_shared(key: str, what: str) -> None:
    if option := {**ELSEWHERE, **_SHARED}.get(key):
        raise ConfigError(f"{what} must not set `{key}`, which all rows share: use `{option}`")
    if key in ("resume-from", "adapt-lrs"):
        reason = "all rows are adapted with the same rates" if key == "adapt-lrs" else "a comparison goes on by itself"
        raise ConfigError(f"{what} must not set `{key}`, because {reason}: leave it out")


def contenders(algorithms: Sequence[str], variants: Sequence[Variant]) -> tuple[Variant, ...]:
    """Return all rows in order, algorithms under their own names first. Raises ConfigError for a name that is there twice."""
    rows = (*map(plain, dict.fromkeys(algorithms)), *variants)
    if not rows:
        raise ConfigError("a comparison needs something to compare: name it with `--algorithms` or `--variant`")
    names = [row.name for row in rows]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"`--variant` must give every row a name of its own, got '{twice[0]}' twice: choose another")
    return rows


def points(searched: Mapping[str, Sequence[str]]) -> list[tuple[str, ...]]:
    """Return what each candidate gets after `--set`: every combination of the values; one empty one if nothing is searched."""
    return [
        tuple(f"{key}={value}" for key, value in zip(searched, chosen, strict=True)) for chosen in product(*searched.values())
    ]


def at_the_edge(value: str, values: Sequence[str]) -> bool:
    """Whether a value is the lowest or the highest number of several: a better one may lie beyond. Texts have no edge."""
    numbers = [_number(one) for one in values]
    if len(set(numbers)) < 2 or any(number is None for number in numbers):
        return False
    known = [number for number in numbers if number is not None]
    return _number(value) in (min(known), max(known))


def _number(text: str) -> float | None:
    value = scalar(text)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None
