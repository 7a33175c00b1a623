"""partition.csv of a run directory: who holds what, where the users of a run are simulated."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from quickbloom.common.config.run import RunConfig
from quickbloom.common.datasets import load_dataset
from quickbloom.common.datasets.base import resolve_data_dir
from quickbloom.common.datasets.holdings import PARTS, Holdings
from quickbloom.common.spreadsheets import read_csv, write_csv
from quickbloom.server_app.runs.directory import RunDirectory

HOLDINGS = "partition.csv"


def write_holdings(directory: RunDirectory, config: RunConfig, splits: Mapping[str, Sequence[str]]) -> None:
    """Write a line for each user and each class that they have. Raises DataError if the data cannot be read here.

    `splits`: the users for training, validation and test.
    """
    dataset = load_dataset(config.dataset, config.table(config.dataset), resolve_data_dir(config.data_dir))
    found: Holdings | None = getattr(dataset, "holdings", lambda: None)()
    if found is None:
        return
    where = {user: split for split, users in splits.items() for user in users}
    rows = [
        {"user": user, "split": where.get(user, ""), "class": name, **dict(zip(PARTS, map(int, counts), strict=True))}
        for user, of_user in zip(found.users, found.counts, strict=True)
        for name, counts in zip(found.classes, of_user, strict=True)
        if counts.any() or user == found.users[0]  # of the first all classes, for their order
    ]
    text = io.StringIO(newline="")
    write_csv(text, ["user", "split", "class", *PARTS], rows)
    directory.write_text(HOLDINGS, text.getvalue())


def read_holdings(path: Path) -> tuple[Holdings, dict[str, str]] | None:
    """Return who holds what, and the split of every user, from a run directory; None if it has no such file."""
    file = path / HOLDINGS
    if not file.is_file():
        return None
    with file.open(newline="", encoding="utf-8") as lines:
        rows = list(read_csv(lines))
    users, classes = (list(dict.fromkeys(row[name] for row in rows)) for name in ("user", "class"))
    places = {name: place for place, name in enumerate(classes)}, {name: place for place, name in enumerate(users)}
    counts = np.zeros((len(users), len(classes), len(PARTS)), dtype=np.int64)
    for row in rows:
        counts[places[1][row["user"]], places[0][row["class"]]] = [int(row[part]) for part in PARTS]
    return Holdings(users, classes, counts), {row["user"]: row["split"] for row in rows}
