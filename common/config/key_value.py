"""Settings as typed after `--set`."""

import json
import tomllib

from quickbloom.common.errors import ConfigError


def split_assignment(text: str) -> tuple[str, str]:
    """Return (key, value) of "key=value". Raises ConfigError."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not key:
        raise ConfigError(f"`--set` must look like key=value, got '{text}'")
    return key, value


def assignment(key: str, value: bool | int | float | str | None) -> str:
    """Return "key=value" as `--set` reads it; text that would be read as another type is put in quotation marks."""
    plain = str(value).lower() if isinstance(value, bool) else str(value)
    read = scalar(split_assignment(f"{key}={plain}")[1])
    return f"{key}={plain}" if read == value and type(read) is type(value) else f"{key}={json.dumps(value)}"


def scalar(text: str) -> bool | int | float | str:
    """Return a TOML number or truth value, else the text itself, so that `--set dataset=uji` needs no quotation marks."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, bool | int | float | str) else text
