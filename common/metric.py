"""What is measured on a held-out task: its name in files and messages, which way is better, and how it is written.

Files, events and messages hold the name alone; `named` finds the rest. A new metric is one entry in
`METRICS`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from quickbloom.common.errors import DataError
from quickbloom.common.printable import as_told

_DIVERGED = "diverged"


@dataclass(frozen=True)
class Metric:
    """One kind of score. `name`: as files and messages hold it; `title`: in words.

    `kind`: of the data that it is for, None: of both. `share`: in 0..1, and written in %; `bounded`: in 0..1. `second`:
    name of the score
    that nodes send beside this one for a user's own data, "": none. `is_loss`: the same number as the loss.
    `of_target`: `title` can name the column that is predicted. `own_unit`: a sentence on what it is measured in for a
    user's own data, "" where the number says it all.
    """

    name: str
    title: str
    kind: Literal["classification", "regression"] | None = None
    higher_is_better: bool = False
    share: bool = False
    second: str = ""
    bounded: bool = False
    is_loss: bool = False
    of_target: bool = False
    own_unit: str = ""

    # ---- which of two is better

    def is_better(self, value: float, than: float) -> bool:
        """Return whether `value` is strictly better; never if one of the two is NaN."""
        return value > than if self.higher_is_better else value < than

    def reaches(self, value: float, target: float) -> bool:
        """Return whether `value` is at least as good as `target`."""
        return value == target or self.is_better(value, target)

    def cost(self, value: float) -> float:
        """Return a key to sort by, the best first; what is not finite (a run that diverged) comes last."""
        if not math.isfinite(value):
            return math.inf
        return -value if self.higher_is_better else value

    def best(self, values: Iterable[float]) -> float:
        """Return the best of some values."""
        return min(values, key=self.cost)

    # ---- how it is written

    @property
    def scale(self) -> int:
        """What a value is multiplied by where it is written or drawn: 100 for %."""
        return 100 if self.share else 1

    @property
    def axis(self) -> str:
        """The title of an axis: "accuracy, %"."""
        return f"{self.title}, %" if self.share else self.title

    @property
    def heading(self) -> str:
        """The title of a table of bare numbers: "accuracy in %"."""
        return f"{self.title} in %" if self.share else self.title

    def title_for(self, target: str) -> str:
        """Return the title with the name of the column that is predicted, if it can name one. `target`: "" if not known."""
        return f"{self.title} of {target}" if target and self.of_target else self.title

    def scaled(self, values: Iterable[float]) -> list[float]:
        """Return values as they are drawn: shares in %, errors as they are."""
        return [self.scale * value for value in values]

    def score(self, value: float | None, half: float | None = None) -> str:
        """Return a score with its half-width, if there is one: "75.5 ± 3.1 %" or "0.351 ± 0.02"."""
        written = self.number(value, half)
        return f"{written} %" if self.share and written != _DIVERGED else written

    def number(self, value: float | None, half: float | None = None) -> str:
        """Return the same without "%": "75.5 ± 3.1"; "diverged" for None and what is not finite."""
        if value is None or not math.isfinite(value):
            return _DIVERGED
        # What float32 means cost must not decide on which side of a half a digit falls.
        written = f"{round(100 * value, 4):.1f}" if self.share else f"{value:.4g}"
        return f"{written} ± {self._width(half)}" if half is not None and math.isfinite(half) else written

    def margin(self, half: float) -> str:
        """Return a half-width by itself: "± 3.1 %" or "± 0.02"."""
        return f"± {self._width(half)}" + " %" * self.share

    def change(self, before: float | None, after: float | None, arrow: str = "→") -> str:
        """Return a score before and after: "20.0 % → 75.5 %"."""
        return f"{self.score(before)} {arrow} {self.score(after)}"

    def _width(self, half: float) -> str:
        return f"{100 * half:.1f}" if self.share else f"{half:.2g}"


METRICS = (
    Metric(
        "accuracy",
        "accuracy",
        kind="classification",
        higher_is_better=True,
        share=True,
        second="balanced_accuracy",
        bounded=True,
    ),
    Metric(
        "balanced_accuracy",
        "balanced accuracy",
        kind="classification",
        higher_is_better=True,
        share=True,
        second="accuracy",
        bounded=True,
    ),
    Metric(
        "mse",
        "mean squared error",
        kind="regression",
        second="rmse",
        is_loss=True,
        of_target=True,
        own_unit="the mean squared error is of the standardised target (`own.scale`); rmse is in its unit",
    ),
    Metric("rmse", "rmse, in its unit", kind="regression"),
    Metric("loss", "loss"),
    Metric("macro_f1", "macro F1", kind="classification", higher_is_better=True, share=True, bounded=True),
    Metric("auroc", "AUROC", kind="classification", higher_is_better=True, bounded=True),
    Metric("average_precision", "average precision", kind="classification", higher_is_better=True, bounded=True),
    Metric("log_loss", "log loss", kind="classification", is_loss=True),
    Metric("brier", "Brier score", kind="classification"),
    Metric("calibration_error", "calibration error", kind="classification"),
    Metric("mae", "mean absolute error", kind="regression"),
    Metric("r2", "R2 within users", kind="regression", higher_is_better=True),
    Metric("coverage_90", "coverage of 90 % intervals", kind="regression", share=True, higher_is_better=True),
    Metric("width_90", "width of 90 % intervals", kind="regression"),
)
"""All of them, in the order in which a table shows them."""

_BY_NAME = {metric.name: metric for metric in METRICS}


def named(name: str) -> Metric:
    """Return the metric that a file or a message means by `name`. Raises DataError for one that is not known here."""
    if name not in _BY_NAME:
        known = ", ".join(_BY_NAME)
        raise DataError(f"a score must be one of {known}, got '{as_told(name, 60)}': it is of another release of quickbloom")
    return _BY_NAME[name]


ACCURACY, MSE, RMSE, LOSS = map(named, ("accuracy", "mse", "rmse", "loss"))

CHOSEN_BY = (ACCURACY, MSE)
"""Those by which rates are chosen and runs are compared unless `metric` names another: one for each kind of data."""

Chosen = Literal[
    "accuracy", "balanced_accuracy", "macro_f1", "auroc", "average_precision", "log_loss", "brier", "mse", "rmse", "mae"
]
TO_CHOOSE_BY: tuple[Chosen, ...] = get_args(Chosen)
"""Those that the setting `metric` may name."""


def of_kind(kind: str) -> Metric:
    """Return what is measured on data of this kind, "classification" or "regression"."""
    return next(metric for metric in CHOSEN_BY if metric.kind == kind)


def chosen_for(kind: str, counts: Sequence[int]) -> Metric:
    """Return what decides where nobody says: `of_kind`, but the balanced accuracy where always guessing one class looks well.

    `counts`: rows of each class, [] if unknown. The limit lies halfway between an even share of the largest and all rows.
    """
    uneven = len(counts) > 1 and max(counts) >= (0.5 + 0.5 / len(counts)) * max(sum(counts), 1)
    return named("balanced_accuracy") if kind == "classification" and uneven else of_kind(kind)


def metric_of(scores: Mapping[str, Any]) -> Metric:
    """Return what `scores`, as in a file of a run, were chosen by: the first of them. Raises DataError if they hold nothing."""
    for name in scores:
        if name in TO_CHOOSE_BY:
            return _BY_NAME[name]
    known = " or ".join(metric.name for metric in CHOSEN_BY)
    found = as_told(", ".join(scores), 200) or "none"
    raise DataError(f"scores of a run must hold {known}, got {found}: they are damaged or of another release of quickbloom")


def shown(scores: Mapping[str, Any]) -> list[Metric]:
    """Return the metrics in `scores` that a table shows: the one that decides, then others, no loss twice."""
    first = metric_of(scores)
    same = any(metric.is_loss for metric in METRICS if metric.name in scores)
    others = [metric for metric in METRICS if metric.name in scores and metric != first]
    return [first, *(metric for metric in others if not (same and metric is LOSS))]
