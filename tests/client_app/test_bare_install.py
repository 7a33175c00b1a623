"""Without extras a device with .npz data has all it needs, and its commands start before torch is loaded."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXTRAS = (
    "sklearn",
    "pyarrow",
    "PIL",
    "matplotlib",
    "jinja2",
    "tensorboard",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "ray",
    "hypothesis",
)
_REPORT = "import sys\nprint(sorted({name.split('.')[0] for name in sys.modules} & set(sys.argv[1].split(','))))"


def python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_commands_of_a_device_need_no_extra_for_npz(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 2))
    np.savez(tmp_path / "a.npz", task=np.repeat(["A", "B"], 20), x=x, target=np.where(x[:, 0] > 0, "up", "down"))
    # torch itself takes jinja2 where it is; whoever asks for another one of these fails here.
    code = f"""
import sys
for name in {[name for name in EXTRAS if name != "jinja2"]}:
    sys.modules[name] = None
import quickbloom.client_app.app, quickbloom.client_app.join, quickbloom.client_app.export
import quickbloom.client_app.offline.adapting, quickbloom.client_app.offline.predicting
from quickbloom.client_app.check_data import describe
print("\\n".join(describe(sys.argv[1], "task", "target")))
"""
    assert "task B: 8 support, 6 query, 6 test examples" in python(code, str(tmp_path / "a.npz"))


@pytest.mark.parametrize(
    "module",
    [
        "quickbloom.client_app.join",
        "quickbloom.client_app.offline.adapting",
        "quickbloom.client_app.offline.predicting",
        "quickbloom.client_app.export",
        "quickbloom.client_app.check_data",
    ],
)
def test_no_extra_is_loaded_before_it_is_needed(module: str) -> None:
    loaded = python(f"import {module}\n{_REPORT}", ",".join(name for name in EXTRAS if name != "jinja2"))
    assert loaded.strip() == "[]"


def test_the_command_starts_without_torch_and_flower() -> None:
    assert python(f"import quickbloom.client_app.cli\n{_REPORT}", "torch,flwr,numpy,grpc,cryptography").strip() == "[]"
