"""Pictures of the HTML files: one style, drawn once by matplotlib as SVG, with colours for light and for dark pages."""

import base64
import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from quickbloom.common.errors import as_told
from quickbloom.common.metric import Metric
from quickbloom.server_app.reporting.page import Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, QUIET, GRID = "#1d1d23", "#686a74", "#dcdde2"
SERIES = ("#0b5fb4", "#c4500b", "#2c7a3f", "#8144ad", "#a8326b", "#5f6b12", "#0e7b83", "#83563c")
"""Told apart by people who see few colours, too; lines differ by their marker as well."""
MARKERS = "osD^vPX*"
LONGEST_NAME = 24

_DARK = dict(
    zip(
        (INK, QUIET, GRID, *SERIES),
        (
            "#e8e8ef",
            "#a6a8b3",
            "#34363f",
            "#6db3ff",
            "#ffa15c",
            "#74cf8b",
            "#cda0f0",
            "#f58abc",
            "#c9d65c",
            "#5fd3db",
            "#d6a98c",
        ),
        strict=True,
    )
)
_WIDTH, _HEIGHT = 4.8, 3.1
"""Inches at 72 dots: as wide as a phone, where nothing has to shrink much."""
_STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), QUIET),
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GRID, "axes.axisbelow": True},
    **{"font.size": 10.5, "legend.fontsize": 9.5, "legend.frameon": False, "lines.linewidth": 1.8, "lines.markersize": 4.5},
    # The page's reader has the font, and letters of scripts that matplotlib's font lacks.
    **{"svg.fonttype": "none", "svg.hashsalt": "quickbloom", "font.family": "sans-serif", "text.parse_math": False},
    **{f"boxplot.{part}.color": QUIET for part in ("whiskerprops", "capprops")},
    **{f"boxplot.flierprops.{part}": QUIET for part in ("color", "markeredgecolor")},
    "figure.constrained_layout.use": True,
}


def picture(title: str, text: str, draw: Callable[["Axes"], None], height: float = _HEIGHT) -> Picture:
    """What `draw` puts on the axes. `text`: what it shows, in words. `height` in inches; the width is always the same."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(_WIDTH, height))
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    light = buffer.getvalue()
    dark = re.sub("|".join(_DARK), lambda found: _DARK[found[0]], light)
    return Picture(title, text, *(base64.b64encode(svg.encode()).decode() for svg in (light, dark)))


def style(number: int) -> dict[str, Any]:
    """How the line with this number looks: colours and markers repeat after eight, but not together."""
    around = number + number // len(SERIES)
    return {"color": SERIES[number % len(SERIES)], "marker": MARKERS[around % len(MARKERS)]}


def every(points: int) -> int:
    """Of so many points of a line every which has a marker."""
    return max(1, points // 12)


def short(name: str, most: int = LONGEST_NAME) -> str:
    """A name from a user's file for an axis: printable, on one line, not long."""
    return as_told(name, most)


def whole_numbers(axes: "Axes") -> None:
    """Only whole numbers along the x axis: rounds, steps."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, steps=[1, 2, 5, 10], min_n_ticks=1))


def few_numbers(axes: "Axes") -> None:
    """At most five numbers along the x axis, where they have decimals: hours, megabytes."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))


def possible(values: Sequence[float], metric: Metric) -> list[float]:
    """The edge of a band, cut where no score can be: below 0, above 100 %."""
    highest = 100.0 if metric.share else math.inf
    return [value if math.isnan(value) else min(max(value, 0.0), highest) for value in values]
