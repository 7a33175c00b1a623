"""What `quickbloom-edge join` looks at before and while it takes part: secrets, certificate, key, clock, data, quiet hours."""

import errno
import signal
import ssl
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from socket import create_server
from typing import TextIO

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from typer.testing import CliRunner

from quickbloom.client_app import cli
from quickbloom.client_app import join as joining
from quickbloom.client_app.cli import cli as edge
from quickbloom.client_app.clock_check import ClockError, check_against_ca
from quickbloom.client_app.join import JoinError, check_files, default_state, join, node_settings, wait_for
from quickbloom.client_app.quiet_hours import QuietHours, outside
from quickbloom.common.errors import ConfigError, DataError
from quickbloom.server_app.deployment.certificates import issue, make_ca, node_key, pem

NOW = datetime.now(UTC)


def secrets(folder: Path, made: datetime = NOW) -> tuple[Path, Path]:
    """(the folder of a node, a file with the server's certificate and key), of a new CA; the certificate lasts ten days."""
    folder.mkdir()
    ca_key, ca = make_ca(made)
    key, certificate = issue(ca_key, ca, ["localhost"], 10, made)
    (folder / "ca.crt").write_bytes(pem(ca))
    (folder / "node.key").write_bytes(node_key()[0])
    (folder / "server.pem").write_bytes(pem(certificate) + pem(key))
    return folder, folder / "server.pem"


@contextmanager
def server(certificate: Path | None) -> Iterator[int]:
    """The port of a listener that shakes hands with this certificate, or says something that is no TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if certificate:
        context.load_cert_chain(certificate)
    with create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            try:
                connection, _ = listener.accept()
                with connection:
                    if certificate:
                        context.wrap_socket(connection, server_side=True).close()
                    else:
                        connection.recv(1)
                        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            except OSError:
                pass  # the other side has refused

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(10)


def said(error: BaseException) -> str:
    """The one sentence."""
    assert "\n" not in str(error)
    return str(error)


def test_a_server_that_the_ca_vouches_for_is_believed(tmp_path: Path) -> None:
    node, certificate = secrets(tmp_path / "ours")
    with server(certificate) as port:
        wait_for("localhost", port, node / "ca.crt", print)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("wrong CA", "was not made by the CA in"),
        ("expired certificate", "has expired: renew it there"),
        ("other name", "is for other names: renew it there"),
        ("no TLS", "does not speak TLS"),
    ],
)
def test_a_server_that_cannot_be_trusted_is_refused_in_one_sentence(tmp_path: Path, case: str, words: str) -> None:
    ours, certificate = secrets(tmp_path / "ours", NOW - timedelta(days=30 if case == "expired certificate" else 0))
    other, _ = secrets(tmp_path / "theirs")
    node = other if case == "wrong CA" else ours
    host = "127.0.0.1" if case == "other name" else "localhost"
    if case == "other name":
        certificate = _for_another_name(ours)
    with server(None if case == "no TLS" else certificate) as port, pytest.raises(JoinError, match=words) as caught:
        wait_for(host, port, node / "ca.crt", print)
    said(caught.value)


def _for_another_name(folder: Path) -> Path:
    ca_key, ca = make_ca(NOW)
    key = ec.generate_private_key(ec.SECP384R1())
    builder = x509.CertificateBuilder().subject_name(x509.Name([])).issuer_name(ca.subject).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(NOW).not_valid_after(NOW + timedelta(days=1))
    named = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("elsewhere.org")]), critical=False)
    (folder / "ca.crt").write_bytes(pem(ca))
    path = folder / "elsewhere.pem"
    path.write_bytes(pem(named.sign(ca_key, SHA384())) + pem(key))
    return path


@pytest.mark.parametrize("case", ["PEM", "RSA", "no key", "empty"])
def test_a_key_that_is_none_is_refused_in_one_sentence(tmp_path: Path, case: str) -> None:
    node, _ = secrets(tmp_path / "ours")
    key = {
        "PEM": ec.generate_private_key(ec.SECP384R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        "RSA": rsa.generate_private_key(65537, 2048).private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()),
        "no key": b"hello",
        "empty": b"",
    }[case]
    check_files(node)
    (node / "node.key").write_bytes(key)
    with pytest.raises(JoinError, match="must be an elliptic-curve private key in OpenSSH's format") as caught:
        check_files(node)
    said(caught.value)


def test_a_key_that_the_server_refuses_is_tried_again_and_then_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "supernode"
    program.write_text(f"#!{sys.executable}\nprint('[code: 2004] Failed to activate SuperNode')\nraise SystemExit(305)\n")
    program.chmod(0o755)
    monkeypatch.setattr(joining, "PATIENCE", 0.0)
    monkeypatch.setattr("quickbloom.client_app.join.time.sleep", lambda seconds: None)
    told: list[str] = []
    with pytest.raises(JoinError, match="refuses this node's key: register it with `quickbloom secrets --register`") as caught:
        joining._supervise([str(program)], {}, "fl.example.org:9092", told.append)
    said(caught.value)
    assert "trying again" in told[0]


@pytest.mark.parametrize(
    ("days", "words"), [(-1, "was made on .* set the clock"), (3 * 3660, "ended on .* ask for new secrets"), (1, "")]
)
def test_a_clock_at_which_the_ca_does_not_hold_is_one_sentence(tmp_path: Path, days: int, words: str) -> None:
    node, _ = secrets(tmp_path / "ours")
    if not words:
        check_against_ca(node / "ca.crt", NOW + timedelta(days=days))
        return
    with pytest.raises(ClockError, match=words) as caught:
        check_against_ca(node / "ca.crt", NOW + timedelta(days=days))
    said(caught.value)


def test_settings_of_the_command_become_those_of_the_node() -> None:
    told = {"partition-id": "1", "data-dir": "/data", "show-rounds": "false"}
    assert node_settings(told) == {"partition-id": 1, "data-dir": "/data", "show-rounds": False}
    assert default_state("fl.example.org:9092").name == "fl.example.org_9092"


def test_data_are_checked_before_the_secrets_and_the_server(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("task,x,y\nA,1,ill\n")
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(DataError, match="at least two classes"):
            join("localhost:1", tmp_path / "none", {"data-path": str(tmp_path / "a.csv")}, 9094, print)
        with pytest.raises(JoinError, match=r"node\.key|ca\.crt"):
            join("localhost:1", tmp_path / "none", {}, 9094, print)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_categories_that_the_run_may_have_declared_do_not_end_the_check(tmp_path: Path) -> None:
    rows = "".join(f"A,{'B7' if x == 3 else x},{'ill' if x % 2 else 'well'}\n" for x in range(20))
    (tmp_path / "a.csv").write_text(f"task,ward,y\n{rows}")
    said, before = list[str](), signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(JoinError, match=r"node\.key|ca\.crt"):
            join("localhost:1", tmp_path / "none", {"data-path": str(tmp_path / "a.csv")}, 9094, said.append)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert said[0].startswith("the column `ward` holds numbers, but row 4 (without the header) holds the text 'B7'")
    assert said[0].endswith("this device is refused unless the run has `own.categorical=ward`")
    assert any(line.startswith("task A: 8 support") for line in said)  # and the rest of the file is looked at
    check = ["check-data", str(tmp_path / "a.csv")]
    assert isinstance(CliRunner().invoke(edge, check).exception, DataError)
    declared = CliRunner().invoke(edge, [*check, "--set", "own.categorical=ward"])
    assert (declared.exit_code, "column ward: text, 20 different values" in declared.stdout) == (0, True)


def test_a_file_without_a_task_column_is_said_to_be_one_task_before_anything_connects(tmp_path: Path) -> None:
    rows = "".join(f"{x},{'ill' if x % 2 else 'well'}\n" for x in range(20))
    (tmp_path / "ward-7.csv").write_text(f"x,y\n{rows}")
    settings, said = {"data-path": str(tmp_path / "ward-7.csv")}, list[str]()
    before = signal.getsignal(signal.SIGTERM)
    try:
        for more in ({}, {"task-name": "north"}, {"task-column": "ward"}):
            refused = pytest.raises(DataError, match="no column `ward`") if "task-column" in more else pytest.raises(JoinError)
            with refused:
                join("localhost:1", tmp_path / "none", settings | more, 9094, said.append)
    finally:
        signal.signal(signal.SIGTERM, before)
    tasks = [line.split(":")[0] for line in said if line.startswith("task ")]
    assert tasks == ["task ward-7", "task north"]
    assert "no column `task` says whose row it is: all rows are one task, to the server 'ward-7'" in " ".join(said)
    assert not [line for line in said if line.startswith("column task")]


@pytest.mark.parametrize(
    ("text", "quiet", "loud"),
    [
        ("22:30-06:00", ["22:30", "23:59", "00:00", "05:59"], ["06:00", "12:00", "22:29"]),
        ("9:00-17:00", ["09:00", "16:59"], ["08:59", "17:00", "00:00"]),
        ("18:00-24:00", ["18:00", "23:59"], ["00:00", "17:59"]),
        ("", [], ["00:00", "12:00"]),
        ("12:00-12:00", [], ["00:00", "12:00"]),
    ],
)
def test_the_window_of_quiet_hours_may_span_midnight(text: str, quiet: list[str], loud: list[str]) -> None:
    hours = QuietHours.parse(text)
    for times, expected in ((quiet, True), (loud, False)):
        for time in times:
            assert hours.now(datetime.strptime(time, "%H:%M")) is expected, time


@pytest.mark.parametrize(
    "text", ["22-6", "25:00-06:00", "22:60-06:00", "night", "22:30", "22:30-06:00-07:00", "24:30-06:00", "00:00-24:00"]
)
def test_quiet_hours_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="`--quiet-hours` must be HH:MM-HH:MM"):
        QuietHours.parse(text)


def test_work_is_ended_when_the_quiet_hours_begin_and_done_again_after_them() -> None:
    hours, told, begun = [8], [], threading.Event()

    def work() -> int:
        told.append(f"work at {hours[0]}")
        if hours[0] == 12:
            return 7
        previous = signal.signal(signal.SIGTERM, lambda *_: begun.set())
        hours[0] = 9
        assert begun.wait(10)
        signal.signal(signal.SIGTERM, previous)
        return 0

    def clock() -> datetime:
        if begun.is_set():
            hours[0] += 1  # time passes while it is quiet
        return datetime(2026, 1, 1, hours[0])

    assert outside(QuietHours.parse("9:00-12:00"), work, told.append, clock, look=0.01) == 7
    assert told == ["work at 8", "quiet hours 09:00-12:00: taking no part until they end", "work at 12"]


def test_work_that_ends_by_itself_ends_all_and_a_signal_of_the_user_too() -> None:
    assert outside(QuietHours(), lambda: 3, print, look=0.01) == 3

    def interrupted() -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        outside(QuietHours(), interrupted, print, look=0.01)


def test_the_command_says_one_sentence_and_has_an_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["quickbloom-edge", "predict", "--model", str(tmp_path), "--input", "x.csv"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    done = CliRunner().invoke(cli.cli, ["join", "--server", "nowhere", "--secrets", str(tmp_path)])
    assert isinstance(done.exception, ConfigError)
    assert "`--server` must be HOST:PORT" in str(done.exception)


def test_an_ipv6_server_is_waited_for_without_its_brackets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = secrets(tmp_path / "node")
    asked: list[tuple[str, int]] = []

    def wait(host: str, port: int, ca: Path, say: object) -> None:
        asked.append((host, port))
        raise JoinError("enough")

    monkeypatch.setattr(joining, "wait_for", wait)
    with pytest.raises(JoinError, match="enough"):
        join("[::1]:9092", folder, {"state-dir": str(tmp_path / "state")}, 9094, print)
    assert asked == [("::1", 9092)]
    with pytest.raises(ConfigError, match=r"`--server` must have an IPv6 address in brackets, such as \[::1\]:9092"):
        join("::1:9092", folder, {}, 9094, print)


def test_a_machine_without_ipv4_and_one_without_a_compiler_are_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("quickbloom.common.maths.kernels.prebuilt.installed", lambda: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(JoinError, match="cannot be read"):
        join("localhost:1", tmp_path / "none", {"state-dir": str(tmp_path / "state")}, 9094, said.append)
    assert [line for line in said if line.startswith("there is no C++ compiler here")]

    def refuse(self: object, address: object) -> None:
        raise OSError(99, "Cannot assign requested address")

    monkeypatch.setattr("socket.socket.bind", refuse)
    with pytest.raises(ConfigError, match=r"a node needs the address 127\.0\.0\.1 \(IPv4\)"):
        join("localhost:1", tmp_path / "none", {}, 9094, said.append)


def test_old_predictions_stay_where_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        rows = ({"prediction": "up"},)

        def write_csv(self, file: TextIO) -> None:
            file.write("row,task\n1,")
            file.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("quickbloom.client_app.offline.predicting.predict", lambda model, data, trust, encoder: Full())
    output = tmp_path / "predictions.csv"
    output.write_text("old\n")
    done = CliRunner().invoke(edge, ["predict", "--model", "m", "--input", "x.csv", "--output", str(output)])
    assert isinstance(done.exception, ConfigError)
    assert "`--output` must be a file that can be written" in str(done.exception)
    assert "No space left on device" in str(done.exception)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("predictions.csv", "old\n")]
