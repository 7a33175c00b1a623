"""`quickbloom deploy status`, `backup` and `restore`, with a program in place of Docker."""

import stat
from pathlib import Path

import pytest
from stand_in_docker import Engine, container
from typer.testing import CliRunner

from quickbloom.common.flower.states.later_release import known_changes
from quickbloom.server_app.cli.main import cli


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    engine = Engine(tmp_path)
    engine.use(monkeypatch)
    return engine


def deploy(*words: str) -> tuple[int, str]:
    """Exit code and output; what `main` would say of an exception counts as output."""
    done = CliRunner().invoke(cli, ["deploy", *words])
    return done.exit_code, done.output + str(done.exception or "")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_status_says_what_is_up_in_sentences(engine: Engine) -> None:
    code, said = deploy("status")
    assert code == 0
    assert said.splitlines()[:-1] == [  # the last one is of the certificate: test_renewing.py
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
