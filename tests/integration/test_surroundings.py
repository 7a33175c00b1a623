"""The real commands in odd surroundings: behind proxies, with a long TMPDIR, in another locale, beside foreign packages."""

import os
import subprocess
from pathlib import Path

import pytest
from real_processes import SCRIPTS

ROOT = Path(__file__).resolve().parents[2]
NOBODY = "http://127.0.0.1:9"
PROXIES = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "grpc_proxy", "all_proxy"), NOBODY)
C_LOCALE = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "latin-1"}
RUN = ("run", "--no-report", "--rounds", "2", "--dataset", "gaussian", "--set", "gaussian.clients=8")


def command(program: str, *arguments: str, cwd: Path, path: str = "", **environ: str) -> "subprocess.CompletedProcess[bytes]":
    python_path = os.pathsep.join(filter(None, [path, str(ROOT)]))
    env = {**os.environ, "PYTHONPATH": python_path, **environ}
    return subprocess.run(
        [SCRIPTS / program, *arguments], cwd=cwd, env=env, capture_output=True, stdin=subprocess.DEVNULL, check=False
    )


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A user's folder with a Flower app of their own, a model and a data function."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for name in ("client_app.py", "server_app.py", "common/__init__.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("raise SystemExit('theirs')\n")
    (folder / "my_models.py").write_text(
        "from math import prod\nfrom torch import nn\n\n\ndef small(input_shape, outputs):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(prod(input_shape), 8), nn.Tanh(), nn.Linear(8, outputs))\n"
    )
    (folder / "my_data.py").write_text(
        "import numpy as np\n\n\ndef load():\n    x = np.random.default_rng(0).normal(size=160)\n"
        "    return {'x': x, 'target': np.where(x > 0, 'up', 'down'), 'task': np.array([f't{i % 8}' for i in range(160)])}\n"
    )
    return folder


@pytest.mark.slow
@pytest.mark.simulation
def test_a_simulation_behind_proxies_with_a_long_tmpdir_in_the_c_locale(tmp_path: Path, theirs: Path) -> None:
    long = tmp_path / ("t" * 80)
    long.mkdir()
    foreign = tmp_path / "foreign"
    (foreign / "common").mkdir(parents=True)
    (foreign / "common" / "__init__.py").write_text("raise SystemExit('theirs')\n")
    environ = {**PROXIES, "ALL_PROXY": "socks5://127.0.0.1:9", "TMPDIR": str(long), **C_LOCALE}
    output = tmp_path / "größe"
    more = ("--runtime", "simulation", "--set", "model=my_models:small", "--output", str(output))
    done = command("quickbloom", *RUN, *more, cwd=theirs, path=str(foreign), **environ)
    assert done.returncode == 0, done.stderr.decode()
    assert str(output) in done.stderr.decode()
    assert (output / "summary.json").is_file()
    assert not list(long.glob("q*"))


def test_a_users_own_app_does_not_stand_in_the_way(tmp_path: Path, theirs: Path) -> None:
    more = ("--set", "model=my_models:small", "--output", str(tmp_path / "run"))
    done = command("quickbloom", *RUN, *more, cwd=theirs)
    assert done.returncode == 0, done.stderr.decode()
    done = command("quickbloom-edge", "check-data", "my_data:load", cwd=theirs)
    assert done.returncode == 0, done.stderr.decode()
    assert "task t7" in done.stdout.decode()


@pytest.mark.parametrize("environ", [C_LOCALE, {**C_LOCALE, "PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}])
def test_names_and_output_are_utf8(tmp_path: Path, environ: dict[str, str]) -> None:
    rows = [f"{'Süd' if i % 2 else 'Ost'},{i / 7},{'groß' if i % 3 else 'klein'}" for i in range(60)]
    (tmp_path / "Häuser.csv").write_text("\n".join(["task,x,target", *rows]), encoding="utf-8")
    done = command("quickbloom-edge", "check-data", "Häuser.csv", cwd=tmp_path, **environ)
    assert done.returncode == 0, done.stderr.decode()
    assert "task Süd" in done.stdout.decode("utf-8")
    assert "groß" in done.stdout.decode("utf-8")


def test_folders_whose_names_are_not_utf8_end_in_a_sentence(tmp_path: Path) -> None:
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/d\xe9p")
    Path(folder, "class").mkdir(parents=True)
    rows = ["task,x,target", *(f"A,{i},{'ud'[i % 2]}" for i in range(30))]
    Path(folder, "x.csv").write_text("\n".join(rows))
    for arguments in ([f"{folder}/x.csv"], ["--set", f"own.path={folder}", "x"]):
        done = command("quickbloom-edge", "check-data", *arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert "d\\xe9p" in done.stderr.decode()
        assert "has a name that is not UTF-8" in " ".join(done.stderr.decode().split())
    inside = command("quickbloom", *RUN, "--output", "out", cwd=Path(folder))
    assert inside.returncode == 2
    assert "the current directory" in inside.stderr.decode()
