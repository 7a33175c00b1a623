"""Opens a data set of the Hugging Face hub, or a local folder in its layout, with flwr-datasets' `FederatedDataset`."""

import os
from pathlib import Path
from typing import Any

from quickbloom.common.errors import DataError, in_one_line
from quickbloom.common.flower.partitioners import load

ALL = "all"
"""Name of the one split into which the chosen ones are merged."""


def open_table(name: str, subset: str, splits: list[str], seed: int) -> Any:
    """Return the examples as one `datasets.Dataset` in the random order of `seed`. Its cells are read when they are asked for.

    `subset`: the hub's configuration, "": the only one; `splits`: those to merge, none: all. Raises DataError.
    """
    federated, datasets = load("flwr_datasets"), load("datasets")
    whole = load("flwr_datasets.partitioner").IidPartitioner(1)  # who gets what is drawn later, by class alone

    def merge(found: Any) -> Any:
        if missing := [split for split in splits if split not in found]:
            raise DataError(f"`hub.splits` must be of {', '.join(found)}, got '{missing[0]}' for '{name}'")
        return datasets.DatasetDict({ALL: datasets.concatenate_datasets([found[split] for split in splits or found])})

    try:
        opened = federated.FederatedDataset(
            dataset=str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name,
            subset=subset or None,
            partitioners={ALL: whole},
            preprocessor=merge,
            shuffle=True,
            seed=seed,
        )
        return opened.partitioners[ALL].dataset
    except DataError:
        raise
    except Exception as error:  # the hub's client raises a dozen types, and a data set's own reader any
        raise DataError(f"the data set 'hub:{name}' cannot be loaded ({in_one_line(error)}): {_mend(name, error)}") from None


def _mend(name: str, error: Exception) -> str:
    if "config name" in str(error).casefold():
        return "name one with `hub.subset`"
    if Path(name).expanduser().exists():
        return "the folder must hold files as the hub has them: train.parquet, or images in class folders"
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
    reach = f"check its name, and that this machine reaches huggingface.co or HF_ENDPOINT{offline}"
    return f"{reach}; without a network, name a folder that holds its files, hub:FOLDER"
