"""Real Python processes under odd locales and paths: what they print, what they import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from quickbloom.common.errors import ConfigError
from quickbloom.common.system import surroundings

ROOT = Path(__file__).resolve().parents[3]
LOCALES = [
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "latin-1"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0"},
    {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "ascii"},
    {"LANG": "C"},
]


def python(code: str, *arguments: str, cwd: Path, **environ: str) -> "subprocess.CompletedProcess[bytes]":
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environ}
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=cwd, env=env, capture_output=True, check=False)


@pytest.mark.parametrize("locale", LOCALES, ids=lambda locale: "-".join(locale.values()))
def test_files_output_and_arguments_are_utf8_whatever_the_locale(tmp_path: Path, locale: dict[str, str]) -> None:
    code = """
import subprocess, sys
from pathlib import Path
from quickbloom.common.system import surroundings
surroundings.begin()
surroundings.check_names(sys.argv[1:])
Path(sys.argv[1]).write_text("größer", encoding="utf-8")
print(sys.argv[1], "\\udce9")
print("ß", file=sys.stderr)
print(subprocess.run([sys.executable, "-c", "print('ü', len(open('größe').read()))"], stdout=subprocess.PIPE).stdout)
"""
    (tmp_path / "program.py").write_text(code, encoding="utf-8")
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **locale}
    done = subprocess.run([sys.executable, "program.py", "größe"], cwd=tmp_path, env=env, capture_output=True, check=False)
    assert done.stderr.decode() == "ß\n"
    assert done.stdout.decode() == f"größe \\udce9\n{'ü 6'.encode() + bytes([10])!r}\n"
    assert (tmp_path / "größe").read_bytes() == "größer".encode()


def test_names_that_are_not_utf8_are_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the file or folder '--output=d\\xe9p' has a name that is not UTF-8"):
        surroundings.check_names(["run", "--output=d\udce9p"])
    folder = os.fsencode(tmp_path) + b"/d\xe9p"
    os.mkdir(folder)  # noqa: PTH102 - the name is bytes
    code = "import sys; from quickbloom.common.system.surroundings import check_names as c; c(sys.argv[1:])"
    for arguments, code_expected in ((["run"], 1), (["run", "--help"], 0), ([], 0)):
        done = python(code, *arguments, cwd=Path(os.fsdecode(folder)))
        assert done.returncode == code_expected, done.stderr
    assert b"the current directory" in python(code, "run", cwd=Path(os.fsdecode(folder))).stderr


@pytest.mark.parametrize("first", ["server_app", "client_app", "common"])
@pytest.mark.parametrize("foreign", ["common/__init__.py", "common.py", "server_app.py", "client_app/__init__.py"])
def test_packages_with_the_names_of_our_folders_are_not_imported(tmp_path: Path, first: str, foreign: str) -> None:
    (tmp_path / "theirs" / foreign).parent.mkdir(parents=True)
    (tmp_path / "theirs" / foreign).write_text("raise SystemExit('theirs')")
    code = f"import quickbloom.{first} as ours; print(ours.__file__)"
    path = f"{tmp_path / 'theirs'}:{ROOT}"
    assert python(code, cwd=tmp_path, PYTHONPATH=path).stdout.decode().strip() == str(ROOT / first / "__init__.py")


def test_a_users_modules_are_found_last(tmp_path: Path) -> None:
    (tmp_path / "client_app.py").write_text("raise SystemExit('theirs')")
    (tmp_path / "json.py").write_text("raise SystemExit('theirs')")
    (tmp_path / "my_models.py").write_text("import json, client_app\nvalue = 7")
    code = "from quickbloom.common.system.user_code import import_own; print(import_own('my_models').value)"
    # As a command that is installed: its directory, not the current one, is on the path.
    command = [sys.executable, "-P", "-c", code]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, check=True).stdout == b"7\n"
    elsewhere = {**env, "QUICKBLOOM_MODULES": str(tmp_path)}
    assert subprocess.run(command, cwd="/", env=elsewhere, capture_output=True, check=True).stdout == b"7\n"
