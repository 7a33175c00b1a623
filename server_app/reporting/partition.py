"""Who holds what, where the users of a run are simulated: a picture of users and classes."""

from typing import TYPE_CHECKING

import numpy as np

from quickbloom.common.config.run import parse_run_config
from quickbloom.common.datasets.holdings import Holdings, in_words
from quickbloom.common.formatting import counted
from quickbloom.server_app.reporting.drawing import QUIET, SERIES, picture, short
from quickbloom.server_app.reporting.page import Part, Picture, Text
from quickbloom.server_app.reporting.run_record import RunFacts
from quickbloom.server_app.runs.holdings import read_holdings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DRAWN = 100
"""Users in the picture."""
_LARGEST = 90.0
"""Area of the largest dot, in square points."""
_COLOURS = {"train": SERIES[0], "validation": SERIES[2], "test": SERIES[1]}


def partition(run: RunFacts) -> list[Part]:
    """The simulated users of a run and their examples; nothing for users of the data's own."""
    found = read_holdings(run.path)
    spread = parse_run_config(run.config).spread
    if found is None or spread is None:
        return []
    held, splits = found
    said = f"The users are simulated: {spread.in_words()}. {in_words(held)}."
    shares = ", ".join(
        f"{100 * share:.3g} % {part}" for share, part in zip(spread.shares, ("support", "query", "test"), strict=True)
    )
    return [
        Text(said),
        Text(f"Every user's examples are {shares}; no example is in two parts or with two users."),
        _dots(held, splits),
    ]


def _dots(held: Holdings, splits: dict[str, str]) -> Picture:
    counts, users = held.counts.sum(axis=2)[:_DRAWN], held.users[:_DRAWN]

    def draw(axes: "Axes") -> None:
        for split, colour in _COLOURS.items():
            mine = [row for row, user in enumerate(users) if splits.get(user) == split]
            at = [(row, column) for row in mine for column in np.flatnonzero(counts[row])]
            if at:
                rows, columns = np.array(at).T
                sizes = _LARGEST * counts[rows, columns] / counts.max()
                axes.scatter(columns, rows, s=np.maximum(sizes, 1.0), color=colour, lw=0, label=split)
        if held.classes != [""]:
            names = [short(name, 12) for name in held.classes]
            axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
        else:
            axes.set_xticks([])
        every = max(1, len(users) // 40)
        axes.set_yticks(range(0, len(users), every), [short(user, 16) for user in users[::every]])
        axes.tick_params(axis="y", labelsize=7)
        axes.set(ylim=(len(users) - 0.3, -0.7), xlim=(-0.6, max(len(held.classes), 1) - 0.4))
        axes.set_xlabel("class", color=QUIET)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, markerscale=0.7)

    more = f" The first {_DRAWN} of {counted(len(held.users), 'user')}." if len(held.users) > _DRAWN else ""
    text = (
        f"the area of a dot is the number of a user's examples of a class, at most {counts.max()}; partition.csv has all.{more}"
    )
    return picture("Who holds what", text, draw, height=max(3.0, 1.4 + 0.11 * len(users)))
