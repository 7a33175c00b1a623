"""Real Flower processes for tests: started here, and ended by id when the test is over."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quickbloom.common.system.processes import end_group, processes_with
from quickbloom.server_app.launch.flower_run import environment, healthy

SCRIPTS = Path(sys.executable).parent


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
