"""The wheels of `quickbloom-kernels`: what is in them, what they need, and that pip and a fresh Python take them."""

import base64
import csv
import hashlib
import platform
import re
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from quickbloom import __version__

MACHINES = {"x86_64": 62, "aarch64": 183}
"""The number of each machine in the header of an ELF file."""
LEVELS = {"x86_64": ("x86-64-v3", "x86-64-v4"), "aarch64": ("armv8-a",)}
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=MACHINES)
def machine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def wheel(kernel_wheels: dict[str, Path], machine: str) -> ZipFile:
    return ZipFile(kernel_wheels[machine])


def libraries(wheel: ZipFile) -> dict[str, bytes]:
    return {Path(name).name: wheel.read(name) for name in wheel.namelist() if name.endswith(".so")}


def test_a_wheel_says_in_its_name_and_inside_what_it_is_for(
    kernel_wheels: dict[str, Path], wheel: ZipFile, machine: str
) -> None:
    tag = f"py3-none-manylinux_2_28_{machine}"
    assert kernel_wheels[machine].name == f"quickbloom_kernels-{__version__}-{tag}.whl"
    info = f"quickbloom_kernels-{__version__}.dist-info"
    assert f"\nTag: {tag}\n" in wheel.read(f"{info}/WHEEL").decode()
    said = wheel.read(f"{info}/METADATA").decode()
    assert f"\nName: quickbloom-kernels\nVersion: {__version__}\n" in said


def test_the_record_has_every_file_with_its_hash(wheel: ZipFile) -> None:
    (record,) = (name for name in wheel.namelist() if name.endswith("/RECORD"))
    rows = {name: (digest, size) for name, digest, size in csv.reader(wheel.read(record).decode().splitlines())}
    assert rows.pop(record) == ("", "")
    assert sorted([*rows, record]) == sorted(wheel.namelist())
    for name, (digest, size) in rows.items():
        content = wheel.read(name)
        method, _, value = digest.partition("=")
        assert (method, int(size)) == ("sha256", len(content))
        assert base64.urlsafe_b64decode(f"{value}=") == hashlib.sha256(content).digest()


def test_there_is_a_library_for_each_number_type_and_level(wheel: ZipFile, machine: str) -> None:
    expected = {f"{kind}-{level}.so" for kind in ("float32", "float64") for level in LEVELS[machine]}
    assert libraries(wheel).keys() == expected
    for name, content in libraries(wheel).items():
        assert content[:4] == b"\x7fELF", name
        assert int.from_bytes(content[18:20], "little") == MACHINES[machine], name
    assert len(set(libraries(wheel).values())) == len(expected)


def test_a_library_needs_nothing_newer_than_its_tag_and_no_library_of_cpp(wheel: ZipFile) -> None:
    for name, content in libraries(wheel).items():
        versions = [tuple(map(int, found.split(b"."))) for found in re.findall(rb"GLIBC_([0-9.]+)\0", content)]
        assert versions, name
        assert max(versions) <= (2, 28), name
        assert b"__gxx_personality" not in content, name
        assert set(re.findall(rb"\0(lib[\w+.-]+\.so[\w.]*)\0", content)) <= {b"libc.so.6", b"libm.so.6"}, name


def test_the_same_source_makes_the_same_wheel(kernel_wheels: dict[str, Path], machine: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kernels.build_wheels", "--machine", machine, "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    again = Path(done.stdout.strip())
    assert again.parent == tmp_path
    assert again.read_bytes() == kernel_wheels[machine].read_bytes()


@pytest.mark.skipif((platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="installs the wheel for x86-64")
def test_pip_installs_it_and_a_bundle_finds_it(kernel_wheels: dict[str, Path], tmp_path: Path) -> None:
    """A Python without site-packages, and of this project Python files alone: no `kernels.cpp`, no compiler, no torch."""
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--target", str(tmp_path / "site")]
    subprocess.run([*command, str(kernel_wheels["x86_64"])], check=True, capture_output=True)
    for name in ("quickbloom/__init__.py", "common/__init__.py", "common/maths/__init__.py"):
        copy(name, tmp_path / "bundle")
    for file in (ROOT / "common" / "maths" / "kernels").glob("*.py"):
        copy(str(file.relative_to(ROOT)), tmp_path / "bundle")
    code = f"import sys; sys.path[:0] = {[str(tmp_path / 'bundle'), str(tmp_path / 'site')]}\n"
    code += "from quickbloom.common.maths.kernels import prebuilt\n"
    code += "level, library = prebuilt.load('float32')\nprint(level, library.lanes())"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("x86-64-v3 8", "x86-64-v4 16")


def copy(name: str, folder: Path) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes((ROOT / name).read_bytes())
