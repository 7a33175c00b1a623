"""A comparison in three places, interrupted and continued, has the table of one in one go.

The runs are real and small: what a process of its own would do is done in this one.
"""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from quickbloom.common.errors import ConfigError
from quickbloom.server_app.cli import main
from quickbloom.server_app.comparing import searching
from quickbloom.server_app.comparing.batch import perform
from quickbloom.server_app.comparing.comparison import carry_out, planned
from quickbloom.server_app.comparing.plan import Plan
from quickbloom.server_app.comparing.searching import locked
from quickbloom.server_app.comparing.spread_out import do, gather, read_run, write_list

QUIET = Console(quiet=True)


class Here:
    """Stands in for the process of `quickbloom run`: the command, here and at once."""

    begun = 0

    def __init__(self, command: list[str], stderr: Any, **options: Any) -> None:
        Here.begun += 1
        done = CliRunner().invoke(main.cli, command[1:])
        stderr.write(done.stderr.encode())
        self.code = done.exit_code

    def poll(self) -> int:
        return self.code


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["quickbloom", "compare", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main.main()
    return int(end.value.code or 0)


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Of two seeds three inner rates with one round, and the best with three: eight runs."""
    monkeypatch.setattr(
        "quickbloom.server_app.comparing.batch.subprocess", SimpleNamespace(Popen=Here, DEVNULL=subprocess.DEVNULL)
    )
    return planned(
        [], variants=["fast:fomaml,inner-steps=1"], grids=["inner-lr=0.01,0.1,1"], dataset="gaussian", rounds=3, seeds="2"
    )


def without_clocks(result: dict[str, Any]) -> dict[str, Any]:
    """A result without the seconds that its runs took."""
    return json.loads(re.sub(r'"seconds": [^,}]*', '"seconds": 0', json.dumps(result)))  # type: ignore[no-any-return]


def test_interrupted_and_merged_from_three_places_it_is_the_same(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Here.begun = 0
    whole = carry_out(plan, tmp_path / "whole", 1, QUIET)
    assert Here.begun == 8
    home, file, random = tmp_path / "home", tmp_path / "runs.jsonl", Random(0)
    assert write_list([plan], home, file) == 6  # those that are short
    for number in range(1, 7):
        run = read_run(file, number, tmp_path / random.choice("abc"))
        assert do(run).code == 0
        assert do(run).facts == run.result().facts  # type: ignore[union-attr]  # it is not done twice
    assert Here.begun == 14
    places = [tmp_path / place for place in "abc"]
    assert gather(places[:2], home) + gather(places[1:], home) == 6
    # Those that waited for the short ones: a comparison is stopped twice in the middle of them, and another left half a run.
    assert write_list([plan], home, file) == 2
    assert [json.loads(line)["rounds"] for line in file.read_text().splitlines()] == [3, 3]
    half_done = read_run(file, 2, home).directory
    half_done.mkdir()
    (half_done / "history.jsonl").write_text('{"round": 1}\n')

    def stopped(wanted: Any, jobs: int, on_start: Callable[..., None], on_end: Callable[..., None]) -> Any:
        def stop(result: Any, kept: bool) -> None:
            if not kept:
                raise KeyboardInterrupt

        return perform(wanted, jobs, on_start=on_start, on_end=stop)

    with monkeypatch.context() as patch:
        patch.setattr(searching, "perform", stopped)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                carry_out(plan, home, 1, QUIET)
    found = carry_out(plan, home, 1, QUIET)
    assert Here.begun == 16
    assert without_clocks(found) == without_clocks(whole)
    assert write_list([plan], home, file) == 0
    tables = [
        [line.rsplit("|", 2)[0] for line in (place / "comparison.md").read_text().splitlines()]
        for place in (home, tmp_path / "whole")
    ]
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_sixty_runs_interrupted_ten_times_and_merged_from_three_places_are_the_same(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fifteen combinations with one round, the best five with three, for three seeds: all by the command, as users type it."""
    random, stops = Random(3), 0
    words = ["--variant", "fast:fomaml,inner-steps=1", "--dataset", "gaussian", "--rounds", 3, "--seeds", 3, "--jobs", 1]
    words += ["--grid", "inner-lr=0.001,0.01,0.1,0.3,1", "--grid", "outer-lr=0.001,0.003,0.03"]
    words += ["--set", "gaussian.clients=10", "--set", "baselines=false", "--set", "adapt-steps=2", "--set", "evaluate-every=0"]
    Here.begun = 0
    assert command(monkeypatch, *words, "--output", tmp_path / "whole") == 0
    assert Here.begun == 60

    class CutOff(Here):
        """Is stopped by Ctrl-C in the middle of a run, or right after it."""

        left = -1

        def __init__(self, words: list[str], stderr: Any, **options: Any) -> None:
            CutOff.left -= 1
            if CutOff.left == 0 and random.random() < 0.5:
                folder = Path(words[words.index("--output") + 1])
                (folder / "history.jsonl").write_text('{"round": 1}\n')
                raise KeyboardInterrupt
            super().__init__(words, stderr, **options)
            if CutOff.left == 0:
                raise KeyboardInterrupt

    monkeypatch.setattr(
        "quickbloom.server_app.comparing.batch.subprocess", SimpleNamespace(Popen=CutOff, DEVNULL=subprocess.DEVNULL)
    )
    file, places = tmp_path / "runs.jsonl", [tmp_path / name for name in "abc"]
    merged = [word for place in places for word in ("--merge", place)]
    home = [*words, "--output", tmp_path / "home"]
    assert command(monkeypatch, *home, "--plan", file) == 0
    assert len(file.read_text().splitlines()) == 45
    for number in random.sample(range(1, 46), 45):
        one = ["--plan", file, "--run", number, "--output", random.choice(places)]
        if stops < 6 and random.random() < 0.3:
            CutOff.left, stops = 1, stops + 1
            assert command(monkeypatch, *one) == 130
        assert command(monkeypatch, *one) == 0
    assert stops == 6
    # Of the long ones a few are done elsewhere too, and the others at home, where the comparison is stopped four times.
    assert command(monkeypatch, *home, *merged, "--plan", file) == 0
    assert len(file.read_text().splitlines()) == 15
    for number in random.sample(range(1, 16), 6):
        assert command(monkeypatch, "--plan", file, "--run", number, "--output", random.choice(places)) == 0
    for _ in range(4):
        CutOff.left = random.choice([1, 2])
        assert command(monkeypatch, *home, *merged) == 130
    assert command(monkeypatch, *home, *merged) == 0
    capsys.readouterr()
    found, whole = (
        without_clocks(json.loads((tmp_path / place / "comparison.json").read_text())) for place in ("home", "whole")
    )
    assert found == whole
    assert len(list((tmp_path / "home").glob("*/finished.json"))) == 60


def test_the_command_writes_the_list_and_says_how_to_do_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("--algorithms", "fedavg,local", "--dataset", "gaussian", "--rounds", 1, "--seeds", 2, "--inner-lrs", 0.1)
    assert command(monkeypatch, *words, "--plan", "list.jsonl") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "4 runs in list.jsonl: `quickbloom compare --plan list.jsonl --run K` does one, K from 1 to 4" in said
    lines = [json.loads(line) for line in (tmp_path / "list.jsonl").read_text().splitlines()]
    assert [(line["run"], line["algorithm"], line["seed"]) for line in lines] == [
        (1, "fedavg", 0),
        (2, "local", 0),
        (3, "fedavg", 1),
        (4, "local", 1),
    ]
    assert command(monkeypatch, "--plan", "list.jsonl", "--run", 5) == 2
    assert "`--run` must be a line of 'list.jsonl', 1 to 4, got 5" in " ".join(capsys.readouterr().err.split())
    assert command(monkeypatch, "--run", 5) == 2
    assert "name the list with `--plan`" in " ".join(capsys.readouterr().err.split())
    assert command(monkeypatch, "--plan", "none.jsonl", "--run", 1) == 2
    assert command(monkeypatch, *words, "--merge", tmp_path) == 2
    assert "`--merge` must be a directory of a comparison with finished runs" in " ".join(capsys.readouterr().err.split())


def test_a_run_on_other_data_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "data.csv"
    data.write_text("task,x,target\n" + "".join(f"t{i % 8},{i},{i % 3 + 0.5}\n" for i in range(160)))
    what = planned(["ridge"], data=str(data), task="task", target="target", rounds=1, seeds="1")
    file = tmp_path / "list.jsonl"
    assert write_list([what], tmp_path / "home", file) == 1
    assert read_run(file, 1, None).root == Path("runs/compare-own")
    data.write_text(data.read_text().replace("t0,0,", "t0,1,"))
    with pytest.raises(ConfigError, match="the data here are not those of"):
        read_run(file, 1, None)
    file.write_text("{}\n")
    with pytest.raises(ConfigError, match=r"line 1 of .* is no run"):
        read_run(file, 1, None)


def test_nobody_compares_in_a_directory_where_a_run_of_a_list_goes_on(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_list([plan], tmp_path / "home", tmp_path / "list.jsonl")
    run = read_run(tmp_path / "list.jsonl", 1, tmp_path / "home")

    def at_work(wanted: list[Any]) -> dict[Any, Any]:
        with pytest.raises(ConfigError, match="another comparison is at work"), locked(tmp_path / "home"):
            pass
        with pytest.raises(ConfigError, match="this run is at work"):
            do(run)
        return dict.fromkeys(wanted)

    monkeypatch.setattr("quickbloom.server_app.comparing.spread_out.perform", at_work)
    do(run)
    with locked(tmp_path / "home"):
        pass
