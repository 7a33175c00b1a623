"""The parts that a run is put together from: its algorithm, its data set and its model, each from a registry."""

from typing import TYPE_CHECKING, Any

from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.config.privacy import PrivacyOptions
from quickbloom.common.datasets import DATASETS
from quickbloom.common.models import MODELS
from quickbloom.common.options import Options
from quickbloom.common.registries import is_users

if TYPE_CHECKING:
    from quickbloom.common.config.run import RunConfig

PRIVACY = "privacy"
"""Name of the settings table that belongs to no algorithm, data set or model."""

REGISTRIES: dict[str, dict[str, Any]] = {"algorithm": ALGORITHMS, "dataset": DATASETS, "model": MODELS}
"""The setting that chooses from each registry."""


def own_parts(config: "RunConfig") -> dict[str, type[Any]]:
    """Return the registered parts of a run that come from user code, by their setting. Only this process knows them."""
    chosen = {key: registry.get(getattr(config, key)) for key, registry in REGISTRIES.items()}
    return {key: part for key, part in chosen.items() if part is not None and is_users(part)}


def table_types() -> dict[str, type[Options]]:
    """Return the settings model of every table: one for each algorithm, data set and model, and that of privacy."""
    # Not cached: a notebook registers parts between its runs.
    parts = {name: part.Options for registry in REGISTRIES.values() for name, part in registry.items()}
    return {PRIVACY: PrivacyOptions, **parts}
