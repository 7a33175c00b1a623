"""From options to advice, the same for the command and from Python."""

import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quickbloom.common.config.key_value import split_assignment
from quickbloom.common.config.run import Scalar, parse_run_config
from quickbloom.common.datasets import load_dataset
from quickbloom.common.datasets.base import Dataset, left_out_in_words, resolve_data_dir
from quickbloom.common.datasets.own import Own
from quickbloom.common.errors import ConfigError, DataError
from quickbloom.common.formatting import data_name
from quickbloom.common.metric import chosen_for
from quickbloom.server_app.advising.advice import advise
from quickbloom.server_app.advising.candidates import Candidate, candidates_for
from quickbloom.server_app.advising.trials import FEW_USERS, Say, halve
from quickbloom.server_app.events.kinds import finite
from quickbloom.server_app.launch.prepare import own_data, scored_one_by_one
from quickbloom.server_app.launch.settings import parse_assignments
from quickbloom.server_app.runs.directory import RunDirectory

FILE = "advice.json"
_DECIDED = (
    "algorithm", "model", "dataset", "baselines", "validation-tasks", "test-tasks", "test-shots", "evaluate-users",
    "own.leave-out", "output-dir", "resume-from",
)  # fmt: skip
"""Settings that `quickbloom advise` gives its runs itself."""
_OPTIONS = ("metric", "rounds", "seed")
"""Settings that the command names by what they came to."""


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
    lasting: bool = True,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Return the content of advice.json for a file, and write it; the runs lie in `directory`.

    `assignments`: texts "key=value" that all runs share. `lasting`: whether the file will be there afterwards, so that a
    command can name it. Raises ConfigError, DataError or RunError.
    """
    settings: dict[str, Scalar] = own_data(data, task, target, None, time)
    settings |= _shared(assignments)
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
    settings = _with_metric(settings, own, tasks)
    few = len(tasks) < FEW_USERS
    if few and isinstance(own, Own):  # each is left out once
        tasks, unscored = scored_one_by_one(own, tasks, str(settings.get("metric", "")))
        if unscored:
            say(f"Remark: {unscored}")
    runs = _claimed(directory)
    try:
        trials = halve(settings, candidates_for(own.spec), tasks, runs, say)
    except (ConfigError, DataError):
        shutil.rmtree(runs, ignore_errors=True)  # so that the same directory will do once the mistake is mended
        raise
    found = {**advise(trials, few=few), "data": data_name(config.flat()), "command": ""}
    if found["kind"] == "model" and lasting:
        found["command"] = _command({"data": data, "task": task, "target": target, "time": time}, found, settings, assignments)
    content: dict[str, Any] = finite(found)
    RunDirectory(directory).write_json(FILE, content)
    return content


def _shared(assignments: Sequence[str]) -> dict[str, Scalar]:
    """Return the settings that all runs share. Raises ConfigError for those that are not for a user to give."""
    for key, _ in map(split_assignment, assignments):
        if key in _DECIDED:
            raise ConfigError(f"`{key}` is what `quickbloom advise` decides itself: leave it out, or use `quickbloom run`")
    settings = parse_assignments(list(assignments), "ridge")
    for key, _ in map(split_assignment, assignments):
        if key not in settings:
            raise ConfigError(
                f"`{key}` belongs to an algorithm, and `quickbloom advise` tries several: say whose, as in `ridge.{key}`"
            )
    return settings


def _with_metric(settings: dict[str, Scalar], own: Dataset, tasks: Sequence[str]) -> dict[str, Scalar]:
    """Return the settings with the metric that decides, where nobody names one and a run would not choose the same."""
    if own.spec.kind == "regression":
        return {"metric": "rmse", **settings}  # in the unit of the target, which people can judge
    if len(tasks) < FEW_USERS and settings.get("metric", "auto") == "auto" and isinstance(own, Own):
        # Folds with other users left out must not be scored by other metrics.
        return {**settings, "metric": chosen_for(own.spec.kind, own.class_counts(tasks)).name}
    return settings


def _claimed(directory: Path) -> Path:
    """Return a new folder for the runs in the directory. Raises ConfigError if there is one, or if it cannot be made."""
    runs = directory / "runs"
    try:
        runs.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError(
            f"`--output` must be a directory without advice, got '{directory}', which is in use: choose another one"
        ) from None
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"`--output` must be a directory that can be written, got '{directory}' ({reason})") from None
    return runs


def _command(
    named: Mapping[str, str | None], found: Mapping[str, Any], settings: Mapping[str, Scalar], assignments: Sequence[str]
) -> str:
    """Return what trains the model that was found. `named`: the file and its columns by option."""
    model = found["model"]
    words = ["quickbloom", "run"]
    for option, value in named.items():
        words += [f"--{option}", value] if value else []
    words += [*Candidate(model["algorithm"], model["model"]).words, "--rounds", str(model["rounds"])]
    words += ["--seed", str(settings["seed"])] if "seed" in settings else []
    others = [text for text in assignments if split_assignment(text)[0] not in _OPTIONS]
    for text in (f"metric={found['metric']}", *others):
        words += ["--set", text]
    return shlex.join(words)
