"""A SuperLink's database that a later Flower has changed is refused before Flower sees it."""

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from flower_releases import installed

from quickbloom.common.flower.states.later_release import DatabaseError, changes, check, known_changes
from quickbloom.server_app.deployment.secrets import create
from quickbloom.server_app.deployment.serve import superlink
from quickbloom.server_app.launch.flower_run import free_port

MAKE = """
import sys
from sqlalchemy import create_engine
from flwr.supercore.state.alembic.utils import run_migrations
run_migrations(create_engine(f"sqlite:///{sys.argv[1]}"))
"""


def made(database: Path, modules: Path | None = None) -> Path:
    """A new database of the installed Flower, or of the one in `modules`."""
    env = {**os.environ, **({"PYTHONPATH": str(modules)} if modules else {})}
    done = subprocess.run([sys.executable, "-c", MAKE, database], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return database


def changed(database: Path, name: str) -> None:
    """As a later release would leave it."""
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (name,))


def test_a_database_of_the_installed_flower_is_taken_and_left_as_it_is(tmp_path: Path) -> None:
    database = made(tmp_path / "superlink.db")
    before = database.read_bytes()
    check(database)
    assert len(changes(database)) == 1
    assert changes(database) < known_changes()
    assert database.read_bytes() == before
    check(tmp_path / "not-there.db")
    assert not (tmp_path / "not-there.db").exists()


def test_an_older_database_is_taken(tmp_path: Path) -> None:
    database = made(tmp_path / "superlink.db")
    changed(database, "8e65d8ae60b0")  # Flower's first change
    check(database)
    with closing(sqlite3.connect(tmp_path / "old.db")) as connection, connection:
        connection.execute("CREATE TABLE node (id INTEGER)")
    assert changes(tmp_path / "old.db") == set()
    check(tmp_path / "old.db")


def test_the_superlink_refuses_a_later_one_in_one_sentence(tmp_path: Path) -> None:
    create(tmp_path / "secrets", ["node-1"], [], days=1)
    (tmp_path / "state").mkdir()
    changed(made(tmp_path / "state" / "superlink.db"), "ffffffffffff")
    with pytest.raises(
        DatabaseError, match=r"^the database '.*superlink.db' was changed by a later release .*ffffffffffff"
    ) as said:
        superlink(tmp_path / "secrets" / "superlink", tmp_path / "state", "127.0.0.1", free_port())
    assert "\n" not in str(said.value)


def test_a_file_that_is_no_database_is_said(tmp_path: Path) -> None:
    (tmp_path / "superlink.db").write_text("no database at all, " * 100)
    with pytest.raises(DatabaseError, match=r"must be the database of a SuperLink, .*file is not a database"):
        check(tmp_path / "superlink.db")


@pytest.mark.slow
def test_a_database_of_the_last_release_that_is_supported_is_refused_by_the_installed_one(tmp_path: Path) -> None:
    database = made(tmp_path / "superlink.db", installed("1.42.0", tmp_path / "flower"))
    with pytest.raises(DatabaseError, match=r"later release of Flower than 1\.39"):
        check(database)
