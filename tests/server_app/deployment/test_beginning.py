"""`quickbloom deploy init`: what it places is what the repository has, and other programs find nothing wrong with it."""

import os
import re
import shlex
import stat
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from programs import program
from typer.testing import CliRunner

from benchmarks.compose import compose_command
from quickbloom import __version__
from quickbloom.client_app.cli import cli as edge
from quickbloom.server_app.cli.main import cli
from quickbloom.server_app.deployment.beginning import PLACED
from quickbloom.server_app.deployment.certificates import check_certificate, hosts_of, load_certificate

ROOT = Path(__file__).resolve().parents[3]
SERVICES = {"quickbloom-superlink": "server", "quickbloom-superexec": "server", "quickbloom-node": "node"}


def init(*words: str | Path) -> tuple[int, str]:
    """Exit code and output; what `main` would say of an exception counts as output."""
    done = CliRunner().invoke(cli, ["deploy", "init", *map(str, words)])
    return done.exit_code, done.output + str(done.exception or "")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def unit(folder: Path, service: str) -> dict[str, str]:
    """The settings of a unit, by name."""
    lines = (folder / SERVICES[service] / f"{service}.service").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


@pytest.fixture
def units(tmp_path: Path) -> Path:
    code, said = init(tmp_path / "fl", "--systemd", "--host", "fl.example.org", "--nodes", "2")
    assert code == 0, said
    return tmp_path / "fl"


def test_containers_get_the_files_of_the_repository_and_the_settings_that_were_asked_for(tmp_path: Path) -> None:
    code, said = init(tmp_path / "fl", "--host", "fl.example.org", "--host", "203.0.113.5")
    assert code == 0, said
    placed = files(tmp_path / "fl")
    settings = placed.pop(".env").decode()
    assert settings == (
        f"QUICKBLOOM_VERSION={__version__}\nQUICKBLOOM_HOSTS=fl.example.org 203.0.113.5\nQUICKBLOOM_FLEET=0.0.0.0:9092\n"
    )
    assert {name: (ROOT / name).read_bytes() for name in placed} == placed
    assert {"docker-compose.yml", "docker/metrics.yml", "docker/metrics/alerts.yml", "docker/scale.yml"} <= set(placed)
    assert "docker compose up -d superlink superexec" in said


def test_compose_reads_the_settings_that_are_placed(tmp_path: Path) -> None:
    if not compose_command():
        pytest.skip("needs Compose: install docker-compose")
    assert init(tmp_path / "fl", "--host", "fl.example.org")[0] == 0
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("QUICKBLOOM_", "COMPOSE_"))}
    for overlays in ([], ["docker/metrics.yml"], ["docker/scale.yml", "docker/monitor.yml"]):
        named = [part for file in ("docker-compose.yml", *overlays) for part in ("-f", file)]
        command = [*compose_command(), *named, "config"]
        done = subprocess.run(command, cwd=tmp_path / "fl", env=bare, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        services = yaml.safe_load(done.stdout)["services"]
        assert services["secrets"]["environment"]["QUICKBLOOM_HOSTS"] == "fl.example.org"
        assert services["superlink"]["image"] == f"quickbloom:{__version__}"
        assert "0.0.0.0" in str(services["superlink"]["ports"])


def test_an_installed_package_and_the_image_have_the_files(tmp_path: Path) -> None:
    included = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {name: included["force-include"][name] for name in PLACED} == {
        name: f"quickbloom/server_app/deployment/files/{name}" for name in PLACED
    }
    copied = " ".join(re.findall(r"^COPY (?!--)(.*) \S+$", (ROOT / "docker" / "Dockerfile").read_text(), re.MULTILINE)).split()
    assert {name.rstrip("/") for name in copied} >= set(PLACED)
    assert "!docker-compose.yml" in (ROOT / ".dockerignore").read_text().splitlines()


def test_secrets_for_units_are_those_of_quickbloom_secrets(units: Path) -> None:
    folder = units / "secrets" / "superlink"
    assert check_certificate(folder / "server.crt", folder / "ca.crt", folder / "server.key") == ""
    assert hosts_of(load_certificate(folder / "server.crt")) == ["fl.example.org", "localhost", "127.0.0.1"]
    assert stat.S_IMODE((units / "secrets").stat().st_mode) == 0o700
    assert sorted(path.name for path in (units / "secrets" / "nodes").iterdir()) == ["node-1", "node-2"]
    (connection,) = tomllib.loads((units / "flower" / "config.toml").read_text())["superlink"].values()
    assert Path(connection["root-certificates"]).read_bytes() == (folder / "ca.crt").read_bytes()


def test_systemd_finds_nothing_wrong_with_the_units(units: Path, tmp_path: Path) -> None:
    stand_in = tmp_path / "bin"
    stand_in.mkdir()
    for name in ("quickbloom", "quickbloom-edge"):
        (stand_in / name).write_text("#!/bin/sh\n")
        (stand_in / name).chmod(0o755)
    found = []
    for service, part in SERVICES.items():
        path = tmp_path / f"{service}.service"
        path.write_text((units / part / path.name).read_text().replace("/opt/quickbloom/bin", str(stand_in)))
        found.append(path)
    assert program("systemd-analyze", "verify", "--man=no", *found) == ""
    for path in found:
        # The scale of systemd: 0 is safe, 10 is a service that may do anything. A unit without hardening has 9.2 or more.
        said = program("systemd-analyze", "security", "--offline=true", "--threshold=25", path)
        assert "Overall exposure level" in said


@pytest.mark.parametrize("service", SERVICES)
def test_a_unit_is_hardened_and_comes_back(units: Path, service: str) -> None:
    settings = unit(units, service)
    wanted = {"NoNewPrivileges": "yes", "ProtectSystem": "strict", "ProtectHome": "yes", "PrivateTmp": "yes"}
    wanted |= {"CapabilityBoundingSet": "", "Restart": "always", "RestartPreventExitStatus": "2", "User": service}
    assert {name: settings[name] for name in wanted} == wanted
    assert settings["StateDirectory"].split()[0] == service
    assert settings["MemoryMax"]
    users = (units / SERVICES[service] / f"quickbloom-{SERVICES[service]}.conf").read_text()
    assert f"u {service} - " in users


def test_the_commands_of_the_units_are_understood(units: Path) -> None:
    env = dict(line.split("=", 1) for line in (units / "node" / "node.env").read_text().splitlines() if line[0] != "#")
    assert env == {"SERVER": "fl.example.org:9092", "OPTIONS": ""}
    for service in SERVICES:
        text = unit(units, service)["ExecStart"].replace("%S", "/var/lib").replace("${SERVER}", env["SERVER"])
        name, *words = shlex.split(text.replace("$OPTIONS", "--data ward.csv --task ward --target outcome"))
        command: Any = typer.main.get_command(edge if name.endswith("-edge") else cli).commands[words[0]]  # type: ignore[attr-defined]
        options = command.make_context(words[0], words[1:]).params
        assert str(options["secrets"]) == f"/etc/quickbloom/{service.removeprefix('quickbloom-')}"


def test_who_computes_cannot_read_the_servers_key(units: Path) -> None:
    said = init(units.parent / "other", "--systemd")[1]
    given = dict(re.findall(r"install -o (\S+) -m 400 (\S+)/\* ", said))
    superlink, superexec = (
        {path.name for path in Path(given[f"quickbloom-{name}"]).iterdir()} for name in ("superlink", "superexec")
    )
    assert superlink == {"ca.crt", "server.crt", "server.key", "superexec.secret"}
    assert superexec == {"ca.crt", "superexec.secret"}


@pytest.mark.parametrize("how", [[], ["--systemd"]])
def test_nothing_is_written_over(tmp_path: Path, how: list[str]) -> None:
    (tmp_path / "fl").mkdir()
    (tmp_path / "fl" / "notes").write_text("mine")
    code, said = init(tmp_path / "fl", *how)
    assert code != 0
    assert "FOLDER must be a new or empty directory, and there is something in" in said
    assert files(tmp_path / "fl") == {"notes": b"mine"}


@pytest.mark.parametrize(
    ("words", "reason"),
    [(["--host", "fl.example.org:9092"], "`--host` must be a DNS name"), (["--nodes", "2"], "`--nodes` is for `--systemd`")],
)
def test_wrong_input_is_said_before_anything_is_written(tmp_path: Path, words: list[str], reason: str) -> None:
    code, said = init(tmp_path / "fl", *words)
    assert code != 0
    assert reason in said
    assert not (tmp_path / "fl").exists()
