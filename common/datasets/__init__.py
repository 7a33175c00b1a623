"""Registry of the data sets by name. A new one is a file with a subclass of `Dataset`, and one line here."""

from functools import lru_cache
from pathlib import Path

from quickbloom.common import registries
from quickbloom.common.datasets.base import Dataset, DataSpec, TaskInfo
from quickbloom.common.datasets.own import Own
from quickbloom.common.errors import ConfigError
from quickbloom.common.options import Options

DATASETS: dict[str, type[Dataset]] = registries.load(
    __name__,
    "digits",
    "fashion-mnist",
    "gaussian",
    "hub",
    "intents",
    "omniglot",
    "own",
    "shakespeare",
    "sinusoid",
    "uji",
)


@lru_cache(maxsize=8)
def load_dataset(name: str, options: Options, data_dir: Path, schema: str = "") -> Dataset:
    """Return the data set `name`, read at most once per process for the same options and folder.

    `schema`: what the nodes of a run agreed on, for a data set that needs it (`DataSpec.schema`).
    The tensors are shared and must not be changed. Raises ConfigError for an unknown name. Example:
    `load_dataset("gaussian", GaussianOptions(), Path())`.
    """
    if name not in DATASETS:
        raise ConfigError(f"`dataset` must be one of {', '.join(DATASETS)}, got '{name}'")
    if schema and name == Own.name:
        return Own(options, data_dir, schema)  # type: ignore[arg-type]  # the options are those of this data set
    return DATASETS[name](options, data_dir)


__all__ = ["DATASETS", "DataSpec", "Dataset", "TaskInfo", "load_dataset"]
