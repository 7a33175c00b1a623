"""A comparison over several machines: the list of its runs, one run of the list, and what was done elsewhere gathered.

The list is a file with a JSON line for each run that can be done now: of a grid those of the first rung, and when these are
gathered, those of the next. A line says what to run and the hash of the data, so that a run elsewhere is the same run.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from quickbloom.common.errors import ConfigError
from quickbloom.common.system import locks
from quickbloom.common.system.whole_files import whole
from quickbloom.server_app.comparing.batch import FINISHED, Result, Run, Setup, perform
from quickbloom.server_app.comparing.fingerprint import Data, of_run
from quickbloom.server_app.comparing.plan import Plan
from quickbloom.server_app.comparing.searching import searches_of

LOCK = ".run-{}.lock"
_RUN_DIRECTORY = re.compile(r".+-seed\d+-[0-9a-f]{10}")


def write_list(plans: Sequence[Plan], directory: Path, file: Path) -> int:
    """Write the runs that are neither finished in `directory` nor waiting for others, a JSON line each; return their number."""
    runs = {run.directory.name: run for plan in plans for run in _open(plan, directory)}
    with whole(file) as out:
        for number, run in enumerate(runs.values(), 1):
            out.write(json.dumps({"run": number, **facts_of(run)}) + "\n")
    return len(runs)


def _open(plan: Plan, directory: Path) -> list[Run]:
    """The runs of every search that are missing in the first rung that is not complete."""
    found = []
    for search in searches_of(plan, directory):
        while wanted := search.wanted:
            results = [run.result() for run in wanted]
            missing = [run for run, result in zip(wanted, results, strict=True) if result is None]
            if missing:
                found += missing
                break
            search.take([result for result in results if result])
    return found


def facts_of(run: Run) -> dict[str, Any]:
    """Return as JSON what `as_run` needs on another machine."""
    setup = run.setup
    facts: dict[str, Any] = {
        "directory": run.directory.name,
        "algorithm": setup.algorithm,
        "dataset": setup.dataset,
        "rounds": setup.rounds,
        "seed": run.seed,
    }
    facts |= {"settings": list(setup.settings), "nodes": setup.nodes, "in_process": setup.in_process, "name": setup.name}
    return facts | {"data": setup.data.digest if setup.data else ""}


def read_run(file: Path, number: int, output: Path | None) -> Run:
    """Return the run in line `number` of a list, from 1 on. Raises ConfigError, also where the data here are others."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"`--plan` must be a list that `compare --plan` wrote, got '{file}' ({error.strerror})") from None
    if not 1 <= number <= len(lines):
        raise ConfigError(f"`--run` must be a line of '{file}', 1 to {len(lines)}, got {number}")
    try:
        facts = json.loads(lines[number - 1])
    except ValueError:
        facts = {}
    root = output or Path("runs") / f"compare-{facts.get('dataset', '') if isinstance(facts, dict) else ''}"
    return as_run(facts, root, f"'{file}'", f"line {number} of '{file}'")


def as_run(facts: Mapping[str, Any], root: Path, source: str, line: str = "") -> Run:
    """Return the run of `facts_of`, below `root`. Raises ConfigError, also where the data here are others.

    `source`: what the facts are of, in words; `line`: the same of these facts.
    """
    try:
        setup = Setup(
            facts["algorithm"],
            facts["dataset"],
            facts["rounds"],
            settings=tuple(facts["settings"]),
            nodes=facts["nodes"],
            in_process=facts["in_process"],
            name=facts["name"],
        )
        name, seed, digest = str(facts["directory"]), int(facts["seed"]), facts["data"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{line or source} is no run: write the list anew with `compare --plan`") from None
    data: Data = of_run(setup.config(), {})
    if data.digest != digest:
        raise ConfigError(f"the data here are not those of {source}: bring the same data, or begin anew")
    run = Run(replace(setup, data=data), seed, root)
    if run.directory.name != name:
        raise ConfigError(f"{source} is of another release or another version of your own code: begin anew here")
    return run


def do(run: Run) -> Result:
    """Do a run, or take it as it is where it is finished; others of the list may go on beside it. Raises ConfigError."""
    run.root.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(locks.locked(run.root / LOCK.format(run.directory.name), create=True))
        except BlockingIOError:
            raise ConfigError(f"this run is at work in '{run.directory}': wait for its end") from None
        return perform([run])[run]


def gather(places: Sequence[Path], directory: Path) -> int:
    """Copy the finished runs of other directories of a comparison into `directory`; return how many were new.

    What is finished there stays as it is. Raises ConfigError for a place without finished runs.
    """
    new = 0
    for place in places:
        found = [run for run in sorted(place.glob(f"*/{FINISHED}")) if _RUN_DIRECTORY.fullmatch(run.parent.name)]
        if not found:
            raise ConfigError(f"`--merge` must be a directory of a comparison with finished runs, got '{place}'")
        for run in (one.parent for one in found):
            new += _copy(run, directory / run.name)
    return new


def _copy(run: Path, target: Path) -> bool:
    if (target / FINISHED).is_file():
        return False
    partial = target.with_name(f".{target.name}.partial")
    for half_done in (partial, target):
        shutil.rmtree(half_done, ignore_errors=True)
    shutil.copytree(run, partial)
    partial.rename(target)
    return True
