"""What the HTML files share: one self-contained page with headings, tables and pictures. Needs the extra `report`."""

import base64
import importlib.util
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import DataError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PACKAGES = ("matplotlib", "jinja2")

_BASE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { padding: .25rem .9rem; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child, th:first-child { text-align: left; } img { max-width: 100%; } code { font-size: 90%; }
details { margin: 1rem 0; } .note { color: #666; }
</style></head><body>
<h1>{{ title }}</h1>
{% block result %}{% endblock %}
{% for plot in plots %}
<h2>{{ plot.heading }}</h2><p class="note">{{ plot.text }}</p>
<img alt="{{ plot.heading }}" src="data:image/png;base64,{{ plot.png }}">
{% endfor %}
{% if failures %}<h2>Failures</h2><ul>{% for failure in failures %}<li>{{ failure }}</li>{% endfor %}</ul>{% endif %}
{% block details %}{% endblock %}
</body></html>
"""


@dataclass(frozen=True)
class Plot:
    """A picture with its heading and what it shows; `png` is base64."""

    heading: str
    text: str
    png: str

    @classmethod
    def of(cls, heading: str, text: str, figure: "Figure") -> "Plot":
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
        return cls(heading, text, base64.b64encode(buffer.getvalue()).decode())


def missing_packages() -> list[str]:
    """The packages of the extra `report` that are not installed."""
    return [name for name in _PACKAGES if importlib.util.find_spec(name) is None]


def require_packages() -> None:
    """Raise DataError with what to install."""
    if missing := missing_packages():
        raise DataError(f"a report needs the package {missing[0]}: pip install 'quickbloom[report]'")


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Render `template`, which fills the blocks `result` and `details`, to `path`, and return that. Raises DataError.

    `values`: "title", "plots" (of Plot), "failures" (texts), and what the template asks for.
    """
    import jinja2

    pages = jinja2.DictLoader({"base": _BASE, "page": "{% extends 'base' %}" + template})
    html = jinja2.Environment(autoescape=True, loader=pages).get_template("page").render(**values)
    try:
        path.write_text(html, encoding="utf-8")
    except OSError as error:
        raise DataError(f"the report '{path}' cannot be written ({error.strerror or error})") from None
    return path


def nan_for_null(value: Any) -> Any:
    """Lists of numbers with NaN where JSON has null: plots leave a gap there."""
    if isinstance(value, dict):
        return {key: nan_for_null(item) for key, item in value.items()}
    if isinstance(value, list):
        return [math.nan if item is None else nan_for_null(item) for item in value]
    return value
