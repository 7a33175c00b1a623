"""What `quickbloom doctor` finds."""

import json
import platform
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quickbloom.common.flower import accepted, names, registry
from quickbloom.common.maths.kernels import prebuilt
from quickbloom.common.maths.kernels.compiler import find_compiler
from quickbloom.server_app.cli.main import cli


def examined() -> tuple[int, dict[tuple[str, str], dict[str, str]]]:
    """The exit code, and every finding by part and name."""
    done = CliRunner().invoke(cli, ["doctor", "--json"])
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["well"] == (done.exit_code == 0)
    return done.exit_code, {(finding["part"], finding["name"]): finding for finding in found["findings"]}


def test_nothing_is_wrong_here_and_every_patch_is_listed() -> None:
    code, found = examined()
    assert code == 0
    assert {name for part, name in found if part == "patch"} == set(registry.BY_NAME)
    assert found["Flower", "release"]["state"] == registry.version()


def test_a_patch_that_does_not_know_this_flower_is_wrong_and_one_that_was_turned_off_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(accepted.ACCEPTED, "flwr.supercore.inflatable.inflatable_utils:pull_objects", {})
    code, found = examined()
    assert code == 1
    assert found["patch", "pull-soon"]["state"] == "off"
    assert "costs up to 1 s of every message" in found["patch", "pull-soon"]["mend"]
    monkeypatch.setenv(registry.SWITCH, "0")
    assert examined()[0] == 0


def test_a_name_that_is_gone_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(names.NAMES, "FleetStub", names.Name(("flwr.nowhere:FleetStub",), "the clock"))
    code, found = examined()
    assert code == 1
    assert found["name", "FleetStub"]["detail"] == "`flwr.nowhere:FleetStub`, needed for the clock"


def test_it_says_which_kernels_are_used_and_what_is_lacking_where_there_are_none(
    prebuilt_kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("QUICKBLOOM_KERNELS", raising=False)
    monkeypatch.setattr(prebuilt, "installed", lambda: prebuilt_kernels)
    _, found = examined()
    assert found["kernels", "library"]["state"] == "prebuilt"
    assert found["kernels", "library"]["detail"] in prebuilt.LEVELS[platform.machine()]
    monkeypatch.setattr(prebuilt, "installed", lambda: None)
    if compiler := find_compiler():
        _, found = examined()
        assert found["kernels", "library"]["state"] == "compiled"
        assert found["kernels", "library"]["detail"].startswith(f"by {compiler}: quickbloom-kernels is not installed")
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    code, found = examined()
    assert code == 1
    assert found["kernels", "library"]["state"] == "none"
    assert "there is no C++ compiler here" in found["kernels", "library"]["mend"]
    monkeypatch.setenv("QUICKBLOOM_KERNELS", "0")
    code, found = examined()
    assert code == 0
    assert found["kernels", "library"]["state"] == "off"
