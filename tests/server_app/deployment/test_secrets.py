"""`quickbloom secrets`: what it writes, what it leaves alone, and what it refuses."""

import base64
import os
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from programs import program

from quickbloom.common.errors import ConfigError
from quickbloom.server_app.cli import main
from quickbloom.server_app.deployment import private_files
from quickbloom.server_app.deployment import secrets as making
from quickbloom.server_app.deployment.certificates import check_certificate, issue, load_certificate, load_key, pem


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and output of `quickbloom secrets`, on one line."""
    monkeypatch.setattr("sys.argv", ["quickbloom", "secrets", *arguments])
    with pytest.raises(SystemExit) as end:
        main.main()
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return int(end.value.code or 0), " ".join((captured.out + captured.err).split())


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    making.create(tmp_path / "secrets", making.default_names(2), ["superlink"], 30)
    return tmp_path / "secrets"


def test_every_folder_is_complete_and_holds_no_key_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "not" / "yet"
    code, said = call(monkeypatch, capsys, "--output", str(output), "--nodes", "2", "--host", "fl.example.org")
    assert code == 0
    assert "fl.example.org, localhost, 127.0.0.1" in said
    assert {*content(output)} == {
        *("ca/ca.crt", "ca/ca.key", "cli/ca.crt", "superexec/ca.crt", "superexec/superexec.secret"),
        *("superlink/ca.crt", "superlink/server.crt", "superlink/server.key", "superlink/superexec.secret"),
        *("nodes/node-1/ca.crt", "nodes/node-1/node.key", "nodes/node-1/node.key.pub"),
        *("nodes/node-2/ca.crt", "nodes/node-2/node.key", "nodes/node-2/node.key.pub"),
    }
    files = content(output)
    assert len({data for name, data in files.items() if name.endswith("ca.crt")}) == 1
    assert files["superlink/superexec.secret"] == files["superexec/superexec.secret"]
    assert len(base64.b64decode(files["superexec/superexec.secret"], validate=True)) == 32
    assert len({data for name, data in files.items() if name.endswith(".key")}) == 4
    assert [entry.name for entry in output.parent.iterdir()] == ["yet"]
    program("openssl", "verify", "-CAfile", output / "cli" / "ca.crt", output / "superlink" / "server.crt")


@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_only_the_owner_reads_private_files_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        making.create(tmp_path / "secrets", ["a"], [], 30)
        making.add_nodes(tmp_path / "secrets", ["b"])
        making.renew_server(tmp_path / "secrets", [], 30)
    finally:
        os.umask(before)
    for path in (tmp_path / "secrets", *(tmp_path / "secrets").rglob("*")):
        private = path.name.endswith((".key", ".secret"))
        wanted = 0o700 if path.is_dir() else 0o600 if private else 0o644
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


def test_ssh_keygen_reads_a_nodes_key_pair(secrets: Path) -> None:
    private, public = secrets / "nodes" / "node-1" / "node.key", secrets / "nodes" / "node-1" / "node.key.pub"
    assert program("ssh-keygen", "-lf", public).startswith("384 SHA256:")
    assert program("ssh-keygen", "-lf", public).endswith("node-1 (ECDSA)\n")
    assert program("ssh-keygen", "-y", "-P", "", "-f", private).split()[:2] == public.read_text().split()[:2]


def test_what_is_there_is_never_overwritten(
    secrets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(secrets)
    code, said = call(monkeypatch, capsys, "--output", str(secrets))
    assert (code, said) == (
        2,
        f"error: `--output` must be a directory that does not exist yet, and '{secrets}' does: choose another one, or "
        "change it with `--add-node` or `--renew-server`",
    )
    assert content(secrets) == before
    file = secrets.parent / "file"
    file.write_text("mine")
    assert call(monkeypatch, capsys, "--output", str(file))[0] == 2
    assert file.read_text() == "mine"


def test_if_missing_makes_them_once_and_says_what_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "secrets"
    arguments = ["--output", str(output), "--if-missing", "--nodes", "2", "--host", "superlink"]
    assert call(monkeypatch, capsys, *arguments)[0] == 0
    before = content(output)
    assert call(monkeypatch, capsys, *arguments) == (0, f"Secrets in {output}: already there.")
    code, said = call(monkeypatch, capsys, *arguments[:-3], "3", "--host", "elsewhere")
    assert code == 0
    assert "But its certificate does not name `elsewhere`: renew it" in said
    assert "But there is no node `node-3`: make it with `--add-node`." in said
    assert content(output) == before


def test_if_missing_refuses_what_is_incomplete_but_for_the_ca(
    secrets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (secrets / "ca").rename(secrets.parent / "offline")
    assert call(monkeypatch, capsys, "--output", str(secrets), "--if-missing")[0] == 0
    (secrets / "nodes" / "node-2" / "node.key").unlink()
    code, said = call(monkeypatch, capsys, "--output", str(secrets), "--if-missing")
    assert code == 2
    assert "are not complete, `nodes/node-2/node.key` is missing: restore it" in said


def test_if_missing_says_that_a_certificate_has_expired(
    secrets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ca_key, ca = load_key(secrets / "ca" / "ca.key"), load_certificate(secrets / "ca" / "ca.crt")
    key, old = issue(ca_key, ca, [], 1, datetime.now(UTC) - timedelta(days=9))
    (secrets / "superlink" / "server.crt").write_bytes(pem(old))
    (secrets / "superlink" / "server.key").write_bytes(pem(key))
    code, said = call(monkeypatch, capsys, "--output", str(secrets), "--if-missing")
    assert code == 0
    assert "server.crt' expired at" in said


def test_a_new_node_leaves_everything_else_as_it_was(secrets: Path) -> None:
    before = content(secrets)
    making.add_nodes(secrets, ["ward-7", "ward-10"])
    after = content(secrets)
    assert before.items() <= after.items()
    assert {name.split("/")[1] for name in after.keys() - before.keys()} == {"ward-7", "ward-10"}
    assert after["nodes/ward-7/ca.crt"] == before["ca/ca.crt"]
    assert making.node_names(secrets) == ["node-1", "node-2", "ward-7", "ward-10"]
    assert making.public_keys(secrets)["ward-7"] == secrets / "nodes" / "ward-7" / "node.key.pub"


def test_renewal_changes_the_server_certificate_alone(secrets: Path) -> None:
    before = content(secrets)
    making.renew_server(secrets, [], 90)
    after = content(secrets)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"superlink/server.crt", "superlink/server.key"}
    assert after.keys() == before.keys()
    server, ca = secrets / "superlink" / "server.crt", secrets / "ca" / "ca.crt"
    program("openssl", "verify", "-CAfile", ca, "-verify_hostname", "superlink", server)
    assert check_certificate(server, ca, secrets / "superlink" / "server.key") == ""
    left = load_certificate(server).not_valid_after_utc - datetime.now(UTC)
    assert timedelta(days=89) < left <= timedelta(days=90)
    making.renew_server(secrets, ["new.example.org"], 90)
    program("openssl", "verify", "-CAfile", ca, "-verify_hostname", "new.example.org", server)
    assert "hostname mismatch" in program(
        "openssl", "verify", "-CAfile", ca, "-verify_hostname", "superlink", server, fails=True
    )


def test_renewal_without_the_cas_own_key_is_refused_and_changes_nothing(
    secrets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(secrets)
    (secrets / "ca" / "ca.key").write_bytes((secrets / "superlink" / "server.key").read_bytes())
    code, said = call(monkeypatch, capsys, "--output", str(secrets), "--renew-server")
    assert code == 2
    assert "ca.key' does not belong to the CA" in said
    (secrets / "ca" / "ca.key").unlink()
    code, said = call(monkeypatch, capsys, "--output", str(secrets), "--renew-server")
    assert code == 2
    assert f"the key '{secrets / 'ca' / 'ca.key'}' is missing" in said
    assert content(secrets).items() <= before.items()


@pytest.mark.parametrize("fault", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_creation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException) -> None:
    written: list[Path] = []
    write = private_files.write

    def breaks(path: Path, data: bytes, private: bool) -> None:
        if len(written) == 7:
            raise fault
        written.append(path)
        write(path, data, private)

    monkeypatch.setattr(private_files, "write", breaks)
    with pytest.raises((ConfigError, KeyboardInterrupt)):
        making.create(tmp_path / "secrets", ["a"], [], 30)
    assert len(written) == 7
    assert list(tmp_path.iterdir()) == []


def test_a_killed_creation_leaves_nothing_under_the_name_and_the_next_one_clears_up(tmp_path: Path) -> None:
    program_text = (
        "import os, signal; from pathlib import Path; from quickbloom.server_app.deployment import private_files, secrets\n"
        "private_files.give = lambda path, owner: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"secrets.create(Path({str(tmp_path / 'secrets')!r}), ['a'], [], 30)\n"
    )
    done = subprocess.run([sys.executable, "-c", program_text], capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == [".secrets.partial"]
    making.create(tmp_path / "secrets", ["a"], [], 30)
    assert [entry.name for entry in tmp_path.iterdir()] == ["secrets"]


def test_two_commands_at_once_do_not_mix(tmp_path: Path) -> None:
    with (
        private_files.alone_beside(tmp_path / "secrets"),
        pytest.raises(ConfigError, match="another `quickbloom secrets` is at work"),
    ):
        making.create(tmp_path / "secrets", ["a"], [], 30)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, which alone can give files away")
def test_root_gives_everything_to_the_owner_and_so_does_what_is_added(tmp_path: Path) -> None:
    making.create(tmp_path / "secrets", ["a"], [], 30, owner=49999)
    making.add_nodes(tmp_path / "secrets", ["b"])
    making.renew_server(tmp_path / "secrets", [], 30)
    assert {path.stat().st_uid for path in (tmp_path / "secrets", *(tmp_path / "secrets").rglob("*"))} == {49999}


def test_without_root_no_owner_can_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ConfigError, match="`--owner` needs root, which alone can give files away, got 49999 as user 1000"):
        making.create(tmp_path / "secrets", ["a"], [], 30, owner=49999)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--host", "fl.example.org:9092"], "`--host` must be a DNS name or an IP address"),
        (["--add-node", "a"], "`--output` must be a directory with secrets"),
        (["--renew-server"], "`--output` must be a directory with secrets"),
        (["--add-node", "a", "--nodes", "2"], "`--nodes` and `--add-node` exclude each other"),
        (["--renew-server", "--if-missing"], "`--if-missing` and `--renew-server` exclude each other"),
        (["--add-node", "a", "--host", "b"], "`--host` goes with the making of secrets or with `--renew-server`"),
        (["--register", "nowhere"], "`--register` must be a [superlink.NAME] of Flower's config.toml, got 'nowhere'"),
        (["--days", "0"], "Invalid value for '--days'"),
    ],
)
def test_wrong_input_is_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    code, said = call(monkeypatch, capsys, "--output", str(tmp_path / "secrets"), *arguments)
    assert code == 2
    assert sentence in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "../a", "a/b", ".a", "a b", "-a", "a" * 64])
def test_a_node_name_that_is_no_plain_file_name_is_refused(secrets: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="`--add-node` must be a name of up to 63"):
        making.add_nodes(secrets, [name])


def test_a_nodes_key_is_never_replaced(secrets: Path) -> None:
    before = content(secrets)
    with pytest.raises(ConfigError, match="there is a node `node-2` in"):
        making.add_nodes(secrets, ["new", "node-2"])
    with pytest.raises(ConfigError, match="got `twin` more than once"):
        making.add_nodes(secrets, ["twin", "twin"])
    assert content(secrets) == before
