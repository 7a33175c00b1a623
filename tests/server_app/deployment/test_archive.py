"""The backup of a server: what goes in comes out, and nothing else is ever written."""

import errno
import io
import json
import os
import sqlite3
import stat
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

import pytest

from quickbloom.common.errors import ConfigError
from quickbloom.common.flower.states.later_release import DatabaseError, known_changes
from quickbloom.server_app.deployment import archive as archive_module
from quickbloom.server_app.deployment.archive import check, pack, unpack

Change = Callable[[tarfile.TarFile], None]


def database(path: Path, change: str) -> None:
    """A database whose tables were changed last by that."""
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
        connection.execute("INSERT INTO alembic_version VALUES (?)", (change,))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The volumes of a server."""
    home = tmp_path / "home"
    (home / "vault" / "secrets" / "superlink").mkdir(parents=True, mode=0o700)
    (home / "state").mkdir()
    key = home / "vault" / "secrets" / "superlink" / "server.key"
    key.write_bytes(b"a key")
    key.chmod(0o600)
    (home / "vault" / "secrets" / "superlink" / "ca.crt").write_bytes(b"a certificate")
    (home / "vault" / "secrets" / "superlink" / "ca.crt").chmod(0o644)
    database(home / "state" / "superlink.db", min(known_changes()))
    return home


def packed(home: Path, file: Path) -> Path:
    with file.open("wb") as out:
        pack(home, out)
    return file


def content(home: Path) -> dict[str, tuple[int, bytes]]:
    """Mode and bytes of every file, and the mode of every folder below the volumes."""
    found = [path for path in home.rglob("*") if path.parent != home]
    return {
        str(path.relative_to(home)): (stat.S_IMODE(path.stat().st_mode), path.read_bytes() if path.is_file() else b"")
        for path in found
    }


def test_what_was_packed_is_put_back_with_its_modes(home: Path, tmp_path: Path) -> None:
    file = packed(home, tmp_path / "a.tgz")
    assert check(file)["format"] == "1"
    for part in ("vault", "state"):
        (tmp_path / "new" / part).mkdir(parents=True)
    unpack(file, tmp_path / "new")
    assert content(tmp_path / "new") == content(home)
    assert len(content(home)) == 5


def test_nothing_is_packed_where_no_server_was(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing to back up, `vault/secrets/superlink/server.key` is missing"):
        pack(tmp_path, io.BytesIO())


def test_a_link_is_not_packed(home: Path) -> None:
    (home / "vault" / "there").symlink_to("/etc")
    with pytest.raises(ConfigError, match=r"^`vault/there` must be a plain file or a folder"):
        pack(home, io.BytesIO())


def test_it_is_not_put_over_a_server(home: Path, tmp_path: Path) -> None:
    file, before = packed(home, tmp_path / "a.tgz"), content(home)
    with pytest.raises(ConfigError, match=r"^there is a server already, its vault is not empty: .* --volumes"):
        unpack(file, home)
    assert content(home) == before


def test_the_database_of_a_later_flower_is_refused_before_anything_is_written(home: Path, tmp_path: Path) -> None:
    (home / "state" / "superlink.db").unlink()
    database(home / "state" / "superlink.db", "ffffffffffff")
    file = packed(home, tmp_path / "a.tgz")
    with pytest.raises(DatabaseError, match=r"was changed by a later release of Flower .*ffffffffffff"):
        unpack(file, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_database_that_is_none_is_refused(home: Path, tmp_path: Path) -> None:
    (home / "state" / "superlink.db").write_text("nothing of the kind " * 100)
    with pytest.raises(DatabaseError, match=r"must be the database of a SuperLink"):
        unpack(packed(home, tmp_path / "a.tgz"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def with_member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> Change:
    """Adds one member."""

    def change(archive: tarfile.TarFile) -> None:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, link
        archive.addfile(member, io.BytesIO())

    return change


HOSTILE: dict[str, Change] = {
    "above": with_member("vault/../../evil"),
    "above at once": with_member("../evil"),
    "absolute": with_member("/tmp/evil"),
    "elsewhere": with_member("etc/passwd"),
    "the root": with_member("."),
    "a symbolic link": with_member("vault/link", tarfile.SYMTYPE, "/etc"),
    "a hard link": with_member("vault/link", tarfile.LNKTYPE, "vault/secrets/superlink/server.key"),
    "a device": with_member("vault/device", tarfile.CHRTYPE),
    "a pipe": with_member("state/pipe", tarfile.FIFOTYPE),
    "a file twice": with_member("./vault/secrets/superlink/server.key"),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_an_archive_with_anything_else_is_refused_and_nothing_is_written(change: Change, home: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.tgz"
    with tarfile.open(packed(home, tmp_path / "good.tgz")) as good, tarfile.open(file, "w:gz") as bad:
        for member in good:
            bad.addfile(member, good.extractfile(member))
        change(bad)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=r"^the backup '.*a.tgz' .*: choose another one") as said:
        unpack(file, tmp_path / "new")
    assert "\n" not in str(said.value)
    assert set(tmp_path.rglob("*")) == before


def test_a_file_in_a_files_place_is_refused(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.tgz"
    with tarfile.open(packed(home, tmp_path / "good.tgz")) as good, tarfile.open(file, "w:gz") as bad:
        for member in good:
            bad.addfile(member, good.extractfile(member))
        with_member("state/superlink.db/more")(bad)
    with pytest.raises(ConfigError, match=r"cannot be read or unpacked"):
        unpack(file, tmp_path / "new")


def facts(content: bytes, name: str = "backup.json") -> bytes:
    """An archive of that one file."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return raw.getvalue()


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "is damaged, or none"),
        (b"no archive at all", "is damaged, or none"),
        (facts(b"{}"), "does not begin with `backup.json`"),
        (facts(b"[1"), "does not begin with `backup.json`"),
        (facts(b"x" * 20_000), "does not begin with `backup.json`"),
        (facts(b"a key", "vault/a"), "does not begin with `backup.json`"),
        (facts(json.dumps({"format": 2}).encode()), "was made by a later release"),
        (facts(json.dumps({"format": 1}).encode()), "does not say in `backup.json` when it was made"),
        (facts(json.dumps({"format": 1, "made": "now"}).encode()), "lacks `vault/secrets/superlink/server.key`"),
    ],
)
def test_what_is_no_backup_is_said(raw: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.tgz").write_bytes(raw)
    with pytest.raises(ConfigError, match=reason):
        check(tmp_path / "a.tgz")


def test_a_backup_that_was_cut_off_or_damaged_is_refused(home: Path, tmp_path: Path) -> None:
    (home / "state" / "more").write_bytes(os.urandom(50_000))
    whole = packed(home, tmp_path / "a.tgz").read_bytes()
    for raw in (whole[: len(whole) // 2], whole[:-20], whole[:30_000] + bytes(100) + whole[30_100:]):
        (tmp_path / "a.tgz").write_bytes(raw)
        with pytest.raises(ConfigError, match="is damaged, or none"):
            check(tmp_path / "a.tgz")


def test_a_restoration_that_fails_in_the_middle_leaves_nothing_and_can_be_repeated(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, new = packed(home, tmp_path / "a.tgz"), tmp_path / "new"
    for part in ("vault", "state"):
        (new / part).mkdir(parents=True)
    written: list[str] = []

    def full(archive: tarfile.TarFile, member: tarfile.TarInfo, copy: BinaryIO) -> None:
        if isinstance(copy.name, int):  # not that of the look at the database
            written.append(member.name)
            if len(written) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
        whole(archive, member, copy)

    with monkeypatch.context() as patched:
        whole = archive_module._copy
        patched.setattr(archive_module, "_copy", full)
        with pytest.raises(ConfigError, match="No space left on device"):
            unpack(file, new)
    assert len(written) == 2
    assert content(new) == {}
    (new / "vault" / ".restoring").mkdir()  # of one that was killed
    (new / "vault" / ".restoring" / "server.key").write_text("half a key")
    unpack(file, new)
    assert content(new) == content(home)


def test_what_a_killed_restoration_left_is_not_packed(home: Path, tmp_path: Path) -> None:
    before = content(home)
    (home / "vault" / ".restoring" / "secrets").mkdir(parents=True)
    (home / "vault" / ".restoring" / "secrets" / "server.key").write_text("half a key")
    unpack(packed(home, tmp_path / "a.tgz"), tmp_path / "new")
    assert content(tmp_path / "new") == before
