"""The backup of a server: one archive of its keys and of the SuperLink's state, and back.

    backup.json         what made it
    vault/secrets/..    the output of `quickbloom secrets`, and what is made of it
    state/superlink.db  the SuperLink's database: registrations, and messages under way

An archive is a gzipped tar of plain files and folders. One that holds anything else is refused as a whole.
"""

import gzip
import io
import json
import os
import shutil
import stat
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from quickbloom.common.errors import ConfigError
from quickbloom.common.flower import registry
from quickbloom.common.flower.states import later_release

PARTS = ("vault", "state")
"""Its folders, and their names where it is packed and unpacked."""
FACTS = "backup.json"
FORMAT = 1
DATABASE = "state/superlink.db"
_NEEDED = ("vault/secrets/superlink/server.key", DATABASE)
_PARTIAL = ".restoring"
"""Folder in each of PARTS for what is being unpacked: these are volumes of their own, between which nothing can be moved."""
_MOST_FACTS = 10_000  # bytes


def pack(home: Path, out: BinaryIO) -> None:
    """Write the folders PARTS of `home` into `out`. Nobody may write to them meanwhile.

    Raises ConfigError if what a server needs is not there, or if anything is no plain file or folder.
    """
    if lost := [name for name in _NEEDED if not (home / name).is_file()]:
        raise ConfigError(f"there is nothing to back up, `{lost[0]}` is missing: start the federation once before")
    facts = {"format": FORMAT, "flower": registry.version(), "made": datetime.now(UTC).isoformat(timespec="seconds")}
    content = json.dumps(facts).encode()
    with tarfile.open(fileobj=out, mode="w|gz", format=tarfile.PAX_FORMAT) as archive:
        head = tarfile.TarInfo(FACTS)
        head.size, head.mode = len(content), 0o600
        archive.addfile(head, io.BytesIO(content))
        for part in PARTS:
            for path in (home / part, *sorted((home / part).rglob("*"))):
                name = str(path.relative_to(home))
                if _PARTIAL in path.relative_to(home).parts:  # of a restoration that was killed
                    continue
                kind = path.lstat().st_mode
                if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                    raise ConfigError(f"`{name}` must be a plain file or a folder to be backed up: remove it")
                archive.add(path, name, recursive=False)


def check(file: Path) -> dict[str, str]:
    """Return what made the archive `file`. Raises ConfigError if it is no whole backup, or holds what none may hold."""
    with _opened(file) as archive:
        found: set[str] = set()
        facts: dict[str, str] = {}
        for number, member in enumerate(archive):
            name = _name(file, member)
            if name in found:
                raise _wrong(file, f"holds `{name}` twice")
            found.add(name)
            if number == 0:
                facts = _facts(file, archive, member)
    if lost := [name for name in _NEEDED if name not in found]:
        raise _wrong(file, f"lacks `{lost[0]}`")
    return facts


def unpack(file: Path, home: Path) -> None:
    """Write the archive `file` into the folders PARTS of `home`, which must be empty; nothing is left of it if it fails.

    Files keep their modes, without more than the owner's, the group's and others' rights. Raises ConfigError if `check`
    does, if a folder is not empty, if the disk is full, and if the installed Flower cannot open the database.
    """
    check(file)
    for part in PARTS:
        shutil.rmtree(home / part / _PARTIAL, ignore_errors=True)  # of one that was killed
        if (home / part).is_dir() and any((home / part).iterdir()):
            raise ConfigError(
                f"there is a server already, its {part} is not empty: remove it with `docker compose down --volumes`, or "
                "restore into another project"
            )
    _check_database(file)
    try:
        _unpack_beside(file, home)
        for part in PARTS:
            for entry in (home / part / _PARTIAL).iterdir():
                entry.rename(home / part / entry.name)
    finally:
        for part in PARTS:
            shutil.rmtree(home / part / _PARTIAL, ignore_errors=True)


def _unpack_beside(file: Path, home: Path) -> None:
    """Write an archive into _PARTIAL of each of PARTS. Raises ConfigError."""
    with _opened(file) as archive:
        for part in PARTS:
            (home / part / _PARTIAL).mkdir(mode=0o700, parents=True)
        for member in archive:
            name = _name(file, member)
            if name == FACTS:
                continue
            part, *rest = PurePosixPath(name).parts
            target = (home / part / _PARTIAL).joinpath(*rest)
            if member.isdir():
                target.mkdir(mode=0o700, parents=True, exist_ok=True)
                if rest:  # mount points keep their own
                    target.chmod(member.mode & 0o777)
                continue
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            new = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with os.fdopen(new, "wb") as copy:
                _copy(archive, member, copy)
                os.fchmod(copy.fileno(), member.mode & 0o777)
                os.fsync(copy.fileno())


def _check_database(file: Path) -> None:
    """Raise DatabaseError if the installed Flower cannot open the database in `file`."""
    with tempfile.TemporaryDirectory() as folder, _opened(file) as archive:
        for member in archive:
            if _name(file, member).startswith(DATABASE):  # with what SQLite has beside it
                with (Path(folder) / PurePosixPath(member.name).name).open("wb") as copy:
                    _copy(archive, member, copy)
        later_release.check(Path(folder) / PurePosixPath(DATABASE).name)


def _copy(archive: tarfile.TarFile, member: tarfile.TarInfo, copy: BinaryIO) -> None:
    content = archive.extractfile(member)
    assert content is not None  # a plain file
    while block := content.read(2**20):
        copy.write(block)


@contextmanager
def _opened(file: Path) -> Iterator[tarfile.TarFile]:
    """Open an archive from its beginning, and read it to its end; what is wrong with it becomes a ConfigError."""
    try:
        with gzip.open(file) as raw, tarfile.open(fileobj=raw, mode="r|") as archive:
            yield archive
            while raw.read(2**20):  # its checksum stands at the end
                pass
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _wrong(file, f"is damaged, or none ({error})") from None
    except OSError as error:
        raise _wrong(file, f"cannot be read or unpacked ({error.strerror or error})") from None


def _name(file: Path, member: tarfile.TarInfo) -> str:
    """Return the path of a member. Raises ConfigError unless it is a plain file or a folder of PARTS, or FACTS."""
    path = PurePosixPath(member.name)
    inside = ".." not in path.parts and bool(path.parts)  # an absolute one begins with "/", which is no part
    if not inside or not (member.isreg() or member.isdir()) or not (path.parts[0] in PARTS or str(path) == FACTS):
        raise _wrong(file, f"holds {member.name!r}, which no backup does")
    return str(path)


def _facts(file: Path, archive: tarfile.TarFile, member: tarfile.TarInfo) -> dict[str, str]:
    content = archive.extractfile(member) if member.name == FACTS and member.size <= _MOST_FACTS else None
    try:
        facts = json.loads(content.read()) if content else None
    except ValueError:
        facts = None
    if not isinstance(facts, dict) or not isinstance(facts.get("format"), int):
        raise _wrong(file, f"does not begin with `{FACTS}`")
    if facts["format"] > FORMAT:
        raise _wrong(file, f"was made by a later release, in its form {facts['format']}")
    if "made" not in facts:
        raise _wrong(file, f"does not say in `{FACTS}` when it was made")
    return {str(key): str(value) for key, value in facts.items()}


def _wrong(file: Path, reason: str) -> ConfigError:
    return ConfigError(f"the backup '{file}' {reason}: choose another one, made by `quickbloom deploy backup`")
