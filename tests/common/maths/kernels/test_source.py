"""Where `kernels.cpp` is found: in a source tree, in an installed package, and for a bundle, which carries no C++."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quickbloom.common.maths.kernels import compiler, source
from quickbloom.common.system.package import FOLDERS

ROOT = Path(__file__).resolve().parents[4]
CPP = ROOT / "common" / "maths" / "kernels" / "kernels.cpp"
READ = """
import hashlib, sys
from quickbloom.common.maths.kernels import source
assert source.__file__.startswith(sys.argv[1]), source.__file__
text = source.read()
print(hashlib.sha256(text.encode()).hexdigest() if text is not None else source.remark())
"""


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def copy(folder: Path) -> Path:
    """A source tree without anything but Python files, as a bundle has it."""
    for name in FOLDERS:
        for file in (ROOT / name).rglob("*.py"):
            target = folder / file.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy(tmp_path_factory.mktemp("bundle"))


def read_in(bundle: Path, *others: Path) -> str:
    """What the bundle's module finds, imported by a Python that has only these folders on its path."""
    path = f"import sys; sys.path[:0] = {[str(folder) for folder in (bundle, *others)]}\n"
    command = [sys.executable, "-I", "-S", "-c", path + READ, str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_hash_is_that_of_the_file() -> None:
    assert digest(CPP) == source.SHA256, f'set SHA256 = "{digest(CPP)}" in {Path(source.__file__).name}'


def test_beside_the_module_the_file_is_read_as_it_is(tmp_path: Path) -> None:
    # So that a change is tried before its hash is written down.
    changed = copy(tmp_path / "tree") / CPP.relative_to(ROOT)
    changed.write_text("// changed\n")
    assert read_in(tmp_path / "tree") == digest(changed)


@pytest.mark.parametrize("place", ["quickbloom/common/maths/kernels", "common/maths/kernels"])
def test_a_bundle_takes_the_file_of_the_installed_package(bundle: Path, tmp_path: Path, place: str) -> None:
    """`place`: where a wheel puts it, and where an editable install leaves it."""
    (tmp_path / place).mkdir(parents=True)
    shutil.copyfile(CPP, tmp_path / place / CPP.name)
    assert read_in(bundle, tmp_path / "nothing", tmp_path) == digest(CPP)


def test_a_bundle_passes_over_another_release(bundle: Path, tmp_path: Path) -> None:
    for name, more in (("other", "// other\n"), ("same", "")):
        folder = tmp_path / name / "quickbloom" / "common" / "maths" / "kernels"
        folder.mkdir(parents=True)
        (folder / CPP.name).write_text(CPP.read_text() + more)
    assert read_in(bundle, tmp_path / "other", tmp_path / "same") == digest(CPP)
    told = read_in(bundle, tmp_path / "other")
    assert "\n" not in told
    assert told.startswith("the compiled kernels are off")
    assert "install the release" in told


def test_a_missing_file_is_told_unless_the_kernels_are_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "read", lambda: None)
    monkeypatch.setattr(compiler, "find_compiler", lambda: "/usr/bin/c++")
    monkeypatch.delenv("QUICKBLOOM_KERNELS", raising=False)
    assert compiler.remark() == source.remark() != ""
    monkeypatch.setenv("QUICKBLOOM_KERNELS", "0")
    assert compiler.remark() == ""
