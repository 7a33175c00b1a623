"""The `quickbloom` command up to the point where Flower starts: what it takes, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError
from typer.testing import CliRunner

from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.config.run import parse_run_config
from quickbloom.server_app.cli import main, run


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command, expect exit code 2 and no start of Flower; return what it says, on one line."""

    def no_start(*_: Any) -> Any:
        raise AssertionError("Flower must not be started")

    monkeypatch.setattr(run, "follow", no_start)
    monkeypatch.setattr("sys.argv", ["quickbloom", *arguments])
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return " ".join(captured.err.split())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--algorithm", "mamll"],
            f"`algorithm` must be one of {', '.join(ALGORITHMS)}, got 'mamll': did you mean `maml`?",
        ),
        (["--algorithm", "decay", "--set", "decay.mu=1"], "got 'decay': to use one of your own run its file instead of"),
        (["--dataset", "mnist"], "`dataset` must be one of"),
        (["--set", "no-such-key=1"], "there is no setting `no-such-key`"),
        (["--set", "maml.inner-lrr=1"], "there is no setting `maml.inner-lrr`: did you mean `maml.inner-lr`?"),
        (["--set", "iner-lr=1", "--algorithm", "maml"], "there is no setting `iner-lr`: did you mean `maml.inner-lr`?"),
        (["--set", "rounds=many"], "`rounds` must be a valid integer, got 'many' (str)"),
        (
            ["--set", "inner-lr=-1", "--algorithm", "reptile"],
            "`reptile.inner-lr` must be greater than or equal to 0, got -1 (int)",
        ),
        (["--set", "penalty=0"], "`ridge.penalty` must be greater than 0, got 0 (int)"),
        (["--set", "novalue"], "`--set` must look like key=value, got 'novalue'"),
        (["--rounds", "0"], "`rounds` must be greater than or equal to 1, got 0 (int)"),
        (["--connection", "nowhere"], "`--connection` must be a [superlink.NAME] of Flower's config.toml, got 'nowhere'"),
        (["--dataset", "omniglot", "--set", "omniglot.ways=100"], "ways"),
        (["--dataset", "gaussian", "--set", "model=conv4"], '`model = "conv4"` needs images'),
        (["--dataset", "shakespeare", "--set", "model=mlp"], '`model = "mlp"` reads numbers'),
        (["--set", "model=own_missing:net"], '`model = "own_missing:net"` must name a module that can be imported'),
        (["--set", "algorithm=maml", "--set", "inner-lr=-1"], "`maml.inner-lr` must be greater than or equal to 0"),
        (["--set", "min-nodes=3"], "`min-nodes` must be at most `--nodes` (2), got 3"),
        (["--set", "test-tasks=60"], "leave none of the 56 tasks for training"),
        (["--set", "resume-from=nowhere"], "cannot be read"),
        (["--set", "mlp.hidden=64,none"], "`mlp.hidden` must be positive whole numbers"),
        (["--nodes", "none"], "Invalid value for '--nodes'"),
    ],
)
def test_wrong_input_is_refused_with_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    data_dir: Path,
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    monkeypatch.setenv("QUICKBLOOM_DATA_DIR", str(data_dir))
    monkeypatch.setenv("COLUMNS", "1000")
    assert sentence in refused(monkeypatch, capsys, "run", *arguments)


def test_a_users_model_is_found_in_the_current_directory_and_tried_before_flower_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    (tmp_path / "own_for_cli.py").write_text("from torch import nn\n\ndef net(shape, outputs):\n    return nn.Linear(8, 3)\n")
    said = refused(monkeypatch, capsys, "run", "--set", "model=own_for_cli:net")
    assert '`model = "own_for_cli:net"` must map float32 inputs of shape (2, 1, 8, 8) to outputs of shape (2, 5)' in said


def _wrong_dtype(path: Path) -> None:
    labels = np.zeros(1200, dtype=np.uint8)
    np.savez(path, images=np.zeros((1200, 28, 28)), label=labels, writer=labels, repetition=labels)


def _wrong_shape(path: Path) -> None:
    labels = np.zeros(5, dtype=np.uint8)
    np.savez(path, images=np.zeros((5, 3), dtype=np.uint8), label=labels, writer=labels, repetition=labels)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.touch(), "is not a readable .npz archive"),
        (_wrong_dtype, "must have dtype uint8, got float64"),
        (_wrong_shape, "must have shape"),
    ],
)
def test_a_bad_data_file_is_named_before_flower_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, make: Any, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "uji_digits_by_writer_28.npz")
    said = refused(monkeypatch, capsys, "run", "--dataset", "uji", "--set", f"data-dir={tmp_path}")
    assert "uji_digits_by_writer_28.npz" in said
    assert sentence in said


def test_an_output_directory_that_cannot_be_written_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    said = refused(monkeypatch, capsys, "run", "--output", str(tmp_path / "file" / "run"))
    assert "`output-dir` must be a directory that can be written" in said


def test_a_directory_that_already_holds_a_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "history.jsonl").touch()
    assert "already holds a run" in refused(monkeypatch, capsys, "run", "--output", str(tmp_path))


SUMMARY: dict[str, Any] = {"run_dir": "/nowhere"}


@pytest.mark.parametrize(("code", "summary"), [(0, SUMMARY), (1, None), (130, None)])
def test_the_exit_code_is_that_of_the_run_and_json_stands_alone_on_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, code: int, summary: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "follow", lambda *_: (code, summary))
    monkeypatch.setattr("sys.argv", ["quickbloom", "run", "--json"])
    with pytest.raises(SystemExit) as end:
        main.main()
    assert (end.value.code or 0) == code
    assert capsys.readouterr().out == (json.dumps(summary) + "\n" if summary else "")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device", "/full:b:"), SafetensorError("I/O error")])
def test_a_full_disk_ends_the_command_with_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, error: Exception
) -> None:
    def full(*_: Any) -> Any:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "follow", full)
    monkeypatch.setattr("sys.argv", ["quickbloom", "run"])
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 1
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("error: a file could not be read or written (")
    # Not as an emoji either: ":b:" would be one.
    assert str(error) in said
    assert "Traceback" not in said


@pytest.mark.parametrize(("option", "reports"), [([], 1), (["--no-report"], 0)])
def test_a_report_is_written_unless_it_is_not_wanted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, option: list[str], reports: int
) -> None:
    written: list[Path] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "follow", lambda *_: (0, SUMMARY))
    monkeypatch.setattr(run, "_try_report", written.append)
    monkeypatch.setattr("sys.argv", ["quickbloom", "run", "--json", *option])
    with pytest.raises(SystemExit):
        main.main()
    assert len(written) == reports


@pytest.mark.parametrize("command", [[], ["run"], ["compare"], ["report"]])
def test_help_shows_an_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    monkeypatch.setattr("sys.argv", ["quickbloom", *command, "--help"])
    with pytest.raises(SystemExit) as end:
        main.main()
    assert not end.value.code
    out = capsys.readouterr().out
    assert "Usage" in out
    assert "Example" in out


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        ([], list(parse_run_config({}).flat())[:5]),
        (["maml"], ["maml.zero-head", "maml.inner-lr"]),
        (["dropout-of-noise"], []),
        (["noise-mult"], ["privacy.noise-multiplier"]),
    ],
)
def test_settings_are_listed_with_defaults_and_meanings(words: list[str], keys: list[str]) -> None:
    done = CliRunner().invoke(main.cli, ["settings", *words])
    if not keys:
        assert "there is no setting with `dropout-of-noise` in its name" in str(done.exception)
        return
    listed = [line.partition(" = ")[0] for line in done.stdout.splitlines() if " = " in line]
    assert listed[: len(keys)] == keys
    assert set(listed) <= set(parse_run_config({"algorithm": "maml"}).flat()) | {"privacy.noise-multiplier"}
    assert len(set(listed)) == len(listed)


# ---- what is imported

OVERVIEW = """
import subprocess
import sys
from quickbloom.server_app.cli import main
sys.argv = ["quickbloom", *sys.argv[1:]]
try:
    main.main()
finally:
    print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "flwr", "pydantic", "numpy", "ray"}), file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", [[], ["--help"], ["runn"]])
def test_the_overview_imports_neither_torch_nor_flower(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", OVERVIEW, *arguments], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "[]"
    if arguments == ["runn"]:
        assert "No such command 'runn'" in done.stderr
    else:
        assert "Train a starting point and test it on held-out tasks." in done.stdout + done.stderr


def test_the_overview_says_what_the_commands_say_themselves() -> None:
    whole, light = (CliRunner().invoke(cli, ["--help"], env={"COLUMNS": "200"}) for cli in (main.cli, main.command_line(())))
    assert whole.exit_code == light.exit_code == 0
    assert whole.stdout == light.stdout
    assert all(f" {name} " in light.stdout for name in main.MODULES)
