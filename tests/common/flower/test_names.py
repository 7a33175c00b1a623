"""Names of Flower that are gone: what needs them says so, and runs in one process go on."""

import importlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, RecordDict
from typer.testing import CliRunner

import quickbloom
from quickbloom.client_app.cli import cli as edge
from quickbloom.client_app.clock_check import check_against_server
from quickbloom.common.errors import QuickbloomError
from quickbloom.common.flower import names, preloaded_app, registry
from quickbloom.common.wire import packing
from quickbloom.server_app.cli.main import cli
from quickbloom.server_app.deployment.registration import register
from quickbloom.server_app.launch.connection import trouble
from quickbloom.server_app.launch.follow import follow
from quickbloom.server_app.launch.prepare import settle

SETTINGS: dict[str, int | float | str] = {"algorithm": "fomaml", "dataset": "gaussian", "rounds": 1, "gaussian.clients": 8}


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Takes "module:name" out of Flower for whoever looks names up."""

    def remove(*places: str) -> None:
        find = importlib.import_module

        class Without:
            def __init__(self, module: str) -> None:
                self._module, self._name = find(module), module

            def __getattr__(self, attribute: str) -> Any:
                if f"{self._name}:{attribute}" in places:
                    raise AttributeError(attribute)
                return getattr(self._module, attribute)

        monkeypatch.setattr(names, "import_module", Without)

    return remove


@pytest.mark.parametrize("name", names.NAMES)
def test_a_name_that_is_gone_is_said_in_one_sentence(name: str, without: Any) -> None:
    without(*names.NAMES[name].places)
    assert names.find(name) is None
    with pytest.raises(QuickbloomError) as missing:
        names.get(name)
    sentence = str(missing.value)
    assert names.NAMES[name].places[0].replace(":", ".") in sentence
    assert names.NAMES[name].needed_for in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("name", names.NAMES)
def test_every_name_is_in_this_flower(name: str) -> None:
    assert names.get(name) is not None


@pytest.mark.parametrize("place", [place for entry in names.NAMES.values() for place in entry.places])
def test_a_run_in_one_process_needs_none_of_them(place: str, without: Any, tmp_path: Path) -> None:
    without(place)
    code, summary = follow(settle({**SETTINGS, "output-dir": str(tmp_path / "run")}, None, None, "in-process"), False)
    assert code == 0
    assert summary is not None
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"] == 1


@pytest.mark.parametrize("name", ["read_superlink_connection", "init_http_client_from_connection"])
def test_a_key_is_not_registered_without_what_that_needs(
    name: str, without: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    (tmp_path / "config.toml").write_text('[superlink.here]\naddress = "127.0.0.1:1"\nroot-certificates = "/ca.crt"\n')
    without(*names.NAMES[name].places)
    with pytest.raises(QuickbloomError, match=r"lacks `flwr\."):
        list(register("here", {}))
    assert trouble("here") == ""  # what Flower said is told instead


def test_messages_are_sent_unpacked_where_flower_cannot_pack(without: Any) -> None:
    records = RecordDict({"a": ConfigRecord({"b": 1})})
    without(*names.NAMES["recorddict_to_proto"].places)
    assert packing.pack(records) is records


def test_the_clock_is_not_asked_for_over_grpc_where_flower_lacks_the_way(without: Any, tmp_path: Path) -> None:
    without(*names.NAMES["FleetStub"].places)
    check_against_server("127.0.0.1:1", tmp_path)  # reads no key, asks nobody


@pytest.mark.parametrize("name", ["VersionDependency", "get_flwr_home"])
def test_a_patch_that_misses_a_name_is_off_and_says_so(
    name: str, without: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without(*names.NAMES[name].places)
    if name == "get_flwr_home":
        client = importlib.import_module("flwr.supernode.runtime.run_clientapp")
        before = client.install_from_fab
        preloaded_app.worker()
        assert client.install_from_fab is before
        return
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    assert registry.apply("look-ups") == []
    assert "`look-ups` is off" in caplog.text
    assert "lacks `flwr.supercore.dependencies.version.VersionDependency`" in caplog.text


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run directory, `run`, and the file that it was trained on, `own.csv`."""
    folder = tmp_path_factory.mktemp("finished")
    rows = [f"{task},{x},{'up' if x > 5 else 'down'}" for task in "abcdef" for x in range(10)]
    (folder / "own.csv").write_text("\n".join(["task,x,y", *rows]) + "\n")
    quickbloom.run("fomaml", data=folder / "own.csv", task="task", target="y", rounds=1, output=folder / "run", progress=False)
    return folder


@pytest.mark.parametrize("gone", names.NAMES)
def test_the_doctor_names_what_is_gone(gone: str, without: Any) -> None:
    without(*names.NAMES[gone].places)
    done = CliRunner().invoke(cli, ["doctor", "--json"])
    assert isinstance(done.exception, SystemExit)
    assert done.exit_code == 1
    assert gone in {finding["name"] for finding in json.loads(done.stdout.splitlines()[-1])["findings"] if finding["mend"]}


@pytest.mark.parametrize("command", [["settings"], ["report", "run"], ["watch", "run", "--once"]])
def test_commands_about_runs_need_none_of_them(
    command: list[str], finished: Path, without: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    without(*(place for name in names.NAMES.values() for place in name.places))
    done = CliRunner().invoke(cli, command)
    assert (done.exception, done.exit_code) == (None, 0), done.output


@pytest.mark.parametrize(
    "gone", [*([name] for name in names.NAMES), list(names.NAMES)], ids=lambda gone: gone[-1] * (len(gone) < 2) or "all"
)
def test_models_are_adapted_and_used_without_them(gone: list[str], finished: Path, without: Any, tmp_path: Path) -> None:
    without(*(place for name in gone for place in names.NAMES[name].places))
    data, model, out = str(finished / "own.csv"), str(tmp_path / "mine"), tmp_path / "predictions.csv"
    for command in (
        ["check-data", data, "--task", "task", "--target", "y"],
        ["adapt", "--checkpoint", str(finished / "run"), "--data", data, "--output", model],
        ["predict", "--model", model, "--input", data, "--output", str(out)],
    ):
        done = CliRunner().invoke(edge, command)
        assert (done.exception, done.exit_code) == (None, 0), done.output
    assert len(out.read_text().splitlines()) == 61
