"""A pair of certificate and key is taken up once both are new; what does not belong together is passed over."""

from pathlib import Path

import pytest

from quickbloom.common.flower.states.new_certificate import Pair, take_up
from quickbloom.server_app.deployment.secrets import create, renew_server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """That of a SuperLink; beside it, `other` has a newer certificate from the same CA."""
    create(tmp_path / "secrets", ["node-1"], [], days=5)
    files = {path.name: path.read_bytes() for path in (tmp_path / "secrets" / "superlink").iterdir()}
    renew_server(tmp_path / "secrets", [], days=9)
    (tmp_path / "secrets" / "superlink").rename(tmp_path / "other")
    (tmp_path / "here").mkdir()
    for name, content in files.items():
        (tmp_path / "here" / name).write_bytes(content)
    return tmp_path / "here"


def test_half_of_a_new_pair_is_passed_over_and_the_whole_is_taken_up(folder: Path) -> None:
    other = folder.parent / "other"
    pair = Pair(folder / "server.crt", folder / "server.key")
    old = (folder / "server.key").read_bytes(), (folder / "server.crt").read_bytes()
    assert pair.current()[:2] == old
    (folder / "server.crt").write_bytes((other / "server.crt").read_bytes())
    assert pair.current()[:2] == old
    (folder / "server.key").write_bytes(b"-----BEGIN PRIVATE")  # as while it is written
    assert pair.current()[:2] == old
    (folder / "server.key").unlink()
    assert pair.current()[:2] == old
    (folder / "server.key").write_bytes((other / "server.key").read_bytes())
    key, certificate, context = pair.current()
    assert (key, certificate) == ((other / "server.key").read_bytes(), (other / "server.crt").read_bytes())
    assert pair.current()[2] is context


def test_files_that_cannot_be_used_are_left_to_flower(folder: Path) -> None:
    import grpc

    before = grpc.ssl_server_credentials
    (folder / "server.key").write_bytes((folder.parent / "other" / "server.key").read_bytes())
    assert take_up(folder / "server.crt", folder / "server.key") is None
    assert grpc.ssl_server_credentials is before
