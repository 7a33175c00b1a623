"""What is handed to Flower, and that nothing is left running."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from quickbloom.common.system.processes import end_all_with, end_group, living
from quickbloom.server_app.launch.connection import connection_exists
from quickbloom.server_app.launch.flower_run import LocalSuperLink, bundle, environment, nest


def test_the_bundle_holds_the_app_and_nothing_else() -> None:
    with bundle() as app:
        assert {path.name for path in app.iterdir()} == {
            "quickbloom",
            "common",
            "server_app",
            "client_app",
            "pyproject.toml",
            "README.md",
        }
        assert (app / "common" / "algorithms" / "maml.py").is_file()
        assert not list(app.rglob("__pycache__"))
    assert not app.exists()


def test_the_directory_of_a_users_model_is_not_on_the_path_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/theirs")
    assert environment(modules=Path("/mine"))["PYTHONPATH"] == "/theirs"
    assert environment(modules=Path("/mine"))["QUICKBLOOM_MODULES"] == "/mine"
    monkeypatch.delenv("PYTHONPATH")
    assert "PYTHONPATH" not in environment(modules=Path("/mine"))
    assert "QUICKBLOOM_MODULES" not in environment()


def test_settings_are_nested_as_toml_wants_them() -> None:
    assert nest({"rounds": 3, "maml.inner-lr": 0.1, "maml.inner-steps": 2}) == {
        "rounds": 3,
        "maml": {"inner-lr": 0.1, "inner-steps": 2},
    }


@pytest.mark.parametrize(
    ("content", "known"), [('[superlink.site]\naddress = "x"\n', True), ("[superlink.other]\n", False), ("broken [", False)]
)
def test_a_connection_is_looked_up_in_flowers_configuration(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str, known: bool
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    (tmp_path / "config.toml").write_text(content)
    assert connection_exists("site") is known


def test_ending_a_group_ends_its_children() -> None:
    process = subprocess.Popen(
        ["sh", "-c", "sleep 300 & echo $!; wait"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    child = Path("/proc") / process.stdout.readline().strip()
    end_group(process)
    assert process.returncode is not None
    deadline = time.monotonic() + 10
    while child.exists() and " Z " not in (child / "stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.simulation
def test_the_private_superlink_ends_with_its_context() -> None:
    with LocalSuperLink() as link:
        assert link._process.poll() is None
        assert (link.home / "config.toml").is_file()
        environ = Path(f"/proc/{link._process.pid}/environ").read_bytes().decode().split(chr(0))
        (ray,) = (Path(entry.partition("=")[2]) for entry in environ if entry.startswith("RAY_TMPDIR="))
        assert ray.is_dir()
    assert link._process.returncode is not None
    assert not link.home.exists()
    assert not ray.exists()


def test_ending_all_with_a_variable_ends_what_lost_it_in_their_sessions(tmp_path: Path) -> None:
    # Ray's agents write their titles over their environment, so a child of a marked process may not show the mark.
    process = subprocess.Popen(
        ["sh", "-c", "env -i sleep 300 & echo $!; wait"],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "QUICKBLOOM_TEST_MARK": str(tmp_path)},
    )
    # A marked process in a session that somebody else began: it is ended, and its neighbours are not.
    somebody = subprocess.Popen(
        ["sh", "-c", f"QUICKBLOOM_TEST_MARK={tmp_path} sleep 300 & sleep 300 & echo $!; wait"],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert somebody.stdout is not None
        neighbour = int(somebody.stdout.readline())
        assert {child, process.pid} <= set(living())
        end_all_with(f"QUICKBLOOM_TEST_MARK={tmp_path}")
        assert not {child, process.pid} & set(living())
        assert {somebody.pid, neighbour} <= set(living())
    finally:
        end_group(somebody)
        end_group(process)
