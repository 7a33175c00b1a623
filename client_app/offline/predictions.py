"""What predictions look like: rows with the file's own columns, the class with its probabilities, or the number."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TextIO

from torch import Tensor

from quickbloom.common.datasets.own.preparation import Preparation
from quickbloom.common.frames import frame, typed
from quickbloom.common.maths.calibration import softmax
from quickbloom.common.scores import HALF_WIDTH_90
from quickbloom.common.spreadsheets import write_csv

_INTERVAL = ("lower_90", "upper_90")
"""Columns of a prediction's interval, which holds 90 % of a normal distribution: so many deviations to each side."""
_ADDED = ("task", "part", "target", "prediction")
"""Columns that predictions have after those of the file, whatever the data; "row" stands before them."""


@dataclass(frozen=True)
class Score:
    """Score of a model on `examples` rows of its task. `part`: "test", or "all" if the file is another one.

    A model that adapted to all rows of this very file has the part "cross-validation", and the score of its card.
    `value`: accuracy in 0..1, or the mse in standardised units, as in per_task.csv; `rmse`: its
    root in the unit of the target.
    """

    task: str
    name: str
    value: float
    examples: int
    part: str
    rmse: float | None = None


@dataclass(frozen=True)
class Predictions:
    """Predictions for the rows of a file.

    `rows`: one dictionary for each row that belongs to a model, in the file's order; `scores`: one
    per model with targets. `remarks`: ambiguous readings of the file, and rows that are left out. `index`: that of the
    pandas.DataFrame that was predicted, for the frame that comes back.

    The keys: "row" (counted from 1), the file's own columns, "task", "part" (support, query or test,
    if these are the data that the model was adapted to), "target", "prediction", and for classes
    "probability", that of the predicted class, and "probability_A" for each class A that the model can
    predict; for numbers, of a model that knows how uncertain it is, the ends of the interval "lower_90" and
    "upper_90". Predictions are "" if the model's outputs are not finite. A column of the file that is
    called like another key is "input.NAME" here.
    """

    rows: list[dict[str, Any]]
    scores: list[Score]
    remarks: Sequence[str] = ()
    index: Any = None

    @cached_property
    def columns(self) -> list[str]:
        """The keys of all rows, in order. Models of other classes have other keys."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    @cached_property
    def table(self) -> Any:
        """The rows as a pandas.DataFrame, or without pandas a NumPy array for each column. What is a number is one there.

        The rows of a DataFrame keep their index.
        """
        found = frame({name: typed([str(row.get(name) or "") for row in self.rows]) for name in self.columns})
        if self.index is not None:
            found.index = self.index.take([int(row["row"]) - 1 for row in self.rows])
        return found

    def without(self) -> list[int]:
        """Return the numbers of the rows without a prediction."""
        return [int(row["row"]) for row in self.rows if not row["prediction"]]

    def write_csv(self, file: TextIO) -> None:
        """Write the rows as CSV with a header."""
        write_csv(file, self.columns or ["row", *_ADDED], self.rows, end="\n")


def own_columns(cells: Mapping[str, list[str]], task: str, target: str, classes: Sequence[str]) -> dict[str, str]:
    """Return the names of a file's own columns in the table of predictions, by their names in the file.

    `task` and `target`: the columns that stand there as "task" and "target", and are not repeated if that is their name.
    """
    taken = {"row", *_ADDED, *_INTERVAL, "probability", *map(_probability_of, classes)}
    same = {name for name, meant in (("task", task), ("target", target)) if name == meant}
    found: dict[str, str] = {}
    for name in cells:
        new = name
        while new in taken or (new != name and new in cells):
            new = f"input.{new}"
        if name not in same:
            found[name] = new
    return found


def _probability_of(label: str) -> str:
    return f"probability_{label}"


def in_words(
    outputs: Tensor, classes: list[str], preparation: Preparation, offered: Tensor | None, temperature: float
) -> list[dict[str, Any]]:
    """Return predictions: a class and probabilities, or a number in the target's unit; "" if outputs are not finite.

    `offered`: which classes the model can predict; None: all. `temperature`: divides the outputs before the softmax.
    """
    finite = outputs.isfinite().all(dim=1)
    if not classes:
        values = outputs[:, 0].double().numpy()
        values = preparation.target.undo(values) if preparation.target else values
        digits = _digits(preparation)
        return [{"prediction": f"{value:.{digits}g}" if known else ""} for value, known in zip(values, finite, strict=True)]
    probabilities = softmax(outputs.double().numpy() / temperature).tolist()
    best = outputs.argmax(dim=1).tolist()  # ties go to the first, as in the score
    kept = [place for place in range(len(classes)) if offered is None or offered[place]]
    nothing = dict.fromkeys(("prediction", "probability", *(_probability_of(classes[place]) for place in kept)), "")
    return [
        {"prediction": classes[label], "probability": f"{shares[label]:.6f}"}
        | {_probability_of(classes[place]): f"{shares[place]:.9g}" for place in kept}
        if known
        else nothing
        for label, shares, known in zip(best, probabilities, finite.tolist(), strict=True)
    ]


def intervals(outputs: Tensor, deviations: Tensor, preparation: Preparation) -> list[dict[str, str]]:
    """Return the ends of each prediction's central interval, in the target's unit; "" if they are not finite."""
    digits, ends = _digits(preparation), []
    for sign in (-1, 1):
        values = (outputs + sign * HALF_WIDTH_90 * deviations)[:, 0].double().numpy()
        values = preparation.target.undo(values) if preparation.target else values
        ends.append([f"{value:.{digits}g}" if math.isfinite(value) else "" for value in values])
    return [dict(zip(_INTERVAL, pair, strict=True)) for pair in zip(*ends, strict=True)]


def _digits(preparation: Preparation) -> int:
    """Return the digits of a prediction: more for numbers that are large beside their spread, such as 1,000,000,000.5."""
    target = preparation.target
    ratio = abs(target.mean) / target.deviation if target else 1.0
    return min(17, 9 + math.ceil(math.log10(max(ratio, 1.0))))
