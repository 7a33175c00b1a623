"""A deployment that `quickbloom deploy init` began, in a real Docker engine: upgraded to the same image under another name."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from containers import built_image
from real_processes import quickbloom

from benchmarks.compose import IMAGE, NODES, PATH, compose_command, docker, until
from quickbloom.server_app.launch.flower_run import free_port

pytestmark = pytest.mark.docker

PROJECT = "quickbloom-lifecycle"
NEXT = f"{IMAGE}-next"


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("lifecycle")
    built_image(home)
    with pytest.MonkeyPatch.context() as patched:
        for name, value in {
            "PATH": PATH,
            "COMPOSE_PROJECT_NAME": PROJECT,
            "QUICKBLOOM_FLEET": f"127.0.0.1:{free_port()}",
        }.items():
            patched.setenv(name, value)
        assert docker("tag", IMAGE, NEXT).returncode == 0
        done = quickbloom("deploy", "init", "fl", cwd=home)
        assert done.returncode == 0, done.stderr
        try:
            assert compose(home / "fl", "up", "-d") == ""
            until(lambda: "3 nodes of this host are up." in status(home / "fl"), 300)
            yield home / "fl"
        finally:
            compose(home / "fl", "down", "--volumes", "--remove-orphans")
            docker("rmi", NEXT)


def compose(folder: Path, *words: str) -> str:
    """What Compose says when it fails; "" if it does not."""
    done = subprocess.run([*compose_command(), *words], cwd=folder, env=os.environ, capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else ""


def status(folder: Path) -> str:
    return quickbloom("deploy", "status", "--folder", str(folder), cwd=folder.parent).stdout


def test_a_new_certificate_is_shown_without_a_restart(begun: Path) -> None:
    name = "label=com.docker.compose.service=superlink"
    before = docker(
        "ps", "--filter", f"label=com.docker.compose.project={PROJECT}", "--filter", name, "--format", "{{.ID}}"
    ).stdout
    started = docker("inspect", "--format", "{{.State.StartedAt}}", before.strip()).stdout
    assert "certificate is valid until" in status(begun)
    done = quickbloom("deploy", "renew", "--folder", str(begun), cwd=begun.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The SuperLink shows it, without a restart" in done.stdout
    assert docker("inspect", "--format", "{{.State.StartedAt}}", before.strip()).stdout == started
    assert "3 nodes of this host are up." in status(begun)


def test_every_container_is_of_the_new_image_and_every_node_connected(begun: Path) -> None:
    done = quickbloom("deploy", "upgrade", NEXT.partition(":")[2], "--folder", str(begun), cwd=begun.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()[-4:-1]] == list(NODES)
    for service in ("superlink", "superexec", *NODES):
        name = f"label=com.docker.compose.service={service}"
        found = docker(
            "ps",
            "--filter",
            f"label=com.docker.compose.project={PROJECT}",
            "--filter",
            name,
            "--format",
            "{{.Image}}",
        )
        assert found.stdout.split() == [NEXT]
    assert f"QUICKBLOOM_VERSION={NEXT.partition(':')[2]}" in (begun / ".env").read_text()
