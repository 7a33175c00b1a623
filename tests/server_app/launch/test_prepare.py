"""What a machine lacks is said before anything starts."""

import errno
import importlib.util
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from quickbloom.common.config.run import Scalar
from quickbloom.common.datasets import load_dataset
from quickbloom.common.errors import ConfigError, QuickbloomError
from quickbloom.server_app.comparing.plan import Plan
from quickbloom.server_app.launch.prepare import settle

GAUSSIAN: dict[str, Scalar] = {"dataset": "gaussian", "gaussian.clients": 8}


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("directory")
@pytest.mark.parametrize(
    ("package", "settings", "sentence"),
    [
        ("ray", {}, r"Flower's simulation needs ray, .*'quickbloom\[simulation\]', or choose `--runtime in-process`"),
        ("sklearn", {"dataset": "digits"}, r"the data set `digits` needs scikit-learn, .*'quickbloom\[datasets\]'"),
        (
            "dp_accounting",
            {"privacy.noise-multiplier": 1.0, "privacy.clip": 1.0},
            r"needs dp-accounting, .*'quickbloom\[privacy\]'",
        ),
        ("tensorboard", {"tensorboard": True}, r"`tensorboard` needs tensorboard, .*'quickbloom\[report\]'"),
        ("wandb", {"wandb": "mine"}, r"`wandb` needs wandb, .*'quickbloom\[wandb\]'"),
        ("mlflow", {"mlflow": "http://127.0.0.1:1"}, r"`mlflow` needs mlflow-skinny, .*'quickbloom\[mlflow\]'"),
    ],
)
def test_an_extra_that_is_missing_is_named(
    package: str, settings: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    # Tests before this one may have read the data.
    load_dataset.cache_clear()
    with pytest.raises(QuickbloomError, match=sentence):
        settle(GAUSSIAN | settings, None, None, "simulation" if package == "ray" else None)


@pytest.mark.usefixtures("directory")
def test_a_comparison_in_simulation_needs_the_extra_and_one_in_this_process_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    plan = Plan(("fedavg",), (0,), "gaussian", 1, (0.1,), ("gaussian.clients=8",), simulation=True)
    with pytest.raises(ConfigError, match=r"needs ray, .*'quickbloom\[simulation\]', or leave `--simulation` out"):
        plan.check()
    Plan(("fedavg",), (0,), "gaussian", 1, (0.1,), ("gaussian.clients=8",)).check()


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray: pip install 'quickbloom[simulation]'")
@pytest.mark.parametrize("lacking", ["address", "temporary"])
def test_a_simulation_is_refused_where_it_could_not_start(
    lacking: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lacking == "address":
        monkeypatch.setattr(socket.socket, "bind", refuse)
    else:
        monkeypatch.setenv("TMPDIR", str(directory / "none"))
    sentence = r"Flower's simulation needs the address 127\.0\.0\.1" if lacking == "address" else "`TMPDIR` must be a directory"
    with pytest.raises(ConfigError, match=sentence):
        settle(dict(GAUSSIAN), None, None, "simulation")
    if lacking == "address":
        assert settle(dict(GAUSSIAN), None, None, "in-process").runtime == "in-process"


def refuse(self: socket.socket, address: object) -> None:
    raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")


@pytest.mark.usefixtures("directory")
def test_a_gpu_or_a_compiler_that_is_not_there_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match='`device` is "cuda", but this machine has no CUDA device: use "auto" or "cpu"'):
        settle(GAUSSIAN | {"device": "cuda"}, None, None, "in-process")
    monkeypatch.setenv("CXX", "")
    monkeypatch.setattr("quickbloom.common.maths.kernels.prebuilt.installed", lambda: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    settle(dict(GAUSSIAN), None, None, "in-process")
    assert " ".join(capsys.readouterr().err.split()).count("Remark: there is no C++ compiler here") == 1
    with pytest.raises(ConfigError, match="`compile = true` needs a C"):
        settle(GAUSSIAN | {"compile": True}, None, None, "in-process")
    monkeypatch.setenv("QUICKBLOOM_KERNELS", "0")
    settle(dict(GAUSSIAN), None, None, "in-process")
    assert "compiler" not in capsys.readouterr().err


@pytest.mark.usefixtures("directory")
def test_simulated_devices_are_one_for_each_task() -> None:
    """One node with all tasks would be a single device, which is away for half of the day."""
    assert settle({**GAUSSIAN, "devices": "lognormal"}, None, None, "in-process").nodes == 8
    assert settle({**GAUSSIAN, "devices": "lognormal"}, None, 3, "in-process").nodes == 3
    assert settle(GAUSSIAN, None, None, "in-process").nodes == 2
