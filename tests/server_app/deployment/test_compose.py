"""`quickbloom deploy` with a program in place of Docker: it keeps containers in a file, and runs docker/prepare.py itself."""

import json
import os
import sqlite3
import stat
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from quickbloom.common.flower.states.later_release import known_changes
from quickbloom.server_app.cli.main import cli
from quickbloom.server_app.deployment.secrets import create

ROOT = Path(__file__).resolve().parents[3]
DOCKER = f"""#!{sys.executable}
import json, os, runpy, sys
from pathlib import Path
here = Path(__file__).parents[1]
words = [word for word in sys.argv[1:] if not word.startswith("-")]
with (here / "log").open("a") as log:
    print(*words, file=log)
containers = json.loads((here / "containers.json").read_text())
match words:
    case ["compose", "ps"]:
        print(*(str(number) for number in range(len(containers))))
    case ["inspect", *ids]:
        print(json.dumps([containers[int(one)] for one in ids]))
    case ["compose", "stop" | "start" as action, "superlink"]:
        containers[0]["State"]["Status"] = {{"stop": "exited", "start": "running"}}[action]
        (here / "containers.json").write_text(json.dumps(containers))
    case ["compose", "run", "backup" | "restore" as service]:
        program = runpy.run_path({str(ROOT / "docker" / "prepare.py")!r})
        program["main"].__globals__.update(BACKUP=here / "volumes", APP=os.getuid())
        sys.exit(program["main"]({{"backup": "pack", "restore": "unpack"}}[service]))
    case ["compose", "version"]:
        pass
    case _:
        sys.exit(f"not known: {{words}}")
"""


def container(service: str, state: str = "running", health: str = "", code: int = 0) -> dict[str, Any]:
    """What Docker says of one."""
    found: dict[str, Any] = {"Status": state, "ExitCode": code, "StartedAt": "2026-01-02T03:04:05.678Z"}
    if health:
        found["Health"] = {"Status": health}
    return {"Config": {"Labels": {"com.docker.compose.service": service}}, "State": found}


UP = [
    container("superlink", health="healthy"),
    container("superexec", health="healthy"),
    container("register", "exited"),
    container("supernode-1", health="healthy"),
]


class Engine:
    """The stand-in for Docker, in `folder`, with its volumes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.volumes = folder, folder / "volumes"
        (folder / "bin").mkdir()
        (folder / "bin" / "docker").write_text(DOCKER)
        (folder / "bin" / "docker").chmod(0o755)
        (folder / "docker-compose.yml").touch()
        self.has(UP)

    def has(self, containers: list[dict[str, Any]]) -> None:
        (self.folder / "containers.json").write_text(json.dumps(containers))

    def done(self) -> list[str]:
        """What it was asked for, besides questions."""
        lines = (self.folder / "log").read_text().splitlines()
        return [line for line in lines if not line.startswith(("inspect", "compose ps", "compose version"))]

    def serve(self, change: str) -> None:
        """Have a server in the volumes, with a database whose tables were changed last by that."""
        create(self.volumes / "vault" / "secrets", ["node-1"], [], 1)
        (self.volumes / "state").mkdir()
        with closing(sqlite3.connect(self.volumes / "state" / "superlink.db")) as connection, connection:
            connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
            connection.execute("INSERT INTO alembic_version VALUES (?)", (change,))


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    return Engine(tmp_path)


def deploy(*words: str) -> tuple[int, str]:
    """Exit code and output; what `main` would say of an exception counts as output."""
    done = CliRunner().invoke(cli, ["deploy", *words])
    return done.exit_code, done.output + str(done.exception or "")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_status_says_what_is_up_in_sentences(engine: Engine) -> None:
    code, said = deploy("status")
    assert code == 0
    assert said.splitlines() == [
        "register has ended, as it should where it has something to do once.",
        "superexec is up and healthy, since 2026-01-02T03:04:05 UTC.",
        "superlink is up and healthy, since 2026-01-02T03:04:05 UTC.",
        "supernode-1 is up and healthy, since 2026-01-02T03:04:05 UTC.",
        "Runs can be started; 1 node of this host is up.",
    ]


def test_status_says_what_is_not_up(engine: Engine) -> None:
    engine.has([container("superlink", health="starting"), container("superexec", "restarting", code=2)])
    said = deploy("status")[1].splitlines()
    assert said[0] == "superexec is restarting, with exit code 2: `docker compose logs superexec` says why."
    assert said[1] == "superlink is starting."
    assert said[2].startswith("No run can be started: superlink and superexec must be up; `docker compose up -d`")
    engine.has([])
    assert deploy("status")[1].startswith("No run can be started")


def test_a_backup_is_put_back_into_empty_volumes(engine: Engine) -> None:
    engine.serve(min(known_changes()))
    before = files(engine.volumes)
    code, said = deploy("backup", "monday.tgz")
    assert (code, "keep it as you keep the keys" in said) == (0, True), said
    assert stat.S_IMODE(Path("monday.tgz").stat().st_mode) == 0o600
    assert engine.done() == ["compose stop superlink", "compose run backup", "compose start superlink"]
    engine.volumes.rename("gone")
    engine.has([])
    code, said = deploy("restore", "monday.tgz")
    assert code == 0, said
    assert files(engine.volumes) == before
    assert "Next: docker compose up -d" in said


def test_a_superlink_that_was_down_stays_down(engine: Engine) -> None:
    engine.serve(min(known_changes()))
    engine.has([container("superlink", "exited")])
    assert deploy("backup", "monday.tgz")[0] == 0
    assert engine.done() == ["compose run backup"]


def test_a_backup_that_fails_leaves_no_file_and_the_superlink_up(engine: Engine) -> None:
    code, said = deploy("backup", "monday.tgz")
    assert code == 1
    assert "nothing to back up" in said
    assert engine.done()[-1] == "compose start superlink"
    assert not list(Path().glob("*monday*"))


def test_no_file_is_written_over(engine: Engine) -> None:
    Path("monday.tgz").write_text("last week's")
    code, said = deploy("backup", "monday.tgz")
    assert (code, "must be a file that does not exist yet" in said) == (1, True)
    assert Path("monday.tgz").read_text() == "last week's"


def test_nothing_is_put_back_where_a_server_is_or_where_it_is_later(engine: Engine) -> None:
    engine.serve("ffffffffffff")
    assert deploy("backup", "monday.tgz")[0] == 0
    assert "the federation is up" in deploy("restore", "monday.tgz")[1]
    engine.has([])
    code, said = deploy("restore", "monday.tgz")
    assert (code, "there is a server already" in said) == (1, True), said
    engine.volumes.rename("gone")
    code, said = deploy("restore", "monday.tgz")
    assert (code, "changed by a later release of Flower" in said) == (1, True), said
    assert not files(engine.volumes)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["status", "monday.tgz"], "unexpected extra argument"),
        (["backup"], "Missing argument 'ARCHIVE'"),
        (["status", "--folder", "bin"], "`--folder` must be a directory with docker-compose.yml, got 'bin'"),
        (["restore", "docker-compose.yml"], "is damaged, or none"),
        (["restore", "none.tgz"], "No such file or directory"),
    ],
)
def test_wrong_input_is_said(engine: Engine, words: list[str], reason: str) -> None:
    code, said = deploy(*words)
    assert code != 0
    assert reason in said


def test_without_compose_it_says_so(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(engine.folder / "empty"))
    assert "needs Compose, and there is none here" in deploy("status")[1]
