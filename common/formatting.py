"""Numbers as people read them."""

import math


def size(count: float) -> str:
    """Bytes with a unit: 12_345 -> "12.3 kB"."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def counted(number: int, thing: str) -> str:
    """1 step, 2 steps."""
    return f"{number} {thing}{'s' * (number != 1)}"


def score(value: float | None, metric: str, half: float | None = None) -> str:
    """A score with its half-width, if there is one: "75.5 ± 3.1 %" or "0.351 ± 0.02"."""
    if value is None or not math.isfinite(value):  # this run diverged
        return "diverged"
    around = half is not None and math.isfinite(half)
    if metric in ("accuracy", "balanced_accuracy"):
        # What float32 means cost must not decide on which side of a half a digit falls.
        return f"{round(100 * value, 4):.1f}" + (f" ± {100 * (half or 0):.1f} %" if around else " %")
    return f"{value:.4g}" + (f" ± {half:.2g}" if around else "")
