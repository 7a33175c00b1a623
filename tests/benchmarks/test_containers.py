"""What the benchmark of containers makes of its figures, and what it compares with. The engine itself is a stub."""

import json
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import containers
from benchmarks.compose import NODES, ROOT, Federation
from benchmarks.deployment import FLOWER, OURS, table


def figures(round_: float) -> dict[str, float]:
    return {"first": 2 * round_, "round": round_, "cpu": 0.5, "idle_megabytes": 200.0, "others": 0.1}


def test_ratios_are_taken_within_repetitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "commit", lambda: "0123abcd")
    # 10, 4 and 8 times; of the medians, 12 and 1.5, it would be 8 as well, of the means 20 / 2.2.
    runs = {FLOWER: [figures(10.0), figures(12.0), figures(40.0)], OURS: [figures(1.0), figures(3.0), figures(5.0)]}
    result = containers.assemble("it is fast", 4, runs)
    assert result["ratios"] == [10.0, 4.0, 8.0]
    assert [(goal["measured"], goal["met"]) for goal in result["goals"]] == [(3.0, False), (8.0, True)]
    assert "| quickbloom | 3.00 (1.00-5.00) | 6.00 | 0.50 | 200 |" in table(result)


def test_the_other_side_differs_in_the_commands_alone() -> None:
    ours, flower = (yaml.safe_load(file.read_text())["services"] for file in (ROOT / "docker-compose.yml", overlay()))
    assert set(flower) == {"superlink", "superexec", *NODES} <= set(ours)
    assert all(set(service) == {"command"} for service in flower.values())
    for name, service in flower.items():
        assert service["command"][0] == f"flower-{name.split('-')[0]}"
        for word in ours[name]["command"]:
            if word.startswith(("partition-id", "num-partitions")):
                assert word in service["command"][-1].partition("=")[2].split()


def overlay() -> Path:
    (file,) = containers.OVERLAYS[FLOWER]
    return file


class Run:
    """Stands in for a command in its container."""

    def __init__(self, code: int, out: str = "", said: str = "") -> None:
        self.returncode, self._said = code, (out, said)

    def communicate(self, timeout: float) -> tuple[str, str]:
        return self._said


def stub(runs: Path, run: Run) -> Any:
    started: list[tuple[str, ...]] = []

    def start(*arguments: str, mounts: Any = ()) -> Run:
        started.append(arguments)
        return run

    federation: Any = types.SimpleNamespace(runs=runs, start=start, started=started)
    federation.directory_of = lambda summary: Federation.directory_of(federation, summary)
    return federation


def test_seconds_come_from_the_history_of_our_run(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    lines = "".join(json.dumps({"round": i, "seconds": i / 2}) + "\n" for i in (1, 2, 3))
    (tmp_path / "one" / "history.jsonl").write_text(lines)
    federation = stub(tmp_path, Run(0, json.dumps({"run_dir": "/app/quickbloom-runs/one"})))
    assert containers.ours(federation, 3) == [0.5, 1.0, 1.5]
    assert "min-nodes=3" in federation.started[0]
    with pytest.raises(SystemExit, match="no nodes"):
        containers.ours(stub(tmp_path, Run(1, said="no nodes")), 3)


def test_a_run_of_flower_that_left_no_seconds_has_failed_whatever_its_code(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="cannot"):
        containers.stock(stub(tmp_path, Run(0, said="cannot")), 3)
    (tmp_path / "seconds.json").write_text("[3, 2, 1]")
    federation = stub(tmp_path, Run(0))
    assert containers.stock(federation, 3) == [3.0, 2.0, 1.0]
    assert "nodes=3 nodes-per-round=3" in federation.started[0][-1]


def test_without_an_engine_it_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(containers, "missing", lambda: "needs an engine")
    for arguments, code in (([], 1), (["--if-possible"], 0)):
        monkeypatch.setattr("sys.argv", ["containers", *arguments])
        with pytest.raises(SystemExit) as ended:
            containers.main()
        assert ended.value.code == code
    assert "it needs an engine" in capsys.readouterr().err
