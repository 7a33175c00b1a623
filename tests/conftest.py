"""Fixtures for all tests."""

import os
import platform
import signal
from pathlib import Path
from zipfile import ZipFile

import pytest
from hypothesis import settings

# The same examples in every run: a red test must be red again when somebody looks.
settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")


# Whoever is started in the background of a script ignores Ctrl-C, and so would the commands that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def traceback_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ServerApp's main sets it for its process, which here is that of the tests that follow."""
    monkeypatch.setattr("sys.tracebacklimit", 1000, raising=False)


@pytest.fixture(autouse=True)
def state_folder(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Devices without `--state-dir` keep their state in the user's folder, which no test may touch."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.getbasetemp() / "state"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with the published data files: QUICKBLOOM_DATA_DIR, else shared/data beside the repository, else skip."""
    setting = os.environ.get("QUICKBLOOM_DATA_DIR")
    folder = Path(setting) if setting else Path(__file__).resolve().parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs data files: '{folder}' does not exist; set QUICKBLOOM_DATA_DIR to the folder that holds them")
    return folder


@pytest.fixture(scope="session")
def kernel_wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheels of `quickbloom-kernels` by machine, built from this tree."""
    from kernels.build_wheels import build
    from quickbloom.common.maths.kernels.prebuilt import LEVELS

    return {machine: build(machine, tmp_path_factory.mktemp("wheels")) for machine in LEVELS}


@pytest.fixture(scope="session")
def prebuilt_kernels(kernel_wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the libraries as `pip install` leaves it; skips where there is no wheel for this machine."""
    if platform.system() != "Linux" or platform.machine() not in kernel_wheels:
        pytest.skip(f"quickbloom-kernels has no wheel for {platform.system()} on {platform.machine()}")
    folder = tmp_path_factory.mktemp("installed")
    ZipFile(kernel_wheels[platform.machine()]).extractall(folder)
    return folder / "quickbloom_kernels"
