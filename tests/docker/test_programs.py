"""The small programs in docker/, without an engine, and what the compose files say."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from torch.utils.tensorboard import SummaryWriter

from benchmarks.compose import compose_command
from quickbloom import __version__
from quickbloom.server_app.deployment import archive

ROOT = Path(__file__).resolve().parents[2]


def program(name: str) -> ModuleType:
    """One of the programs in docker/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docker" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_image_and_compose_files_have_the_version_of_the_project() -> None:
    said = {}
    for path in (ROOT / "docker-compose.yml", *(ROOT / "docker").glob("*.yml")):
        for version in re.findall(r"image: quickbloom:\$\{QUICKBLOOM_VERSION:-([^}]*)\}", path.read_text()):
            said[path.name] = version
    for version in re.findall(r"^ARG VERSION=(.*)$", (ROOT / "docker" / "Dockerfile").read_text(), re.MULTILINE):
        said["Dockerfile"] = version
    assert said == dict.fromkeys(
        ["docker-compose.yml", "gpu.yml", "scale.yml", "monitor.yml", "metrics.yml", "Dockerfile"], __version__
    )


@pytest.mark.parametrize("overlays", [["gpu"], ["scale"], ["monitor"], ["metrics"], ["scale", "monitor", "metrics"]])
def test_compose_takes_the_overlays(overlays: list[str]) -> None:
    if not compose_command():
        pytest.skip("needs Compose: install docker-compose")
    files = [part for name in overlays for part in ("-f", f"docker/{name}.yml")]
    done = subprocess.run(
        [*compose_command(), "-f", "docker-compose.yml", *files, "config"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert ("driver: nvidia" in done.stdout) == (overlays == ["gpu"])


def test_every_replica_takes_another_key_until_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take_key = program("take_key")
    for name in ("node-1", "node-2", "node-10"):
        (tmp_path / "secrets" / name).mkdir(parents=True)
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(take_key, "KEYS", tmp_path / "secrets")
    monkeypatch.setattr(take_key, "DATA", tmp_path / "data")
    assert [take_key.take(3) for _ in range(4)] == [(1, 3), (2, 3), (10, 3), None]


def test_replicas_share_the_tasks_by_how_many_they_are_not_by_how_many_keys_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_key = program("take_key")
    for name in ("node-1", "node-2", "node-3", "node-kitchen"):
        (tmp_path / "secrets" / name).mkdir(parents=True)
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(take_key, "KEYS", tmp_path / "secrets")
    monkeypatch.setattr(take_key, "DATA", tmp_path / "data")
    assert [take_key.take(2) for _ in range(3)] == [(1, 2), (2, 2), None]


def test_who_registers_keys_sees_public_ones_alone(tmp_path: Path, monkeypatch: Any) -> None:
    from quickbloom.server_app.deployment.secrets import create, public_keys

    prepare = program("prepare")
    monkeypatch.setattr(prepare.os, "chown", lambda path, user, group: None)  # only root can
    for name, place in {"ALL": "secrets", "PUBLIC": "public", "PARTS": "parts", "RUNS": "none"}.items():
        monkeypatch.setattr(prepare, name, tmp_path / place)
    create(tmp_path / "secrets", ["node-1", "node-2"], ["superlink"], 30, None)
    (tmp_path / "parts" / "public").mkdir(parents=True)
    monkeypatch.setattr(prepare, "_secrets", lambda *arguments, **_: 0)
    assert prepare.make(2) == 0
    part = tmp_path / "parts" / "public"
    files = {str(file.relative_to(part)): file.read_bytes() for file in part.rglob("*") if file.is_file()}
    assert sorted(files) == ["cli/ca.crt", "nodes/node-1/node.key.pub", "nodes/node-2/node.key.pub"]
    assert not any(b"PRIVATE" in content for content in files.values())
    assert list(public_keys(part)) == ["node-1", "node-2"]  # all that `--register` asks for
    compose = (ROOT / "docker-compose.yml").read_text()
    (service,) = re.findall(r"^  register:\n((?:    .*\n)+)", compose, re.MULTILINE)
    assert "public-keys:/public:ro" in service
    assert "vault" not in service
    # A node that has left is no longer shown.
    import shutil

    shutil.rmtree(tmp_path / "secrets" / "nodes" / "node-2")
    assert prepare.make(1) == 0
    assert list(public_keys(part)) == ["node-1"]


def test_containers_get_copies_of_what_is_theirs_and_lose_what_was_taken_away(tmp_path: Path, monkeypatch: Any) -> None:
    prepare = program("prepare")
    monkeypatch.setattr(prepare.os, "chown", lambda path, user, group: None)  # only root can
    source, target = tmp_path / "nodes", tmp_path / "part"
    (source / "node-1").mkdir(parents=True)
    (source / "node-1" / "node.key").write_text("new")
    (target / "node-2").mkdir(parents=True)
    (target / "node-2" / "node.key").write_text("of a node that left")
    prepare.hand_over(source, target)
    (source / "node-1" / "node.key").write_text("renewed")
    prepare.hand_over(source, target)
    assert sorted(path.relative_to(target).as_posix() for path in target.rglob("*")) == ["node-1", "node-1/node.key"]
    assert (target / "node-1" / "node.key").read_text() == "renewed"
    assert (target / "node-1" / "node.key").stat().st_mode & 0o777 == 0o400


def line(number: int, loss: float | None) -> str:
    record = {"round": number, "train": {"loss": loss, "tasks": 4}, "bytes": {"up": 10, "down": 20}, "seconds": 0.5}
    validation = {"adapt_lr": 0.1, "accuracy": [0.2, 0.6], "loss": [2.0, 1.0], "tasks": 2} if number == 2 else None
    return json.dumps(record | {"failures": [], "nodes": {"answered": 3}, "validation": validation}) + "\n"


@pytest.fixture
def history(tmp_path: Path) -> Path:
    return tmp_path / "history.jsonl"


def test_tensorboard_reads_what_the_rounds_said_while_the_run_goes_on(history: Path, tmp_path: Path) -> None:
    history.write_text(line(1, 2.0) + line(2, 1.5)[:20])
    follower = program("monitor").Follower(history, tmp_path / "events")
    follower.read()
    history.write_text(line(1, 2.0) + line(2, 1.5) + line(3, None))
    follower.read()
    assert curve(tmp_path / "events", "train/loss") == [(1, 2.0), (2, 1.5)]
    assert curve(tmp_path / "events", "round/nodes") == [(1, 3.0), (2, 3.0), (3, 3.0)]
    assert curve(tmp_path / "events", "validation/accuracy_after") == [(2, float(np.float32(0.6)))]


def test_a_round_that_was_done_again_stands_there_once(history: Path, tmp_path: Path) -> None:
    history.write_text(line(1, 2.0) + line(2, 1.5) + line(3, 1.25))
    follower = program("monitor").Follower(history, tmp_path / "events")
    follower.read()
    history.write_text(line(1, 2.0))  # cut to the checkpoint by a resume
    follower.read()
    history.write_text(line(1, 2.0) + line(2, 1.75))
    follower.read()
    assert curve(tmp_path / "events", "train/loss") == [(1, 2.0), (2, 1.75)]


def test_a_run_that_writes_events_itself_is_shown_as_it_is(tmp_path: Path) -> None:
    own = tmp_path / "runs" / "one" / "tensorboard"
    with SummaryWriter(str(own)) as writer:
        writer.add_scalar("train/loss", 0.5, 1)
    (tmp_path / "runs" / "two").mkdir()
    events = tmp_path / "events"
    shows_itself = program("monitor").shows_itself
    assert [shows_itself(tmp_path / "runs" / name, events / name) for name in ("one", "one", "two")] == [True, True, False]
    shown = EventMultiplexer()
    shown.AddRunsFromDirectory(str(events))
    shown.Reload()
    assert list(shown.Runs()) == ["one"]
    assert [event.value for event in shown.Scalars("one", "train/loss")] == [0.5]


def curve(events: Path, name: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(name)]


def test_health_of_a_superlink_is_asked_where_it_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    module = program("healthcheck")
    monkeypatch.setattr(module, "answers", lambda url: url)
    asked = [module.CHECKS["superlink"](*arguments) for arguments in ([], ["localhost:8000"])]
    assert asked == ["https://superlink-control:8000/health", "https://localhost:8000/health"]


def test_a_node_that_waits_lives_and_one_that_has_ended_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    module = program("healthcheck")
    name = f"a-node-of-{os.getpid()}"
    with subprocess.Popen([sys.executable, "-c", "print(flush=True); input()", name], stdin=-1, stdout=-1) as waiting:
        assert waiting.stdout is not None
        waiting.stdout.readline()
        assert module.runs(name)
        waiting.kill()
        waiting.wait()
        assert not module.runs(name)
    monkeypatch.setattr(module, "runs", lambda program: program == "quickbloom-edge")
    assert module.CHECKS["join"]()


def test_backup_and_restore_see_what_they_pack_and_start_with_nothing_else() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    prepare = program("prepare")
    for name, action in (("backup", "pack"), ("restore", "unpack")):
        service = services[name]
        assert service["command"] == ["python", "/opt/quickbloom/prepare.py", action]
        assert callable(getattr(prepare, action))
        assert (service["profiles"], service["network_mode"], service["cap_drop"]) == (["backup"], "none", ["ALL"])
        mounted = dict(volume.split(":") for volume in service["volumes"])
        assert mounted == {"vault": f"{prepare.BACKUP}/vault", "superlink-state": f"{prepare.BACKUP}/state"}
    assert {Path(path).name for path in mounted.values()} == set(archive.PARTS)
    assert f"vault:{prepare.ALL.parent}" in services["secrets"]["volumes"]
    assert "superlink-state:/app/state" in services["superlink"]["volumes"]
