"""Real Flower processes for tests: started here, and ended by id when the test is over."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quickbloom.common.flower.names import NAMES
from quickbloom.common.system.processes import end_group, processes_with
from quickbloom.server_app.launch.flower_run import environment, healthy

SCRIPTS = Path(sys.executable).parent

_WITHOUT = """
import importlib
import sys
from importlib.machinery import PathFinder

PLACES = {places!r}


class Without:
    def __init__(self, module):
        self._module, self._name = importlib.import_module(module), module

    def __getattr__(self, attribute):
        if f"{{self._name}}:{{attribute}}" in PLACES:
            raise AttributeError(attribute)
        return getattr(self._module, attribute)


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "quickbloom.common.flower.names":
            return None
        spec = PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def and_remove(module):
            run(module)
            module.import_module = Without
            with open({log!r}, "a") as log:
                log.write(" ".join(sys.argv[:3]).replace("\\n", " ") + "\\n")

        spec.loader.exec_module = and_remove
        return spec


sys.meta_path.insert(0, Finder())
"""


def without_names(folder: Path, *names: str) -> dict[str, str]:
    """Variables with which no process finds these names of `common.flower.names` in Flower; Flower itself has them.

    `folder`: a new one; each process that lacks them leaves a line in its file `lacking`.
    """
    folder.mkdir()
    # Flower's own Message looks this one up where it is defined, so there it cannot be gone.
    needed = "flwr.app.message.message:TaskIdentity"
    places = [place for name in names for place in NAMES[name].places if place != needed]
    text = _WITHOUT.format(places=places, log=str(folder / "lacking"))
    (folder / "sitecustomize.py").write_text(text, encoding="utf-8")
    path = [str(folder), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(part for part in path if part)}


def quickbloom(*arguments: str, cwd: Path, flwr_home: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the real command as a user would."""
    return subprocess.run(
        [SCRIPTS / "quickbloom", *arguments],
        cwd=cwd,
        env=environment(flwr_home),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=600,
        check=False,
    )


def curve(run_dir: str | Path) -> list[dict[str, Any]]:
    """What must be equal between two runs with the same seed: the numbers of history.jsonl, without times."""
    lines = (Path(run_dir) / "history.jsonl").read_text().splitlines()
    return [{key: json.loads(line).get(key) for key in ("round", "train", "validation")} for line in lines]


def numbers(value: Any) -> list[float]:
    """All numbers in nested dictionaries and lists, in order."""
    if isinstance(value, dict):
        return [number for key in sorted(value) for number in numbers(value[key])]
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [] if value is None else [float(value)]


def commands_with(variable: str) -> list[str]:
    """The command lines of the living processes whose environment holds `variable` ("NAME=value"), with their ids."""
    found = []
    for pid in processes_with(variable):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        found.append(f"{pid}: {command.replace(bytes(1), b' ').decode(errors='replace')}")
    return found


@contextmanager
def process(*command: str | Path, env: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, ended with everything it started."""
    with log.open("w") as output:
        started = subprocess.Popen(
            [str(part) for part in command],
            env=env,
            cwd=log.parent,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        yield started
    finally:
        end_group(started)


def wait_for(port: int) -> None:
    """Until the SuperLink answers there."""
    deadline = time.monotonic() + 300
    while not healthy(port):
        assert time.monotonic() < deadline, "the SuperLink did not start"
        time.sleep(0.2)
