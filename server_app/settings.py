"""Settings as they are typed: from "key=value" texts to a dictionary, and what can be checked before anything starts."""

import sys
import tomllib
from pathlib import Path

from common.assemble import build_algorithm
from common.config import RunConfig, Scalar, table_types
from common.datasets import load_dataset
from common.errors import ConfigError
from common.models import is_own_model
from server_app.rollcall import split_tasks


def parse_assignments(assignments: list[str], algorithm: str) -> dict[str, Scalar]:
    """Settings from "key=value" texts. A key of the algorithm's own table may go without the table: "inner-lr=0.1"."""
    settings: dict[str, Scalar] = {}
    for text in assignments:
        if text.startswith("algorithm="):
            algorithm = str(_scalar(text.removeprefix("algorithm=")))
    own = {field.alias for field in RunConfig.model_fields.values()}
    tables = table_types()
    for text in assignments:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"`--set` must look like key=value, got '{text}'")
        of_algorithm = tables[algorithm].model_fields.values() if algorithm in tables else ()
        if key not in own and key in {field.alias for field in of_algorithm}:
            key = f"{algorithm}.{key}"
        settings[key] = _scalar(value.strip())
    return settings


def check_with_data(config: RunConfig, data_dir: Path) -> dict[str, list[str]]:
    """Read the data, build the model and split the tasks, as the run will; returns the task ids of every split.

    Raises ConfigError or DataError with what would end the run.
    """
    dataset = load_dataset(config.dataset, config.table(config.dataset), data_dir)
    if (modules := own_modules(config.model)) and str(modules) not in sys.path:
        sys.path.insert(0, str(modules))
    build_algorithm(config.resolved(), dataset.spec)
    return split_tasks(dataset.tasks(), config)


def own_modules(model: str) -> Path | None:
    """Where the module of a user's own model is looked for first: the current directory. None for any other model."""
    return Path.cwd() if is_own_model(model) else None


def _scalar(text: str) -> Scalar:
    """A TOML number or truth value, else the text itself: --set dataset=uji needs no quotation marks."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, bool | int | float | str) else text
