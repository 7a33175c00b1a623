"""Tells a SuperLink's database that a later release of Flower has changed: this one would end with a traceback on it.

Flower stores the name of the last change of its tables in the database, and brings a file for every change that it knows.
"""

import re
import sqlite3
from contextlib import closing
from pathlib import Path

from quickbloom.common.errors import QuickbloomError
from quickbloom.common.flower import names, registry

TABLE = "alembic_version"
_REVISION = re.compile(r"^revision(?:: \w+)? = ['\"](\w+)['\"]", re.MULTILINE)


class DatabaseError(QuickbloomError):
    """The database of a SuperLink cannot be used. The text says why."""


def check(database: Path) -> None:
    """Raise DatabaseError if the installed Flower cannot open `database`; a file that is not there is made by Flower."""
    known = known_changes()
    if not database.exists() or not known:
        return
    if unknown := sorted(changes(database) - known):
        raise DatabaseError(
            f"the database '{database}' was changed by a later release of Flower than {registry.version()} (by "
            f"{', '.join(unknown)}): install that release again, or restore the backup that was made before"
        )


def changes(database: Path) -> set[str]:
    """Return the last changes of the tables of a SuperLink's database; none before Flower stored them.

    Raises DatabaseError if it is no database.
    """
    try:
        with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True, timeout=5)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            return {name for (name,) in connection.execute(f"SELECT version_num FROM {TABLE}")} if TABLE in tables else set()
    except sqlite3.Error as error:
        raise DatabaseError(
            f"the file '{database}' must be the database of a SuperLink, and it cannot be read ({error}): restore it from a "
            "backup, or choose another `--state`"
        ) from None


def known_changes() -> set[str]:
    """Return all changes that the installed Flower knows; none if it keeps them elsewhere."""
    folder = names.find("ALEMBIC_DIR")
    files = (Path(folder) / "versions").glob("*.py") if folder else []
    return {found for file in files for found in _REVISION.findall(file.read_text(encoding="utf-8"))}
