"""Base class of every settings model: kebab-case keys outside, snake_case fields inside, frozen, no unknown keys."""

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

from quickbloom.common.errors import ConfigError


def _kebab(name: str) -> str:
    return name.replace("_", "-")


class Options(BaseModel):
    """Settings of one part (an algorithm, a data set, a model). Every field has a default and a description.

    Types are strict: 3.0 is not an integer and "0.1" is not a number; an integer is accepted as a number.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, alias_generator=_kebab, populate_by_name=True, allow_inf_nan=False
    )


def refuse_idle(table: Options, keys: Iterable[str], why: str, name: str = "") -> None:
    """Raise ConfigError for one of the settings `keys` that is not at its default, since it decides nothing.

    `why`: what follows "does nothing" in the message; `name`: of the table, "" for the run's own settings.
    """
    for key in keys:
        field = key.replace("-", "_")
        value = getattr(table, field)
        if value != type(table).model_fields[field].default:
            raise ConfigError(f"`{f'{name}.' * bool(name)}{key}` does nothing {why}, got {value!r}: leave it out")


def _number_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Text = Annotated[str, BeforeValidator(_number_as_text)]
"""A list of numbers written as text ("64,64"); a single number needs no quotation marks."""
