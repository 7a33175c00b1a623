"""A run behind a frozen encoder, and one of an adapter in a transformer, are the same on any number of nodes."""

from pathlib import Path

import pytest
import small_encoders
from loopback import LoopbackGrid
from real_processes import curve, numbers

from quickbloom.common.config.run import parse_run_config
from quickbloom.common.encoders import load_encoder
from quickbloom.server_app.app import run_federation


@pytest.mark.parametrize("way", small_encoders.WAYS)
def test_one_two_and_twenty_nodes_learn_the_same(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load_encoder.cache_clear()
    settings = small_encoders.WAYS[way](tmp_path, "ABCDEFGHIJKLMNOPQRSTUVWX")
    found = []
    for nodes in (1, 2, 20):
        config = parse_run_config({**settings, "min-nodes": nodes, "output-dir": str(tmp_path / str(nodes))})
        summary = run_federation(LoopbackGrid(nodes, config.flat()), config)
        assert summary["failures"] == 0
        found.append(numbers([curve(tmp_path / str(nodes)), summary["test"]]))
    assert len(found[0]) > 10
    for other in found[1:]:
        assert found[0] == pytest.approx(other, abs=1e-5)
