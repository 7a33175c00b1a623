"""Runs of the command: named after what decides them, kept, not repeated, ended together. The processes are tiny scripts."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from quickbloom.common.errors import ConfigError
from quickbloom.common.system.processes import ENDINGS, processes_with, uninterrupted
from quickbloom.server_app.comparing import batch
from quickbloom.server_app.comparing.batch import Result, Run, Setup, perform

SETUP = Setup("maml", "digits", 3, ("inner-lr=0.1",), nodes=1, in_process=True)
SCRIPT = """
import json, pathlib, sys, time
arguments = sys.argv[1:]
directory = pathlib.Path(arguments[arguments.index("--output") + 1])
seed = int(arguments[arguments.index("--seed") + 1])
with open(directory.parent / "calls", "a") as calls:
    calls.write(f"{seed}\\n")
if seed == 8:
    sys.exit("some lines\\nerror: seed 8 is\\nno good")
time.sleep(60 if seed == 9 else 0)
(directory / "summary.json").write_text(json.dumps({"seed": seed}))
"""


@pytest.fixture(autouse=True)
def command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a script in the place of `quickbloom`; seed 8 fails and seed 9 takes a minute."""
    start = subprocess.Popen

    def popen(words: list[str], **options: object) -> subprocess.Popen[bytes]:
        assert Path(words[0]).name == "quickbloom"
        return start([sys.executable, "-c", SCRIPT, *words[1:]], **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(subprocess, "Popen", popen)


def calls(root: Path) -> list[int]:
    return [int(line) for line in (root / "calls").read_text().split()]


def test_the_command_is_what_a_user_would_type() -> None:
    typed = "quickbloom run --algorithm maml --dataset digits --rounds 3 --nodes 1 --seed 4 --runtime in-process"
    typed += " --set inner-lr=0.1 --json"
    assert SETUP.command(4) == typed.split()


def test_effective_settings_hold_defaults_and_leave_out_other_tables_and_places() -> None:
    effective = SETUP.effective()
    assert (effective["maml.inner-lr"], effective["maml.inner-steps"], effective["model"]) == (0.1, 5, "mlp")
    assert not [key for key in effective if key.startswith(("fedavg.", "uji."))]
    assert not {"output-dir", "data-dir", "resume-from", "seed"} & effective.keys()


def test_a_setting_that_is_wrong_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no setting `rats`"):
        perform([Run(replace(SETUP, settings=("rats=1",)), 0, tmp_path)])


def test_finished_runs_are_kept_with_their_facts(tmp_path: Path) -> None:
    wanted = [Run(SETUP, seed, tmp_path) for seed in (0, 1)]
    told: list[tuple[int, bool]] = []

    def on_end(result: Result, kept: bool) -> None:
        told.append((result.summary["seed"], kept))

    first = perform(wanted, jobs=2, facts={"commit": "abc"}, on_end=on_end)
    again = perform([*wanted, Run(SETUP, 2, tmp_path)], facts={"commit": "def"}, on_end=on_end)
    assert sorted(calls(tmp_path)) == [0, 1, 2]
    assert sorted(told[:2]) == [(0, False), (1, False)]
    assert told[2:] == [(0, True), (1, True), (2, False)]
    assert [again[run].facts for run in wanted] == [first[run].facts for run in wanted]
    assert again[wanted[0]].facts["commit"] == "abc"


def test_another_setting_default_seed_mode_or_version_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setups = [SETUP, replace(SETUP, settings=("inner-lr=0.2",)), replace(SETUP, nodes=2), replace(SETUP, in_process=False)]
    directories = [Run(setup, 0, tmp_path).directory for setup in setups] + [Run(SETUP, 1, tmp_path).directory]
    monkeypatch.setattr(batch, "__version__", "99")
    directories.append(Run(SETUP, 0, tmp_path).directory)
    settings = SETUP.effective()
    monkeypatch.setattr(Setup, "effective", lambda self: settings | {"adapt-steps": 99})
    directories.append(Run(SETUP, 0, tmp_path).directory)
    assert len(set(directories)) == 7


def test_a_change_of_a_users_own_model_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    run = Run(replace(SETUP, settings=("model=own_for_runs:net",)), 0, tmp_path)
    directories = []
    for text in ("width = 8", "width = 9"):
        (tmp_path / "own_for_runs.py").write_text(text)
        directories.append(run.directory)
    assert directories[0] != directories[1]


def test_spelling_a_default_out_is_the_same_run(tmp_path: Path) -> None:
    spelt = replace(SETUP, settings=("maml.inner-lr=0.1", "adapt-steps=0"))
    assert Run(spelt, 0, tmp_path).directory == Run(SETUP, 0, tmp_path).directory


def test_a_half_finished_run_starts_anew(tmp_path: Path) -> None:
    run = Run(SETUP, 0, tmp_path)
    run.directory.mkdir()
    (run.directory / "history.jsonl").write_text(json.dumps({"round": 1}) + "\n")
    assert run.result() is None
    assert perform([run])[run].rounds == []
    assert run.result() is not None


def test_a_failed_run_is_told_and_not_kept(tmp_path: Path) -> None:
    run = Run(SETUP, 8, tmp_path)
    for _ in range(2):
        result = perform([run])[run]
        assert (result.code, result.failure) == (1, "seed 8 is\nno good")
    assert calls(tmp_path) == [8, 8]


@pytest.mark.parametrize(
    ("said", "failure", "broken"),
    [
        ("a\nerror: the first\nerror: value error: 3", "value error: 3", False),
        ("WARNING: some error: x\nerror: lower it", "lower it", False),
        ("some error: of a library", "some error: of a library", False),
        ("Traceback (most recent call last):\n  x\nerror: y", "Traceback (most recent call last):\n  x\nerror: y", True),
        ("error: a file could not be read or written (x)", "a file could not be read or written (x)", True),
    ],
)
def test_a_failure_is_the_sentence_of_the_command_and_a_traceback_a_defect(
    tmp_path: Path, said: str, failure: str, broken: bool
) -> None:
    run = Run(SETUP, 0, tmp_path)
    run.directory.mkdir()
    (run.directory / "command.log").write_text(said)
    result = batch._finish(run, 1, {})
    assert (result.failure, result.broken) == (failure, broken)


def test_while_runs_are_ended_no_signal_interrupts() -> None:
    before = [signal.getsignal(number) for number in ENDINGS]
    assert set(ENDINGS) == {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    with uninterrupted():
        for number in ENDINGS:
            signal.raise_signal(number)
    assert [signal.getsignal(number) for number in ENDINGS] == before


def test_an_end_that_raises_ends_the_other_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICKBLOOM_TEST_MARK", str(tmp_path))

    def on_end(result: Result, kept: bool) -> None:
        raise KeyboardInterrupt

    slow, quick = Run(SETUP, 9, tmp_path), Run(SETUP, 0, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        perform([slow, quick], jobs=2, on_end=on_end)
    assert processes_with(f"QUICKBLOOM_TEST_MARK={tmp_path}") == []
    assert slow.result() is None
    assert quick.result() is not None
