"""Two devices with files of their own join a real SuperLink over TLS, train, and keep models that are theirs."""

import csv
import json
import os
import ssl
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest
import tomli_w
from real_processes import SCRIPTS, process, quickbloom, without_names

from quickbloom import predict
from quickbloom.client_app.clock_check import ClockError, check_against_server
from quickbloom.common.flower.names import NAMES
from quickbloom.server_app.deployment.secrets import create
from quickbloom.server_app.launch.flower_run import environment, free_port

pytestmark = pytest.mark.grpc


def ward(path: Path, *names: str) -> Path:
    rng = np.random.default_rng(ord(names[0]))
    lines = ["ward,age,marker,outcome"]
    for name in names:
        for marker in rng.normal(size=50):
            sick = marker * (-1) ** ord(name) + 0.3 * rng.normal() > 0
            lines.append(f"{name},{rng.normal(60, 9):.1f},{marker:.4f},{'ill' if sick else 'well'}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """A directory with `secrets` of two registered nodes, and the port of the Fleet API of a SuperLink that runs."""
    home = tmp_path_factory.mktemp("edge")
    create(home / "secrets", ["node-1", "node-2"], [], days=1)
    ca, files = home / "secrets" / "cli" / "ca.crt", home / "secrets" / "superlink"
    http, fleet = free_port(), free_port()
    connection = {"address": f"127.0.0.1:{http}", "root-certificates": str(ca)}
    (home / "config.toml").write_text(tomli_w.dumps({"superlink": {"loopback": connection}}))
    command: list[str | Path] = [SCRIPTS / "flower-superlink", "--host", "127.0.0.1", "--port", str(http)]
    command += ["--fleet-api-address", f"127.0.0.1:{fleet}", "--disable-runtime-dependency-installation"]
    command += ["--enable-supernode-auth", "--ssl-ca-certfile", files / "ca.crt"]
    command += ["--ssl-certfile", files / "server.crt", "--ssl-keyfile", files / "server.key"]
    with process(*command, env=environment(home), log=home / "superlink.log"):
        _until(lambda: _healthy(http, ca))
        done = quickbloom("secrets", "--register", "loopback", cwd=home, flwr_home=home)
        assert done.returncode == 0, done.stderr
        yield home, fleet


def join(home: Path, fleet: int, node: int, *more: str | Path) -> list[str | Path]:
    command: list[str | Path] = [
        SCRIPTS / "python",
        "-m",
        "quickbloom.client_app.cli",
        "join",
        "--server",
        f"127.0.0.1:{fleet}",
    ]
    return [*command, "--secrets", home / "secrets" / "nodes" / f"node-{node}", "--port", str(free_port()), *more]


def test_two_devices_train_and_predict_what_the_server_saw(link: tuple[Path, int], tmp_path: Path) -> None:
    home, fleet = link
    env = {**environment(home), "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    first, second = ward(tmp_path / "1.csv", "A", "B"), ward(tmp_path / "north.csv", "C")
    # The rows of the second device do not say whose they are.
    second.write_text("".join(line.partition(",")[2] for line in second.read_text().splitlines(keepends=True)))
    own = ["--target", "outcome", "--threads", "1", "--quiet-hours", "12:00-12:00"]
    one = join(home, fleet, 1, "--data", first, "--task", "ward", "--state", tmp_path / "state-1", *own)
    two = join(home, fleet, 2, "--data", second, "--state", tmp_path / "state-2", *own)
    with process(*one, env=env, log=tmp_path / "1.log"), process(*two, env=env, log=tmp_path / "2.log"):
        settings = [
            "--set",
            "validation-tasks=1",
            "--set",
            "test-tasks=1",
            "--set",
            "mlp.hidden=8",
            "--set",
            "evaluate-every=0",
        ]
        run = ["run", "--connection", "loopback", "--dataset", "own", "--algorithm", "fomaml", "--rounds", "2", *settings]
        done = quickbloom(*run, "--output", str(tmp_path / "run"), cwd=tmp_path, flwr_home=home)
        said = (tmp_path / "1.log").read_text() + (tmp_path / "2.log").read_text()
        assert done.returncode == 0, done.stderr + said
    with (tmp_path / "run" / "per_task.csv").open(newline="") as file:
        rows = {row["task"]: row for row in csv.DictReader(file) if row["split"] != "seen"}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    step, checked = summary["chosen"]["adapt_steps"], 0
    for node, data in ((1, first), (2, second)):
        for score in predict(tmp_path / f"state-{node}" / "personal", data).scores:
            if score.task in rows:
                assert score.value == float(rows[score.task][f"accuracy_step{step}"])
                checked += 1
    assert checked == len(rows) == 2
    # Means of columns and sums came over TLS as well, and the scores at the end are those of the run.
    (tested,) = (row for row in rows.values() if row["split"] == "test")
    beside = summary["baselines"]["scores"]["accuracy"]
    assert beside["after"]["mean"] == pytest.approx(float(tested[f"accuracy_step{step}"]), abs=1e-6)
    assert beside["own"]["mean"] == pytest.approx(float(tested["accuracy_own"]), abs=1e-6)
    assert "global" in beside
    assert json.loads((tmp_path / "run" / "config.json").read_text())["own.scale"] == "shared"
    assert "task A: 20 support" in said
    assert "Personal model of north (round 2): accuracy" in said
    assert "Round 2, training: " in said
    assert "on its own test part" in said
    assert "Personal model of A (round 2): accuracy" in said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("gone", ["packing", "clock", "all"])
def test_nodes_and_server_that_lack_names_of_flower_train_or_say_what_is_missing(
    gone: str, link: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, fleet = link
    packing = ("recorddict_to_proto", "recorddict_from_proto", "ProtoRecordDict")
    clock = (
        "PUBLIC_KEY_HEADER",
        "TIMESTAMP_HEADER",
        "SIGNATURE_HEADER",
        "public_key_to_bytes",
        "sign_message",
        "GetRunRequest",
    )
    lacking = without_names(tmp_path / "site", *{"packing": packing, "clock": clock, "all": tuple(NAMES)}[gone])
    for name, value in lacking.items():
        monkeypatch.setenv(name, value)
    env = {**environment(home), **lacking}
    own = ["--target", "outcome", "--task", "ward", "--threads", "1", "--quiet-hours", "12:00-12:00"]
    nodes = [
        join(home, fleet, node, "--data", ward(tmp_path / f"{node}.csv", *wards), "--state", tmp_path / f"state-{node}", *own)
        for node, wards in ((1, "AB"), (2, "CD"))
    ]
    with process(*nodes[0], env=env, log=tmp_path / "1.log"), process(*nodes[1], env=env, log=tmp_path / "2.log"):
        settings = ["--set", "validation-tasks=1", "--set", "test-tasks=1", "--set", "node-deadline=60"]
        run = ["run", "--connection", "loopback", "--dataset", "own", "--algorithm", "fomaml", "--rounds", "2", *settings]
        done = quickbloom(*run, "--output", str(tmp_path / "run"), cwd=tmp_path, flwr_home=home)
    said = (tmp_path / "1.log").read_text() + (tmp_path / "2.log").read_text()
    assert "Traceback" not in said + done.stderr
    assert (tmp_path / "site" / "lacking").read_text()
    if gone == "clock":
        assert done.returncode == 0, done.stderr + said
        assert (tmp_path / "run" / "summary.json").is_file()
    else:  # the server runs with the SuperLink, which has all names: it packs messages, and these nodes cannot unpack them
        assert done.returncode == 1
        assert "lacks `flwr.proto.recorddict_pb2.RecordDict`, which is needed for sending messages" in done.stderr


def test_a_clock_that_is_wrong_is_found_before_the_node_starts(link: tuple[Path, int]) -> None:
    home, fleet = link
    secrets, now = home / "secrets" / "nodes" / "node-1", datetime.now(UTC)
    check_against_server(f"127.0.0.1:{fleet}", secrets)
    for wrong in (timedelta(minutes=1), timedelta(minutes=-10)):
        with pytest.raises(ClockError, match=r"this device's clock says .* set it"):
            check_against_server(f"127.0.0.1:{fleet}", secrets, now + wrong)


def test_data_that_cannot_be_used_end_the_command_before_it_connects(tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("ward,x,outcome\nA,1,ill\nA,2,ill\n")
    own: list[str | Path] = ["--data", tmp_path / "bad.csv", "--task", "ward", "--target", "outcome"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    with process(*join(tmp_path, free_port(), 1, *own), env=env, log=tmp_path / "log") as started:
        assert started.wait(120) == 2
    said = (tmp_path / "log").read_text()
    assert "the target must have at least two classes, got 1" in " ".join(said.split())
    assert "Traceback" not in said


def _healthy(port: int, ca: Path) -> bool:
    context = ssl.create_default_context(cafile=str(ca))
    try:
        with urlopen(f"https://localhost:{port}/health", timeout=1, context=context) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline, "not within 120 s"
        time.sleep(0.2)
