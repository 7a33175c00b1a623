"""What MkDocs does to the pages on their way to the site: code from the source, and formulas as MathML.

A link that stands alone on its line, [code: NAME](../FILE.py), leads a reader of the plain file to the source; on the site the
code of NAME (`Class.method`, or a function) stands in its place. A fence ```math becomes MathML, which browsers draw by
themselves, so that the site needs no script from elsewhere.
"""

import ast
import re
import textwrap
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parents[1]
_CODE = re.compile(r"^\[code: (?P<name>[\w.]+)\]\(\.\./(?P<file>[\w/]+\.py)\)$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page with the code that it asks for. Raises LookupError where there is none of that name."""
    return _CODE.sub(lambda found: _fence(found["file"], found["name"]), markdown)


def on_config(config: Any) -> Any:
    """Have fences ```math drawn."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "math", "format": _math})
    return config


def source(file: str, name: str) -> str:
    """The lines of a class, function or method as they stand in `file`, a path in the repository."""
    text = (ROOT / file).read_text(encoding="utf-8")
    body: Any = ast.parse(text).body
    for part in name.split("."):
        matches = [node for node in body if getattr(node, "name", None) == part]
        if not matches:
            raise LookupError(f"{file} has no `{name}`")
        body = matches[0].body
    return textwrap.dedent("\n".join(text.splitlines()[matches[0].lineno - 1 : matches[0].end_lineno]))


def _fence(file: str, name: str) -> str:
    return f'```python title="{file}"\n{source(file, name)}\n```'


def _math(text: str, *_: Any, **__: Any) -> str:
    return str(convert(text, display="block"))
