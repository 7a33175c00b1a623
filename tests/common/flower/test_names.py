"""Names of Flower that are gone: what needs them says so, and runs in one process go on."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, RecordDict

from quickbloom.client_app.clock_check import check_against_server
from quickbloom.common.errors import QuickbloomError
from quickbloom.common.flower import names
from quickbloom.common.wire import packing
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
    code, summary = follow(settle({**SETTINGS, "output-dir": str(tmp_path / "run")}, None, None, True), False)
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
