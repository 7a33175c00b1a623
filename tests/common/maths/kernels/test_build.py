"""Where the library of the kernels comes from, and what happens where there can be none."""

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from quickbloom.common.maths.kernels import build, prebuilt
from quickbloom.common.maths.kernels.build import library
from quickbloom.common.maths.kernels.compiler import find_compiler
from quickbloom.common.maths.kernels.train import known
from quickbloom.common.models.mlp import perceptron
from quickbloom.common.system import private

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler here")


@pytest.fixture(autouse=True)
def forgetful(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of its own, no `quickbloom-kernels`, and no memory of libraries that were loaded before."""
    monkeypatch.setattr(prebuilt, "installed", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    library.cache_clear()
    yield
    library.cache_clear()


def program(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return file


@needs_compiler
def test_it_is_compiled_once_and_then_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    run = build._run

    def counting(command: list[str]) -> None:
        calls.append(command)
        run(command)

    monkeypatch.setattr(build, "_run", counting)
    assert library(torch.float32) is not None
    library.cache_clear()
    assert library(torch.float32) is not None
    assert len(calls) == 1
    assert [file.suffix for file in sorted((tmp_path / "quickbloom" / "kernels").iterdir())] == [".so", ""]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_compiler_takes_the_source(dtype: torch.dtype) -> None:
    assert library(dtype) is not None


@needs_compiler
def test_a_switch_in_the_environment_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICKBLOOM_KERNELS", "0")
    assert library(torch.float32) is None
    assert known(perceptron((3, 4))) is None


def test_without_a_compiler_nothing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert library(torch.float32) is None
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("text", ["echo cannot >&2; exit 1", 'while [ "$1" != -o ]; do shift; done; echo rubbish > "$2"'])
def test_a_compiler_that_fails_is_as_good_as_none(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", str(program(tmp_path, "compiler", text)))
    assert library(torch.float32) is None
    assert capfd.readouterr() == ("", "")


def test_there_are_none_for_half_precision() -> None:
    assert library(torch.float16) is None
    assert known(perceptron((3, 4)).half()) is None


def test_a_folder_that_others_can_write_is_not_used(tmp_path: Path) -> None:
    # What lies there is loaded and run.
    folder = tmp_path / "quickbloom" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    used = private.folder("kernels")
    assert used != folder
    assert used.stat().st_uid == os.getuid()
    assert not stat.S_IMODE(used.stat().st_mode) & 0o022


def test_other_tools_make_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    compiler = program(tmp_path, "compiler", f'echo once >> {log}; while [ "$1" != -o ]; do shift; done; echo rubbish > "$2"')
    monkeypatch.setenv("CXX", str(compiler))
    for text in ("", "", "# a new release"):
        compiler.write_text(f"{compiler.read_text()}{text}")
        os.utime(compiler, ns=(1, 1))
        assert library(torch.float32) is None
        library.cache_clear()
    assert log.read_text().split() == ["once", "once"]


def test_a_compiler_that_failed_is_not_asked_again_that_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("CXX", str(program(tmp_path, "compiler", f"echo once >> {log}; exit 1")))
    for _ in range(3):
        assert library(torch.float32) is None
        library.cache_clear()
    assert log.read_text().split() == ["once"]
    (failed,) = (tmp_path / "quickbloom" / "kernels").glob("*.failed")
    os.utime(failed, (0, 0))
    assert library(torch.float32) is None
    assert log.read_text().split() == ["once", "once"]


def test_a_compiler_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = tmp_path / "child"
    monkeypatch.setattr(build, "SECONDS", 1)
    monkeypatch.setenv("CXX", str(program(tmp_path, "compiler", f"sleep 77 & echo $! > {child}; wait")))
    assert library(torch.float32) is None
    status = Path(f"/proc/{int(child.read_text())}/status")
    assert not status.exists() or "Z (zombie)" in status.read_text()


def test_a_user_without_a_home_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert private.folder("kernels") == tmp_path / f"quickbloom-kernels-{os.getuid()}"


def test_a_link_to_a_folder_is_not_used(tmp_path: Path) -> None:
    # Its owner could let it lead elsewhere, between the look and the use.
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "quickbloom").mkdir()
    (tmp_path / "quickbloom" / "kernels").symlink_to(tmp_path / "elsewhere")
    assert private.folder("kernels") == tmp_path / f"quickbloom-kernels-{os.getuid()}"
