"""Converts typed settings from "key=value" texts to a dictionary, and checks what can be checked before a run starts."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.config.checks import check_choice
from quickbloom.common.config.key_value import scalar, split_assignment
from quickbloom.common.config.parts import table_types
from quickbloom.common.config.run import RunConfig, Scalar
from quickbloom.common.datasets import DATASETS, load_dataset
from quickbloom.common.engine.build import build_algorithm
from quickbloom.server_app.federation.splits import split_tasks


def default_algorithm(settings: Mapping[str, Scalar]) -> str:
    """Return the algorithm of a run with these settings: the one they name, else the one that their data set recommends."""
    dataset = DATASETS.get(str(settings.get("dataset", RunConfig().dataset)))
    return str(settings.get("algorithm", dataset.algorithm if dataset else RunConfig().algorithm))


def parse_assignments(assignments: list[str], algorithm: str) -> dict[str, Scalar]:
    """Return settings from "key=value" texts. A key of the algorithm's own table may omit the table: "inner-lr=0.1".

    Raises ConfigError for a text of another form, and for an unknown algorithm.
    """
    settings: dict[str, Scalar] = {}
    for text in assignments:
        key, value = split_assignment(text)
        if key == "algorithm":
            algorithm = str(scalar(value))
    check_choice("algorithm", algorithm, ALGORITHMS)  # before a key of its table is refused because the table is missing
    own = {field.alias for field in RunConfig.model_fields.values()}
    of_algorithm = {field.alias for field in table_types()[algorithm].model_fields.values()}
    for text in assignments:
        key, value = split_assignment(text)
        if key not in own and key in of_algorithm:
            key = f"{algorithm}.{key}"
        settings[key] = scalar(value)
    return settings


def check_with_data(config: RunConfig, data_dir: Path) -> tuple[dict[str, list[str]], Sequence[str]]:
    """Read the data, build the model and split the tasks as the run will. Return the task ids of every split, and remarks.

    Raises ConfigError or DataError for any mistake that would end the run.
    """
    dataset = load_dataset(config.dataset, config.table(config.dataset), data_dir)
    build_algorithm(config.resolved(), dataset.spec)
    # The run itself reports what the split leaves out.
    return split_tasks(dataset.tasks(), config, lambda _: None), dataset.remarks
