"""A real Docker engine for tests: a federation of docker-compose.yml, and single containers of its image."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.compose import Federation, missing
from quickbloom.server_app.runs.directory import read_history


@contextmanager
def federation(name: str, home: Path, overlays: Sequence[str] = (), **env: str) -> Iterator[Federation]:
    """Build, start, and remove at the end. Skips the test where there is no engine."""
    needs_engine()
    it = Federation(name, home, overlays, **env)
    try:
        it.build()
        it.up()
        yield it
    finally:
        it.down()


def built_image(home: Path) -> None:
    """Build the image. Skips the test where there is no engine."""
    needs_engine()
    Federation("quickbloom-test", home).build()


def needs_engine() -> None:
    """Skip the test where there is no engine, no Compose or no base image."""
    if reason := missing():
        pytest.skip(reason)


def rounds(directory: Path) -> int:
    """How many rounds a run has done so far."""
    return len(read_history(directory))
