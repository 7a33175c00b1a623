"""Converts typed settings from "key=value" texts to a dictionary, and checks what can be checked before a run starts."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.config.checks import check_choice
from quickbloom.common.config.key_value import scalar, split_assignment
from quickbloom.common.config.parts import table_types
from quickbloom.common.config.run import RunConfig, Scalar, parse_run_config
from quickbloom.common.datasets import DATASETS, load_dataset
from quickbloom.common.datasets.base import resolve_data_dir
from quickbloom.common.datasets.own import Own
from quickbloom.common.engine.build import build_algorithm
from quickbloom.server_app.federation.splits import split_tasks
from quickbloom.server_app.launch.labels import look_at


def default_algorithm(settings: Mapping[str, Scalar]) -> str:
    """Return the algorithm of a run with these settings: the one they name, else the one that their data set recommends."""
    dataset = DATASETS.get(str(settings.get("dataset", RunConfig().dataset)))
    return str(settings.get("algorithm", dataset.algorithm if dataset else RunConfig().algorithm))


OF_OWN_LABELS = "protonet"
"""Algorithm for users whose classes are each their own, behind an encoder: it shares no head, and needs no steps."""


def algorithm_for(settings: Mapping[str, Scalar], *, here: bool) -> tuple[str, str]:
    """Return (the algorithm of a run with these settings, a sentence on why, "" for nothing to say).

    Behind a frozen encoder of own data it depends on whether users' classes mean the same for all, see `labels`. `here`: the
    run's data are on this machine. Raises ConfigError or DataError.
    """
    usual = default_algorithm(settings)
    if "algorithm" in settings or settings.get("dataset") != Own.name or not settings.get("own.encoder"):
        return usual, ""
    if not here:
        return usual, (
            f"Algorithm {usual}, which learns one head for all: if each user has labels of their own, add `--algorithm "
            f"{OF_OWN_LABELS}` (what labels mean is on the nodes, and not known here)"
        )
    of_run = {field.alias for field in RunConfig.model_fields.values()}
    config = parse_run_config({key: value for key, value in settings.items() if key in of_run or key.startswith("own.")})
    own = load_dataset(Own.name, config.table(Own.name), resolve_data_dir(config.data_dir).absolute())
    assert isinstance(own, Own)
    found = look_at(own, split_tasks(own.tasks(), config, lambda _: None)["train"], config)
    if found is None:
        return usual, ""
    name = OF_OWN_LABELS if found.own else usual
    kind = "labels seem to be each user's own" if found.own else "labels seem to mean the same for all"
    return name, f"Algorithm {name}, because {kind}: {found.why}; `--algorithm` decides otherwise"


def assigned(settings: Mapping[str, Scalar], assignments: list[str], *, here: bool = True) -> tuple[dict[str, Scalar], str]:
    """Return (the settings with what `assignments` say, and with an algorithm; a sentence on it or "").

    Raises ConfigError or DataError.
    """
    given = {**settings, **parse_assignments(assignments, default_algorithm(settings))}
    name, why = algorithm_for(given, here=here)
    # A key without a table is of the algorithm's, which is known only now.
    return {**settings, **parse_assignments(assignments, name), "algorithm": name}, why


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
