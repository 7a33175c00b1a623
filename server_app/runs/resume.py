"""Continues an interrupted run: its settings, model, counts and history.

`resume-from` names a run directory, which is continued in place, or a checkpoint file, from which a
new directory continues. Settings that are not given are the checkpoint's. A given setting may
differ only if it does not determine what is learned.
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from logging import INFO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quickbloom.common.config.privacy import LEAST_CLIP, MOST_CLIP
from quickbloom.common.config.run import RunConfig, Scalar, parse_run_config
from quickbloom.common.datasets.own import Own
from quickbloom.common.errors import ConfigError, DataError, as_told
from quickbloom.common.flower.names import log
from quickbloom.common.maths.params import mismatch
from quickbloom.common.personal import facts, trust
from quickbloom.common.personal.model import spec_of
from quickbloom.server_app.events.channel import Warn, warn_in_log
from quickbloom.server_app.events.file import events_until
from quickbloom.server_app.events.kinds import Event
from quickbloom.server_app.federation.outer import OuterOptimizer
from quickbloom.server_app.federation.scores import Scores
from quickbloom.server_app.federation.splits import Before
from quickbloom.server_app.federation.strategy import MetaStrategy
from quickbloom.server_app.runs.checkpoints import ONLY_MODEL, Checkpoint, OnDamage, load
from quickbloom.server_app.runs.directory import RunDirectory, history_until

# Settings that do not determine what is learned, so that a continued run may change them.
_MAY_CHANGE = {
    *("output-dir", "resume-from", "data-dir", "device", "chunk-size", "min-nodes", "node-deadline", "round-deadline"),
    *(
        "evaluate-every",
        "evaluate-users",
        "seen-users",
        "checkpoint-every",
        "adapt-lrs",
        "adapt-steps",
        "test-shots",
        "transductive",
        "min-replies",
        "on-too-few",
    ),
    *("personal", "tensorboard", "mlflow", "wandb", "compile", "secure-threshold", "baselines", "join", *trust.PLACES),
}


def with_settings_of(checkpoint: Checkpoint, given: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return all settings of the run to continue: the checkpoint's, except for those given. Raises ConfigError.

    Settings of it that name code or places must be given, see `common.personal.trust`.
    """
    before = _settings(checkpoint)
    kept = trust.of_a_run(before, given)
    # In place if `resume-from` is a directory; otherwise the setting of the run before would override a file's new directory.
    kept["output-dir"] = str(given["resume-from"]) if Path(str(given["resume-from"])).is_dir() else ""
    settings = {**kept, **given}
    if settings["metric"] == "auto":
        settings["metric"] = before["metric"]
    _check_same(before, parse_run_config(settings).resolved())
    return settings


def open_checkpoint(config: RunConfig, on_damage: OnDamage = warn_in_log) -> Checkpoint:
    """Return the checkpoint that `resume-from` names. Raises ConfigError if the run is finished, or has other settings."""
    path = Path(config.resume_from)
    if (path / "summary.json").exists() and goes_on_in_place(config):
        raise ConfigError(f"`resume-from` names a run that is finished: its result is in '{path / 'summary.json'}'")
    checkpoint = load_checked(path, on_damage)
    facts.check_size(config.resolved(), spec_of(checkpoint.facts), checkpoint.tensors, f"the checkpoint '{checkpoint.path}'")
    before = _settings(checkpoint)
    _check_same(before, config if config.metric != "auto" else config.model_copy(update={"metric": before["metric"]}))
    done = int(checkpoint.facts["round"])
    if done >= config.rounds and not goes_on_in_place(config):
        raise ConfigError(f"`resume-from` names a run that is finished: its checkpoint is of round {done} of {config.rounds}")
    return checkpoint


def load_checked(path: Path, on_damage: OnDamage = warn_in_log) -> Checkpoint:
    """Load a checkpoint whose facts have the form of a run's. Raises DataError."""
    checkpoint = load(path, on_damage)
    if ONLY_MODEL in checkpoint.facts:
        raise DataError(
            f"the file '{checkpoint.path}' is a model without its optimizer: name its run directory, or one of its checkpoints "
            "round-NNNNNN"
        )
    facts.check(checkpoint.facts, facts.RunFacts, f"the checkpoint '{checkpoint.path}'")
    return checkpoint


@dataclass(frozen=True)
class Origin:
    """The origin of a run.

    `resumed`: how often it was resumed. `lineage`: names the training and all its continuations.
    `branch`: names the part of it in one run directory.
    """

    resumed: int
    lineage: str
    branch: str


def origin_of(checkpoint: Checkpoint | None, config: RunConfig) -> Origin:
    """Return the origin of a run that starts anew, or continues from `checkpoint`."""
    fresh = uuid.uuid4().hex
    if checkpoint is None:
        return Origin(0, fresh, fresh)
    lineage = str(checkpoint.facts["lineage"])
    branch = str(checkpoint.facts.get("branch", lineage)) if goes_on_in_place(config) else fresh
    return Origin(checkpoint.facts["so-far"]["resumed"] + 1, lineage, branch)


def goes_on_in_place(config: RunConfig) -> bool:
    """Return whether the run continues in the directory that `resume-from` names."""
    path = Path(config.resume_from)
    return bool(config.resume_from) and path.is_dir() and Path(config.output_dir or path).resolve() == path.resolve()


def events_before(checkpoint: Checkpoint, source: Path) -> list[Event]:
    """Return the events of the run up to the checkpoint's round. `source`: `resume-from`."""
    return events_until(run_of(source), int(checkpoint.facts["round"]))


def cut_history(checkpoint: Checkpoint, source: Path, directory: RunDirectory, warn: Warn = warn_in_log) -> None:
    """Give `directory` the rounds up to the checkpoint's, so that it holds every round once. `source`: `resume-from`."""
    records = history_until(run_of(source), int(checkpoint.facts["round"]), warn)
    # None if the run was cut off between the line of its first round and the checkpoint after it.
    if records or (directory.path / "history.jsonl").exists():
        directory.write_rounds(records)


def run_of(source: Path) -> Path:
    """Return the run directory of `resume-from`, which may name a checkpoint file in it."""
    return source if source.is_dir() else source.parent.parent


def tasks_before(checkpoint: Checkpoint) -> Before:
    """Return the tasks of the run to continue. Checkpoints of older releases do not name those that were in no split."""
    said = checkpoint.facts
    unused = None if said.get("unused") is None else frozenset(said["unused"])
    return Before(said["splits"], frozenset(said.get("joined", [])), unused)


def restore_model(checkpoint: Checkpoint, outer: OuterOptimizer) -> None:
    """Restore `outer` to the checkpoint. Raises ConfigError if it does not fit."""
    parts = ("meta/", "outer/", "server/", "centre/", "root/")
    tensors = {name: value for name, value in checkpoint.tensors.items() if name.startswith(parts)}
    # A finished training may have an earlier model in the place of the last one.
    tensors |= {f"meta/{k.removeprefix('last/')}": v for k, v in checkpoint.tensors.items() if k.startswith("last/")}
    if reason := mismatch({k.removeprefix("meta/"): v for k, v in tensors.items() if k.startswith("meta/")}, outer.meta):
        raise ConfigError(f"`resume-from` names a checkpoint of another model: {reason}")
    beside = {name.removeprefix("server/"): value for name, value in tensors.items() if name.startswith("server/")}
    if reason := mismatch(beside, outer.beside):
        raise ConfigError(f"`resume-from` names a checkpoint of another server's state: {reason}")
    centre = {name.removeprefix("centre/"): value for name, value in tensors.items() if name.startswith("centre/")}
    if centre and (reason := mismatch(centre, outer.meta)):
        raise ConfigError(f"`resume-from` names a checkpoint of another centre of `centered-clip`: {reason}")
    root = {name.removeprefix("root/"): value for name, value in tensors.items() if name.startswith("root/")}
    if root and (reason := mismatch(root, outer.meta)):
        raise ConfigError(f"`resume-from` names a checkpoint of another root set's contribution: {reason}")
    if strange := [name for name in tensors if not _of_the_optimizer(name, tensors[name], outer.meta)]:
        raise ConfigError(f"`resume-from` names a checkpoint with a tensor that no optimizer has: {as_told(strange[0], 100)}")
    outer.restore(tensors)
    log(INFO, "Going on after round %s", checkpoint.facts["round"])


def _of_the_optimizer(name: str, value: Tensor, meta: Mapping[str, Tensor]) -> bool:
    """Return whether it may be a meta-parameter or an optimizer's state of one: as many numbers, or a single one."""
    part, _, rest = name.partition("/")
    if part in ("meta", "server", "centre", "root"):
        return True
    of = meta.get(rest.partition("/")[2])
    return of is not None and value.shape in (of.shape, torch.Size([]))


def counts(strategy: MetaStrategy, seconds: Mapping[str, float], resumed: int) -> dict[str, Any]:
    """Return the facts of a checkpoint that grow: counts of the run so far, and its tasks.

    `seconds`: "total" and "cpu", without pauses.
    """
    population = strategy.population
    asynchronous = {"asynchronous": strategy.asynchronous.state()} if strategy.asynchronous else {}
    return {
        "so-far": {
            **asynchronous,
            "bytes": dict(strategy.bytes),
            "failures": strategy.failures,
            "late": strategy.late,
            "best": strategy.evaluation.best,
            "seconds": dict(seconds),
            "resumed": resumed,
            "clip": strategy.privacy.clip if strategy.privacy else 0.0,
            "noisy-steps": strategy.privacy.released if strategy.privacy else 0,
            **({"noise-levels": strategy.privacy.epochs.levels} if strategy.privacy and strategy.privacy.epochs else {}),
            "joined": strategy.joining.count,
        },
        "splits": population.splits,
        "unused": population.unused,
        "joined": sorted(population.joined),
    }


def noisy_steps(checkpoint: Checkpoint) -> int:
    """Return the number of noisy steps behind this checkpoint's model; its rounds, if it does not say."""
    steps = checkpoint.facts["so-far"].get("noisy-steps")
    return steps if isinstance(steps, int) else int(checkpoint.facts["round"])


def noise_levels(checkpoint: Checkpoint) -> int:
    """Return the levels of the trees of noise behind this checkpoint's model; if it does not say, its steps, no fewer."""
    levels = checkpoint.facts["so-far"].get("noise-levels")
    return levels if isinstance(levels, int) else noisy_steps(checkpoint)


def restore_counts(checkpoint: Checkpoint, strategy: MetaStrategy) -> None:
    """Set the counts of `strategy` to those of the checkpoint."""
    so_far = checkpoint.facts["so-far"]
    strategy.bytes = dict(so_far["bytes"])
    strategy.failures = int(so_far["failures"])
    strategy.late = int(so_far["late"])
    strategy.joining.count = int(so_far.get("joined", 0))
    strategy.evaluation.best = so_far["best"]
    if strategy.asynchronous:
        strategy.asynchronous.restore(so_far.get("asynchronous"))
    if strategy.privacy and strategy.config.privacy.clip_quantile:
        clip = so_far["clip"]
        if not isinstance(clip, float) or not LEAST_CLIP <= clip <= MOST_CLIP:
            raise ConfigError(f"`resume-from` names a checkpoint whose clipping norm is none: {clip!r}")
        strategy.privacy.clip = clip
    strategy.evaluation.take_over(scores_in(checkpoint))
    kept = checkpoint.facts.get("kept")
    if kept and checkpoint.facts["round"] == strategy.config.rounds:
        if reason := mismatch(checkpoint.meta, strategy.outer.leaves):
            raise ConfigError(f"`resume-from` names a checkpoint of another model: {reason}")
        strategy.keep(checkpoint.meta, int(kept["round"]), kept["last"])


def model_tensors(strategy: MetaStrategy) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the (tensors, facts) of a checkpoint for the model and its optimizer, as the module `checkpoints` lists them."""
    tensors = strategy.outer.state()
    if not strategy.decided:
        return tensors, {}
    number = strategy.evaluation.of_round
    if number != strategy.config.rounds:  # devices adapt this one, and a run goes on from the last one
        tensors = {f"last/{k.removeprefix('meta/')}" if k.startswith("meta/") else k: v for k, v in tensors.items()}
        tensors |= {f"meta/{name}": value for name, value in strategy.meta.items()}
    return tensors, {"kept": {"round": number, "last": strategy.last_score}}


def score_tensors(scores: Scores | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the scores of validation tasks as (tensors, facts) of a checkpoint. A finished training needs them to end."""
    if scores is None:
        return {}, {}
    tensors = {"validation/losses": torch.from_numpy(scores.losses), "validation/metrics": torch.from_numpy(scores.metrics)}
    return tensors, {"validation": {"tasks": scores.task_ids, "lrs": scores.lrs}}


def scores_in(checkpoint: Checkpoint) -> Scores | None:
    """Return the scores of validation tasks in a checkpoint; None if there are none."""
    if not (said := checkpoint.facts.get("validation")):
        return None
    tensors = [checkpoint.tensors.get(f"validation/{part}") for part in ("losses", "metrics")]
    shape = (len(said["tasks"]), len(said["lrs"]))
    if any(value is None or value.ndim != 3 or value.shape[:2] != shape for value in tensors):
        return None  # they are computed again
    losses, metrics = (value.numpy() for value in tensors if value is not None)
    if losses.shape != metrics.shape:
        return None
    return Scores(list(said["tasks"]), list(said["lrs"]), losses, metrics)


def _settings(checkpoint: Checkpoint) -> dict[str, Scalar]:
    """Return its settings. Those newer than the checkpoint have their defaults, which change nothing.

    Except for `split`, which was always exact, `keep`, which was always the last, `transductive`, which every score was, and
    `own.scale`, which was each task's own.
    """
    found = checkpoint.facts["config"]
    scale = {"own.scale": "task"} if found.get("dataset") == Own.name else {}
    return parse_run_config({"split": "exact", "keep": "last", "transductive": True, **scale, **found}).resolved().flat()


def metric_of(checkpoint: Checkpoint) -> str:
    """Return the setting `metric` of the run to go on from, which had chosen one if the setting was "auto"."""
    return str(_settings(checkpoint)["metric"])


def _check_same(before: Mapping[str, Scalar], config: RunConfig) -> None:
    now = config.flat()
    for key in sorted(before.keys() | now.keys()):
        if key not in _MAY_CHANGE and before.get(key) != now.get(key):
            raise ConfigError(f"`{key}` must be {before.get(key)!r} as in the run to go on from, got {now.get(key)!r}")
