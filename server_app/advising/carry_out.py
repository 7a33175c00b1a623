"""From options to advice, the same for the command and from Python."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quickbloom.common.config.run import Scalar, parse_run_config
from quickbloom.common.datasets import load_dataset
from quickbloom.common.datasets.base import left_out_in_words, resolve_data_dir
from quickbloom.common.errors import ConfigError
from quickbloom.common.formatting import data_name
from quickbloom.common.metric import named
from quickbloom.server_app.advising.advice import advise
from quickbloom.server_app.advising.candidates import Candidate, candidates_for
from quickbloom.server_app.advising.trials import FEW_USERS, Say, halve
from quickbloom.server_app.launch.prepare import own_data
from quickbloom.server_app.launch.settings import parse_assignments


def advise_on(
    data: str,
    task: str | None,
    target: str | None,
    time: str | None,
    directory: Path,
    *,
    metric: str | None = None,
    rounds: int | None = None,
    seed: int | None = None,
    assignments: Sequence[str] = (),
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Return the content of advice.json for a file; the runs lie in `directory`. Raises ConfigError, DataError or RunError.

    `assignments`: texts "key=value" that all runs share.
    """
    settings: dict[str, Scalar] = own_data(data, task, target, None, time)
    settings |= parse_assignments(list(assignments), "ridge")
    given = {"metric": metric, "rounds": rounds, "seed": seed}
    settings |= {key: value for key, value in given.items() if value is not None}
    config = parse_run_config(settings)
    own = load_dataset(config.dataset, config.table(config.dataset), resolve_data_dir(config.data_dir))
    for remark in [*([left_out_in_words(own.left_out)] if own.left_out else []), *own.remarks]:
        say(f"Remark: {remark}")
    tasks = [one.task_id for one in own.tasks()]
    if len(tasks) < 2:
        raise ConfigError(
            f"`quickbloom advise` needs at least two users, the data have {len(tasks)}: name their column with `--task`"
        )
    if own.spec.kind == "regression":
        settings = {"metric": "rmse", **settings}  # in the unit of the target, which people can judge
    trials = halve(settings, candidates_for(own.spec), tasks, directory / "runs", say)
    found = advise(trials, few=len(tasks) < FEW_USERS)
    words = _command(data, task, target, time, trials[0].candidate, trials[0].rounds, named(found["metric"]).name, assignments)
    return {**found, "data": data_name(config.flat()), "command": words if found["kind"] == "model" else ""}


def _command(
    data: str,
    task: str | None,
    target: str | None,
    time: str | None,
    candidate: Candidate,
    rounds: int,
    metric: str,
    assignments: Sequence[str],
) -> str:
    words = ["quickbloom", "run", "--data", data]
    for name, value in (("--task", task), ("--target", target), ("--time", time)):
        words += [name, value] if value else []
    words += [*candidate.words, "--rounds", str(rounds), "--set", f"metric={metric}"]
    for one in assignments:
        words += ["--set", one]
    return shlex.join(words)
