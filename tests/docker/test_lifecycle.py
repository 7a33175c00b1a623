"""A deployment that `quickbloom deploy init` began, in a real Docker engine: upgraded to the same image under another name."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from containers import built_image
from real_processes import quickbloom

from benchmarks.compose import IMAGE, NODES, PATH, compose_command, docker
from quickbloom.server_app.launch.flower_run import free_port

pytestmark = pytest.mark.docker

NEXT = f"{IMAGE}-next"


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("lifecycle")
    built_image(home)
    with pytest.MonkeyPatch.context() as patched:
        for name, value in {
            "PATH": PATH,
            "COMPOSE_PROJECT_NAME": "quickbloom-lifecycle",
            "QUICKBLOOM_FLEET": f"127.0.0.1:{free_port()}",
        }.items():
            patched.setenv(name, value)
        assert docker("tag", IMAGE, NEXT).returncode == 0
        done = quickbloom("deploy", "init", "fl", cwd=home)
        assert done.returncode == 0, done.stderr
        try:
            assert compose(home / "fl", "up", "-d") == ""
            yield home / "fl"
        finally:
            compose(home / "fl", "down", "--volumes", "--remove-orphans")
            docker("rmi", NEXT)


def compose(folder: Path, *words: str) -> str:
    """What Compose says when it fails; "" if it does not."""
    done = subprocess.run([*compose_command(), *words], cwd=folder, env=os.environ, capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else ""


def test_every_container_is_of_the_new_image_and_every_node_connected(begun: Path) -> None:
    done = quickbloom("deploy", "upgrade", NEXT.partition(":")[2], "--folder", str(begun), cwd=begun.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()[-4:-1]] == list(NODES)
    for service in ("superlink", "superexec", *NODES):
        name = f"label=com.docker.compose.service={service}"
        found = docker(
            "ps",
            "--filter",
            "label=com.docker.compose.project=quickbloom-lifecycle",
            "--filter",
            name,
            "--format",
            "{{.Image}}",
        )
        assert found.stdout.split() == [NEXT]
    assert f"QUICKBLOOM_VERSION={NEXT.partition(':')[2]}" in (begun / ".env").read_text()
