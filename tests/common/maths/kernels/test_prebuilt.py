"""When the libraries of `quickbloom-kernels` are used, what takes their place, and their numbers against torch's."""

import json
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.engine.round import TaskWork, run_round
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.maths.kernels import prebuilt
from quickbloom.common.maths.kernels.build import Kernels, library, load
from quickbloom.common.maths.kernels.compiler import SWITCH, remark
from quickbloom.common.maths.kernels.train import known, layout_of
from quickbloom.common.maths.learner import Learner
from quickbloom.common.models.mlp import perceptron
from quickbloom.common.randomness import generator

LEVELS = list(prebuilt.LEVELS.get(platform.machine(), {}))


@pytest.fixture(autouse=True)
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a container: no compiler, and no library from before."""
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    forget()
    yield
    forget()


def forget() -> None:
    library.cache_clear()
    layout_of.cache_clear()


@pytest.fixture
def folder(prebuilt_kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed `quickbloom-kernels` that a test may change."""
    copy = tmp_path / "site" / "quickbloom_kernels"
    shutil.copytree(prebuilt_kernels, copy)
    monkeypatch.syspath_prepend(str(copy.parent))
    return copy


def reason() -> str:
    """Why there are no kernels, which is what commands say as well."""
    found = load(torch.float32)
    assert (found.library, found.state) == (None, "none")
    assert library(torch.float64) is None
    assert known(perceptron((3, 4))) is None
    assert remark() == found.detail
    assert "\n" not in found.detail
    assert found.detail.endswith(
        f"training takes the slower way through torch, with the same result; {SWITCH}=0 says that this is meant"
    )
    return found.detail.removeprefix("there is no C++ compiler here (c++, g++, clang++, or what CXX names), and ").split(
        ", so "
    )[0]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_without_a_compiler_the_best_level_of_the_processor_is_used(dtype: torch.dtype) -> None:
    found = load(dtype)
    assert found.library is not None
    assert found[1:] == (
        "prebuilt",
        next(level for level in LEVELS if prebuilt.LEVELS[platform.machine()][level] <= prebuilt.processor()),
    )
    assert remark() == ""


@pytest.mark.usefixtures("folder")
def test_a_switch_in_the_environment_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "0")
    assert load(torch.float32) == Kernels(None, "off", "QUICKBLOOM_KERNELS=0")
    assert remark() == ""


@pytest.mark.parametrize("part", ["source", "abi", "kinds"])
def test_libraries_that_were_made_from_something_else_are_not_used(folder: Path, part: str) -> None:
    file = folder / "made_from.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {part: "another"}))
    assert reason() == "the quickbloom-kernels that is installed belongs to another release of quickbloom"


@pytest.mark.parametrize("text", [None, "{"])
def test_libraries_that_do_not_say_what_they_were_made_from_are_not_used(folder: Path, text: str | None) -> None:
    file = folder / "made_from.json"
    file.unlink() if text is None else file.write_text(text)
    assert "belongs to another release" in reason()


@pytest.mark.usefixtures("folder")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the levels of x86-64")
def test_the_processor_decides_on_the_level(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    avx2 = "fpu avx avx2 bmi1 bmi2 f16c fma abm movbe"
    assert chosen(avx2, monkeypatch) == "x86-64-v3"
    assert chosen(f"{avx2} avx512f avx512dq", monkeypatch) == "x86-64-v3"  # as in Xeon Phi
    with pytest.raises(prebuilt.UnusableError):
        chosen("fpu avx", monkeypatch)
    assert reason() == "quickbloom-kernels has nothing for this machine (without abm, avx2, bmi1, bmi2, f16c, fma, movbe)"


def chosen(flags: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The level for a processor with these flags in /proc/cpuinfo."""
    monkeypatch.setattr(Path, "read_text", reads(f"processor\t: 0\nvmx flags\t: ept\nflags\t\t: {flags}\nbugs\t: none\n"))
    return prebuilt.load("float32")[0]


def reads(cpuinfo: str) -> object:
    original = Path.read_text
    return lambda path, *args, **kwargs: cpuinfo if path == Path("/proc/cpuinfo") else original(path, *args, **kwargs)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Windows", "AMD64"), ("Linux", "riscv64")])
def test_there_are_none_for_other_systems_and_machines(system: str, machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert reason() == f"quickbloom-kernels has nothing for this machine ({system}, {machine})"


def test_where_it_is_not_installed_the_command_that_installs_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prebuilt, "installed", lambda: None)
    assert reason() == "quickbloom-kernels is not installed (pip install 'quickbloom[fast]')"


def test_a_damaged_library_is_not_used(folder: Path) -> None:
    for file in folder.glob("*.so"):
        file.write_bytes(b"rubbish")
    assert "cannot be loaded" in reason()


def test_a_compiler_takes_the_place_of_libraries_that_do_not_fit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(prebuilt, "installed", lambda: folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load(torch.float32).state == "prebuilt"
    (folder / "made_from.json").unlink()
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    found = load(torch.float32)
    assert found.library is not None
    assert found.state == "compiled"
    assert found.detail.endswith("belongs to another release of quickbloom")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_round_has_the_numbers_of_torch(
    prebuilt_kernels: Path, dtype: torch.dtype, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = prebuilt.LEVELS[platform.machine()][level]
    if not needed <= prebuilt.processor():
        pytest.skip(f"this processor has not all of {level}")
    monkeypatch.setattr(prebuilt, "installed", lambda: prebuilt_kernels)
    monkeypatch.setattr(prebuilt, "processor", lambda: needed)
    module = perceptron((6, 20, 4)).to(dtype)
    options = ALGORITHMS["reptile"].Options.model_validate({"inner-lr": 0.1, "inner-steps": 5})
    algorithm = ALGORITHMS["reptile"](options, Learner(module, "classification", 4))
    meta = algorithm.init()
    assert known(module) is not None
    assert load(dtype)[1:] == ("prebuilt", level)
    ours = run_round(algorithm, meta, work(dtype), 8)
    monkeypatch.setenv(SWITCH, "0")
    forget()
    assert known(module) is None
    theirs = run_round(algorithm, meta, work(dtype), 8)
    for name, value in theirs.gradient.items():
        torch.testing.assert_close(ours.gradient[name], value, atol=1e-5, rtol=1e-5)
    assert ours.losses == pytest.approx(theirs.losses, abs=1e-5)


def work(dtype: torch.dtype) -> list[TaskWork]:
    source = torch.Generator().manual_seed(1)

    def part(n: int) -> Batch:
        return Batch.of(torch.randn(n, 6, generator=source).to(dtype), torch.randint(4, (n,), generator=source))

    return [TaskWork(TaskData(part(9), part(7), part(3)), generator(0, k)) for k in range(5)]
