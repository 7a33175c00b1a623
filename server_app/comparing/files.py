"""What a comparison leaves: comparison.json and comparison.md."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quickbloom.server_app.comparing.table import markdown
from quickbloom.server_app.runs.directory import RunDirectory


def write(result: Mapping[str, Any], directory: Path) -> None:
    """comparison.json and comparison.md, each written whole or not at all."""
    writer = RunDirectory(directory)
    writer.write_json("comparison.json", result)
    writer.write_text("comparison.md", markdown(result))
