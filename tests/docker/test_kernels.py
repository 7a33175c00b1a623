"""The compiled kernels in the image, which has no compiler."""

import json

import pytest
from containers import built_image

from benchmarks.compose import IMAGE, docker

pytestmark = pytest.mark.docker


@pytest.fixture(scope="module", autouse=True)
def image(tmp_path_factory: pytest.TempPathFactory) -> None:
    built_image(tmp_path_factory.mktemp("build"))


def in_container(*command: str) -> str:
    done = docker("run", "--rm", IMAGE, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_image_has_no_compiler() -> None:
    found = in_container("sh", "-c", "for name in cc c++ gcc g++ clang clang++ zig; do command -v $name; done; ls /opt; true")
    assert found.split() == ["quickbloom", "venv"]
    assert in_container("python", "-c", "import importlib.util; print(importlib.util.find_spec('ziglang'))").strip() == "None"


def test_the_doctor_finds_prebuilt_kernels() -> None:
    said = json.loads(in_container("quickbloom", "doctor", "--json"))
    (found,) = (finding for finding in said["findings"] if finding["part"] == "kernels")
    assert (found["state"], found["mend"]) == ("prebuilt", "")
    assert found["detail"] in ("x86-64-v3", "x86-64-v4", "armv8-a")


def test_a_round_is_computed_by_them() -> None:
    code = """
from quickbloom.common.maths.kernels import train
from quickbloom import run
calls = []
call = train.call
train.call = lambda function, *rest: (calls.append(function), call(function, *rest))
run("reptile", rounds=2, output="/tmp/run", seed=1)
print(len(calls))
"""
    assert int(in_container("python", "-c", code).split()[-1]) >= 2
