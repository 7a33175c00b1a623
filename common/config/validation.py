"""One table of settings: from names and values to its model, or one sentence that says what is wrong with which key."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from quickbloom.common.errors import ConfigError, did_you_mean
from quickbloom.common.options import Options

T = TypeVar("T", bound=Options)


def keys(model: type[Options], table: str = "") -> dict[str, str]:
    """Return the names of the settings in a table, "" for the run's own, each with the key under which it can be set."""
    return {
        field.alias: f"{table}.{field.alias}" if table else field.alias for field in model.model_fields.values() if field.alias
    }


def validated(
    model: type[T], values: Mapping[str, Any], table: str = "", what: str = "setting", near: Mapping[str, str] | None = None
) -> T:
    """Return the settings of a table as its model. Raises ConfigError.

    `near`: names of other settings to suggest for a misspelled one, each with the text to type.
    """
    known, prefix = keys(model, table), f"{table}." if table else ""
    for key in values:
        # Checked before pydantic, which would also take the snake_case names that Python code uses.
        if key not in known:
            shown = {**(near or {}), **known}
            raise ConfigError(f"there is no {what} `{prefix}{key}`{did_you_mean(key, shown, shown)}")
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        expected = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        if not first["loc"]:  # from a check of several settings, whose message is a whole sentence
            raise ConfigError(f"`{table}`: {expected}") from None
        subject = f"`{prefix}{first['loc'][0]}`" if what == "setting" else f"{what} `{prefix}{first['loc'][0]}`"
        came = first["input"]
        raise ConfigError(f"{subject} must be {expected}, got {came!r} ({type(came).__name__})") from None
