"""`quickbloom deploy upgrade` with a program in place of Docker: the order, what is waited for, and where it stops."""

from pathlib import Path

import pytest
from stand_in_docker import Engine, container
from typer.testing import CliRunner

from quickbloom.common.flower.states.later_release import known_changes
from quickbloom.server_app.cli.main import cli
from quickbloom.server_app.deployment import archive
from quickbloom.server_app.deployment.compose import ComposeError
from quickbloom.server_app.deployment.upgrading import carry_out, plan

SERVICES = ("superlink", "superexec", "supernode-2", "supernode-1", "supernode-10", "metrics")
OLD, NEW = "quickbloom:0.2.0", "quickbloom:0.3.0"


def node(at: str = "5") -> dict[str, str]:
    """A node as the SuperLink has it, connected since `at`."""
    return {"id": at, "status": "online", "activated": at, "until": "60"}


NODES = {"supernode-1": node("1"), "supernode-2": node("2"), "supernode-10": node("10")}


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    engine = Engine(tmp_path)
    engine.use(monkeypatch)
    engine.serve(min(known_changes()))
    engine.has([*(container(name, health="healthy") for name in SERVICES), container("register", "exited")])
    engine.world(images=[NEW], nodes=NODES)
    Path(".env").write_text("QUICKBLOOM_HOSTS=fl.example.org\nQUICKBLOOM_VERSION=0.2.0\n")
    return engine


def upgrade(*words: str) -> tuple[int, str]:
    """Exit code and output; what `main` would say of an exception counts as output."""
    done = CliRunner().invoke(cli, ["deploy", "upgrade", *words])
    return done.exit_code, done.output + str(done.exception or "")


def test_the_server_goes_first_then_one_node_at_a_time_and_a_backup_before_all(engine: Engine) -> None:
    code, said = upgrade("0.3.0", "--backup", "before.tgz")
    assert code == 0, said
    assert engine.done() == [
        "compose stop superlink",
        "compose run backup",
        "compose start superlink",
        "compose up superlink superexec",
        "compose up supernode-1",
        "compose up supernode-2",
        "compose up supernode-10",
        "compose up metrics",
    ]
    assert engine.images() == {**dict.fromkeys(SERVICES, NEW), "register": OLD}
    assert archive.check(Path("before.tgz"))["flower"]
    assert Path(".env").read_text() == "QUICKBLOOM_HOSTS=fl.example.org\nQUICKBLOOM_VERSION=0.3.0\n"
    assert "superlink and superexec: 0.3.0, and 3 nodes are connected." in said


def test_a_dry_run_prints_the_plan_and_changes_nothing(engine: Engine) -> None:
    code, said = upgrade("0.3.0", "--dry-run", "--backup", "before.tgz")
    assert code == 0, said
    assert [line.strip() for line in said.splitlines()[1:]] == [
        "1. back up keys and database into before.tgz",
        "2. superlink and superexec, together; nodes wait",
        "3. supernode-1, until it is connected again",
        "4. supernode-2, until it is connected again",
        "5. supernode-10, until it is connected again",
        "6. metrics",
        "7. write QUICKBLOOM_VERSION=0.3.0 into .env",
    ]
    assert engine.done() == []
    assert not Path("before.tgz").exists()
    assert set(engine.images().values()) == {OLD}


def test_it_stops_at_a_node_that_does_not_come_and_says_how_to_go_back(engine: Engine) -> None:
    engine.world(images=[NEW], nodes=NODES, lost=["supernode-2"])
    said: list[str] = []
    steps = plan(Path(), "0.3.0", None)
    with pytest.raises(ComposeError, match=r"^supernode-2 is not connected again after 0 s") as error:
        said.extend(carry_out(Path(), steps, patience=0.2, pause=0.05))
    back = "`docker compose up -d --no-deps superlink superexec supernode-1 supernode-2` goes back to 0.2.0"
    assert back in str(error.value)
    images = engine.images()
    assert [images[name] for name in ("superlink", "supernode-1", "supernode-2", "supernode-10")] == [NEW, NEW, NEW, OLD]
    assert "QUICKBLOOM_VERSION=0.2.0" in Path(".env").read_text()
    assert len(list(Path().glob("before-0.3.0-*.tgz"))) == 1


def test_no_node_is_touched_where_the_server_does_not_come_up(engine: Engine) -> None:
    engine.world(images=[NEW], nodes=NODES, broken=["superexec"])
    with pytest.raises(ComposeError, match=r"^superlink and superexec are not healthy"):
        list(carry_out(Path(), plan(Path(), "0.3.0", None), patience=0.2, pause=0.05))
    assert engine.images()["supernode-1"] == OLD


def test_a_node_that_the_new_superlink_only_believes_to_be_online_is_waited_for(engine: Engine) -> None:
    engine.world(images=[NEW], nodes=NODES, silent=["supernode-2"])
    with pytest.raises(ComposeError, match=r"^not all nodes are connected again"):
        list(carry_out(Path(), plan(Path(), "0.3.0", None), patience=0.2, pause=0.05))
    assert engine.images()["supernode-1"] == OLD


def test_an_image_that_cannot_open_the_database_is_refused(engine: Engine) -> None:
    (engine.volumes / "state" / "superlink.db").unlink()
    (engine.volumes / "state").rmdir()
    (engine.volumes / "vault").rename(engine.folder / "gone")
    engine.serve("ffffffffffff")
    code, said = upgrade("0.3.0")
    assert code != 0
    assert "VERSION 0.3.0 is refused, the image says:" in said
    assert "was changed by a later release of Flower" in said
    assert engine.done() == []


@pytest.mark.parametrize(
    ("world", "reason"),
    [
        ({"images": []}, "there is no quickbloom:0.3.0: build it"),
        ({"flower": "1.42.0"}, "speak different protocols, so they cannot be upgraded in turn"),
        ({"runs": None}, "the SuperLink does not say which runs go on"),
        ({"runs": [{"run-id": "77", "status": "running"}]}, "the run 77 would end, because its server is upgraded as well"),
    ],
)
def test_what_should_not_be_upgraded_is_left(engine: Engine, world: dict[str, object], reason: str) -> None:
    engine.world(**{"images": [NEW], "nodes": NODES, **world})
    code, said = upgrade("0.3.0")
    assert code != 0
    assert reason in said
    assert engine.done() == []


def test_runs_that_have_ended_or_are_to_be_resumed_are_no_reason(engine: Engine) -> None:
    runs = [{"run-id": "76", "status": "finished:failed"}]
    engine.world(images=[NEW], nodes=NODES, runs=runs)
    assert upgrade("0.3.0", "--dry-run")[0] == 0
    engine.world(images=[NEW], nodes=NODES, runs=[*runs, {"run-id": "77", "status": "running"}])
    assert upgrade("0.3.0", "--dry-run", "--anyway")[0] == 0


def test_a_server_that_is_down_or_a_version_of_the_shell_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.has([container("superlink", health="healthy"), container("superexec", "exited")])
    assert "superexec must be up to be upgraded in turn" in upgrade("0.3.0")[1]
    monkeypatch.setenv("QUICKBLOOM_VERSION", "0.2.0")
    assert "`QUICKBLOOM_VERSION` is set in this shell" in upgrade("0.3.0")[1]
