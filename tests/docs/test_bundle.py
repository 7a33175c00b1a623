"""What `flwr build` makes of this app: small, the app alone, and enough to run elsewhere."""

import subprocess
import tomllib
import warnings
from pathlib import Path
from zipfile import ZipFile

import pytest

from quickbloom.server_app.launch.flower_run import LocalSuperLink, Run, bundle, environment, script

ROOT = Path(__file__).resolve().parents[2]
LARGEST = 2_300_000
"""Bytes; Flower takes 10 MB."""


@pytest.fixture(scope="module")
def fab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle, built from the checkout by Flower's own command."""
    folder = tmp_path_factory.mktemp("fab")
    command = [script("flwr"), "build", "--app", str(ROOT)]
    done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "missing" not in done.stdout, done.stdout  # the metadata that Flower recommends
    (built,) = folder.glob("quickbloom.quickbloom.*.fab")
    return built


def test_the_bundle_is_small_and_holds_the_app_alone(fab: Path) -> None:
    assert fab.stat().st_size < LARGEST
    names = [name for name in ZipFile(fab).namelist() if not name.startswith(".info/")]
    assert {name.split("/")[0] for name in names} == {
        "quickbloom",
        "common",
        "server_app",
        "client_app",
        "pyproject.toml",
        "README.md",
    }
    wanted = {
        str(path.relative_to(ROOT))
        for package in ("quickbloom", "common", "server_app", "client_app")
        for path in (ROOT / package).rglob("*.py")
    }
    starting = tuple(f"server_app/{room}/" for room in ("advising", "cli", "comparing", "deployment", "launch", "ray_cluster"))
    assert set(names) - {"README.md", "pyproject.toml"} == {name for name in wanted if not name.startswith(starting)}


def test_the_metadata_are_what_flower_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    app = project["tool"]["flwr"]["app"]
    assert {"name", "version", "description", "license", "dependencies"} <= set(project["project"])
    assert {"publisher", "components", "config", "flwr-version-target"} <= set(app)
    assert set(app["components"]) == {"serverapp", "clientapp"}
    # The release that it is made for is the oldest that it allows.
    (flower,) = (line for line in project["project"]["dependencies"] if line.startswith("flwr"))
    assert flower == f"flwr>={app['flwr-version-target'].removesuffix('.0')},<1.43"


@pytest.mark.slow
@pytest.mark.simulation
def test_the_bundle_runs_in_an_empty_directory(fab: Path, tmp_path: Path) -> None:
    app = tmp_path / "app"
    with ZipFile(fab) as archive:
        archive.extractall(app)
    home = tmp_path / "home"
    home.mkdir()
    with LocalSuperLink() as link:
        run = Run(app, link, {"rounds": 2, "node-deadline": 300.0, "output-dir": str(home / "run")}, 2)
        try:
            log = list(run.lines())
            status, details = run.status()
        finally:
            run.close()
    assert status == "finished:completed", details + "\n".join(log)
    assert (home / "run" / "summary.json").is_file()


def test_what_the_command_line_sends_is_the_same_app() -> None:
    with bundle() as app, warnings.catch_warnings(action="ignore"):  # Flower calls what others deprecate
        from flwr.cli.build import build_fab_from_disk

        assert len(build_fab_from_disk(app)) < LARGEST
        assert sorted(path.name for path in app.iterdir()) == [
            "README.md",
            "client_app",
            "common",
            "pyproject.toml",
            "quickbloom",
            "server_app",
        ]
