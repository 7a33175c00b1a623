"""Write every setting and its default as TOML into pyproject.toml: `make config`.

Flower can only override keys that are declared there, so the file repeats what the models in
`common` define.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from quickbloom.common.config.parts import table_types
from quickbloom.common.config.run import RunConfig
from quickbloom.common.options import Options

HEADER = "[tool.flwr.app.config]"


def render() -> str:
    """Return the section [tool.flwr.app.config] and its tables: one line per setting, with its description as a comment."""
    sections = [_section(HEADER, RunConfig)]
    sections += [
        _section(f"[tool.flwr.app.config.{name}]", model) for name, model in table_types().items() if model.model_fields
    ]
    return "\n".join(sections)


def _section(header: str, model: type[Options]) -> str:
    defaults: Mapping[str, object] = model().model_dump(by_alias=True)
    rows = [f"{key} = {json.dumps(value)}" for key, value in defaults.items()]
    width = max(len(row) for row in rows)
    descriptions = [field.description for field in model.model_fields.values()]
    lines = [f"{row:<{width}}  # {text}" for row, text in zip(rows, descriptions, strict=True)]
    return "\n".join([header, *lines]) + "\n"


def main() -> None:
    """Replace the section in the pyproject.toml of the current directory."""
    path = Path("pyproject.toml")
    before, found, after = path.read_text(encoding="utf-8").partition(HEADER + "\n")
    if not found:
        raise SystemExit(f"{path.resolve()} has no section {HEADER}")
    rest = after.partition("\n[tool.ruff]")
    path.write_text(before + render() + "".join(rest[1:]), encoding="utf-8")
    print(f"wrote {len(render().splitlines())} lines into {path}")


if __name__ == "__main__":
    main()
