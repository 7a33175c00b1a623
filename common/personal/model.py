"""A personal model: the result of adapting to one task, in a safetensors file with a card that describes its use.

The card is JSON inside the file, so that one rename replaces both. It names the model's origin
(run, round, rate, steps), its scores before and after adaptation, and everything that prediction needs:
algorithm, model, classes, and how raw columns become inputs. The scores are those of the task's own test
part, or of a cross-validation if the model adapted to all rows.
`protonet` stores prototypes with the embedding; all other algorithms store a whole model.
"""

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quickbloom import __version__
from quickbloom.common.algorithms import Algorithm
from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.datasets import Dataset
from quickbloom.common.datasets.base import DataSpec
from quickbloom.common.datasets.own import Own, OwnOptions
from quickbloom.common.datasets.own.columns import Schema
from quickbloom.common.datasets.own.preparation import Preparation
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.errors import DataError, QuickbloomError, in_one_line
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.maths.params import Params, all_finite, mismatch
from quickbloom.common.metric import Metric
from quickbloom.common.models import MODELS
from quickbloom.common.personal import checkpoint, facts
from quickbloom.common.personal import own_rows as linear
from quickbloom.common.personal import trust as trusted
from quickbloom.common.personal.checkpoint import ENCODER
from quickbloom.common.personal.cross_validation import (
    AFTER,
    BEFORE,
    CONSTANT,
    FOLDS,
    OWN,
    SCORED,
    Scores,
    cross_validate,
    ends_of_path,
    known,
    on_device,
)
from quickbloom.common.personal.drift import seen
from quickbloom.common.personal.trust import PLACES
from quickbloom.common.system.whole_files import write_private

PERSONAL = "quickbloom-personal-1"
SUFFIX = ".safetensors"

_MACHINES = (
    "output-dir",
    "resume-from",
    "data-dir",
    "own.path",
    "own.leave-out",
    "device",
    "inner-dtype",
    "tensorboard",
    "mlflow",
    "wandb",
)
"""Settings that name a place, the part of the tasks that a run used, or what its machines are good at."""


@dataclass(frozen=True)
class Origin:
    """The model to adapt: its round, the training it comes from, and the rate and steps to adapt it with.

    `run`: name of the run's directory, for people.
    """

    round: int
    lineage: str
    run: str
    lr: float
    steps: int


@dataclass(frozen=True)
class Personal:
    """A personal model. `card`: see `make_card`; `encoder`: the files of the one that it carries, by their names."""

    tensors: Params
    card: Mapping[str, Any]
    encoder: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def task(self) -> str:
        return str(self.card["task"])

    @cached_property
    def schema(self) -> Schema:
        """The columns and classes of the user's own data that the model is for. Raises DataError for a model of other data."""
        return Schema.from_json(self.card["schema"])

    @property
    def classes(self) -> list[str]:
        """The classes by the position of their output; [] for numbers."""
        return self.schema.classes

    @cached_property
    def preparation(self) -> Preparation:
        """How columns become inputs."""
        return Preparation.from_json(self.card["preparation"])

    @property
    def own_options(self) -> OwnOptions:
        """How the user's own data are read, without their path."""
        found = OwnOptions.model_validate(self.card["columns"]).cleaned()
        typed = self.card["config"].get("own.tokenizer")  # a place that the user has named
        return found.model_copy(update={"tokenizer": typed}) if typed else found

    def with_encoder(self, encoder: str) -> "Personal":
        """Return the model with another place of its encoder. Raises DataError for a model without one."""
        if not self.schema.encoder:
            raise DataError(f"the personal model of '{self.task}' has no encoder: leave `--encoder` out")
        return replace(self, card={**self.card, "columns": {**self.card["columns"], "encoder": encoder}})

    @property
    def temperature(self) -> float:
        """What outputs are divided by before the softmax; 1 if it is not known, see `cross_validation.Scores.temperature`."""
        return float(self.card.get("temperature") or 1.0)

    @cached_property
    def algorithm(self) -> Algorithm:
        """The algorithm on its model, built from the card alone, which `load` has validated. Raises ConfigError."""
        return build_algorithm(parse_run_config(self.card["config"]), spec_of(self.card))

    @property
    def mixes(self) -> bool:
        """True if the prediction for a row depends on which others are predicted beside it."""
        return self.algorithm.mixes(dict(self.tensors))

    def outputs(self, x: Tensor) -> Tensor:
        """Return logits [n, classes], or values [n, outputs], for inputs [n, ...] prepared as the card describes."""
        with torch.no_grad():
            return self.algorithm.predict(dict(self.tensors), x)

    def deviations(self, x: Tensor) -> Tensor | None:
        """Return the standard deviations of the outputs [n, outputs] for such inputs; None if they are not known.

        Of a model from the task's own rows alone it is the root of its cross-validated squared error.
        """
        if deviation := self.card.get("deviation"):
            return torch.full((len(x), self.card["spec"][2]), float(deviation))
        with torch.no_grad():
            return self.algorithm.deviation(dict(self.tensors), x)


def adapt(
    algorithm: Algorithm, meta: Params, kept: Params | None, dataset: Dataset, task_id: str, config: RunConfig, origin: Origin
) -> Personal:
    """Adapt `meta` to the support part of a task, and score it before and after on the test part.

    `kept`: the task's state on its node; None if it never trained there. A data set with
    several draws uses the first. Raises DataError if the result is not finite.
    """
    data = dataset.test_draws(task_id)[0]
    first, last = ends_of_path(algorithm, meta, kept, data.support, origin.lr, origin.steps)
    with torch.no_grad():
        before, after = (float(algorithm.score(phi, on_device(data.test, algorithm))[1]) for phi in (first, last))
    personal = _finite(last, task_id)
    card = make_card(dataset, task_id, config, origin, algorithm.learner.digest)
    scores = {"before": known(before), "after": known(after)}
    card["score"] = {"name": dataset.spec.metric.name, **scores, "test": len(data.test.x)}
    return Personal(personal, card)


def adapt_to_all(
    algorithm: Algorithm,
    meta: Params,
    own: Own,
    task_id: str,
    config: RunConfig,
    origin: Origin,
    folds: int = FOLDS,
    *,
    own_rows: bool = True,
) -> Personal:
    """Adapt `meta` to all rows of a task, and score it by cross-validation in at most `folds` folds; 0: no score.

    `own`: read with `whole`. If the adapted model scores worse than the shared one, the shared one is the
    personal model. With `own_rows`, ridge or the constant on the rows of the task alone is, if it is better than
    that by more than chance, see `Scores.kept`. Raises DataError if the result is not finite, and for one row alone
    if the model needs several to compare.
    """
    support = own.test_draws(task_id)[0].support
    if algorithm.learner.mixes_examples and len(support.x) < 2:
        raise DataError(
            f"the task '{task_id}' must have two rows with a target for this model, whose batch norm compares rows, got 1"
        )
    scores = cross_validate(algorithm, meta, own, task_id, origin.lr, origin.steps, folds)
    first, last = ends_of_path(algorithm, meta, None, support, origin.lr, origin.steps)
    metric = own.spec.metric
    stays = scores is not None and is_worse(known(scores.value(BEFORE)), known(scores.value(AFTER)), metric)
    stays = stays and _tells_classes_apart(algorithm, first, on_device(support, algorithm))
    keeps = BEFORE if stays else AFTER
    if scores and own_rows and support.x.is_floating_point():  # nothing is linear in token ids
        keeps = scores.kept(metric, keeps)
    if keeps in (OWN, CONSTANT):
        config = linear.config_of(config)
        personal = linear.tensors_of(keeps, support, own.spec, config)
    else:
        personal = first if stays else last
    digest = "" if keeps in (OWN, CONSTANT) else algorithm.learner.digest
    card = make_card(own, task_id, config, origin, digest)
    card["adapted"] |= {"steps": origin.steps if keeps == AFTER else 0, "tried": origin.steps, "whole": True}
    card["score"] = {"name": metric.name, **_in_json(scores, metric), "kept": keeps, "asked": folds, "own_rows": own_rows}
    card |= {"temperature": None, "deviation": None}
    if scores and keeps in (BEFORE, AFTER):
        card["temperature"] = scores.temperature(keeps)
    elif scores and own.kind == "regression":
        card["deviation"] = math.sqrt(scores.value(keeps))
    return Personal(_finite(personal, task_id), card)


def _in_json(scores: Scores | None, metric: Metric) -> dict[str, Any]:
    if scores is None:
        return {**dict.fromkeys(SCORED), "test": 0, "folds": 0}
    values = {name: known(scores.value(name)) for name in SCORED}
    intervals = {name: scores.interval(name) for name in SCORED}
    return {**values, "interval": intervals, "best": scores.best(metric), "test": scores.rows, "folds": scores.folds}


def is_worse(before: float | None, after: float | None, metric: Metric) -> bool:
    """Return whether a model scores worse after adaptation; None: it diverged, or was not scored."""
    if before is None or after is None:
        return after is None
    return metric.is_better(before, after)


def _tells_classes_apart(algorithm: Algorithm, personal: Params, batch: Batch) -> bool:
    """Return False for a starting point that gives all classes alike, such as a head of zeros or no prototypes yet."""
    with torch.no_grad():
        outputs = algorithm.predict(personal, batch.x)
    return batch.y.dtype != torch.int64 or bool((outputs.amax(dim=1) > outputs.amin(dim=1)).any())


def _finite(params: Params, task_id: str) -> Params:
    personal = {name: value.detach().cpu().clone() for name, value in params.items()}
    if not all_finite(personal):
        raise DataError(f"the personal model of the task '{task_id}' is not finite: adapt with a lower rate")
    return personal


def make_card(dataset: Dataset, task_id: str, config: RunConfig, origin: Origin, constants: str = "") -> dict[str, Any]:
    """Return the card of a personal model, without its score. `constants`: hash of those of the model."""
    data = dataset.test_draws(task_id)[0]
    return {
        "task": task_id,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "run": {"directory": origin.run, "lineage": origin.lineage, "round": origin.round},
        "adapted": {"lr": origin.lr, "steps": origin.steps, "support": len(data.support.x)},
        "preparation": dict(dataset.preparation(task_id)),
        "columns": columns_of(dataset),
        "data": digest(data),
        "seen": seen(dataset, task_id) if isinstance(dataset, Own) else {},
        "version": __version__,
        **description(config, dataset.spec, constants),
    }


def description(config: RunConfig, spec: DataSpec, constants: str) -> dict[str, Any]:
    """Return the part of a file's facts from which its model can be built and fed again: settings and the form of the data.

    `constants`: the hash of what the model has besides what is trained, which the file does not hold.
    """
    models = MODELS if config.model == "auto" else [config.model]
    tables = ("", config.algorithm, config.dataset, *models)
    flat = {key: value for key, value in config.flat().items() if key.rpartition(".")[0] in tables}
    return {
        "config": {key: value for key, value in flat.items() if key not in (*_MACHINES, *PLACES)},
        "spec": [spec.kind, list(spec.input_shape), spec.outputs],
        "tokens": spec.tokens,
        "schema": spec.schema,
        "constants": constants,
    }


def spec_of(facts: Mapping[str, Any]) -> DataSpec:
    """Return the form of the data that a checkpoint or a card describes. Raises DataError if it describes none."""
    try:
        kind, shape, outputs = facts["spec"]
        said = facts.get("tokens", 0)
        tokens = (outputs if said else 0) if isinstance(said, bool) else int(said)  # earlier files only say whether
        return DataSpec(kind, tuple(shape), outputs, tokens, str(facts.get("schema", "")))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"the file does not describe the form of its data ({in_one_line(error)}): make it anew") from None


def columns_of(dataset: Dataset) -> dict[str, Any]:
    """Return the settings of the user's own file, such as column names; {} for any other data set."""
    if not isinstance(dataset, Own):
        return {}
    settings: dict[str, Any] = dataset.options.model_dump(by_alias=True, exclude={"path", "leave_out"})
    return settings


def digest(data: TaskData) -> str:
    """Return the SHA-256 of a task's examples and their parts, to recognise the data that a model was adapted to."""
    total = hashlib.sha256()
    for part in (data.support, data.query, data.test):
        for value in (part.x, part.y):
            total.update(f"{value.dtype} {list(value.shape)}\n".encode())
            total.update(value.contiguous().numpy().tobytes())
    return total.hexdigest()


def save(personal: Personal, path: Path) -> None:
    """Write the model to `path`, and its card as JSON beside it for people. If the first write fails, both stay as they were.

    Raises OSError or SafetensorError.
    """
    encoder = {f"{ENCODER}{name}": value for name, value in personal.encoder.items()}
    checkpoint.write(path, {**personal.tensors, **encoder}, personal.card, PERSONAL, wait=True)
    write_private(path.with_suffix(".json"), json.dumps(personal.card, indent=2) + "\n")


def load(path: Path, trust: Collection[str] = ()) -> Personal:
    """Return the personal model in `path`.

    Raises DataError, and ConfigError for user code that is not in `trust`, see
    `common.personal.trust`.
    """
    what = f"the personal model '{path}'"
    found = checkpoint.read(path, PERSONAL, "personal model")
    facts.check(found.facts, facts.CardFacts, what)
    settings = trusted.of_a_model(found.facts["config"], trust, what)
    tensors = {name: value for name, value in found.tensors.items() if not name.startswith(ENCODER)}
    personal = Personal(tensors, {**found.facts, "config": settings}, found.encoder)
    try:
        facts.check_size(parse_run_config(settings).resolved(), spec_of(found.facts), tensors, what)
        wanted = next(iter(personal.algorithm.adaptation_path(personal.algorithm.init(), no_rows(personal), 0.1, 0)))
        algorithm = personal.algorithm
        if (statistics := algorithm.learner.shapes_of_statistics()).keys() <= tensors.keys():
            wanted = {**wanted, **statistics}  # models of earlier versions have none
        facts.check_constants(found.facts, algorithm.learner.digest, what)
        reason = mismatch(*_without_rows(algorithm, personal.tensors, wanted))
        Preparation.from_json(found.facts["preparation"])
        OwnOptions.model_validate(found.facts["columns"])
    except QuickbloomError as error:
        reason = str(error)
    except Exception as error:  # a card may have been written by hand
        reason = in_one_line(error)
    if reason:
        raise DataError(reason if reason.startswith(what) else f"{what} cannot be used: {reason}")
    return personal


def _without_rows(algorithm: Algorithm, found: Params, wanted: Params) -> tuple[Params, Params]:
    """Return both without the tensors of `found` whose number of rows may be any, if their rows have the right form."""
    row, fit = (algorithm.learner.outputs,), set()
    for name in found.keys() & set(algorithm.per_step):
        if found[name].shape[1:] == (wanted[name].shape[1:] if name in wanted else row):
            fit.add(name)
    kept, expected = ({name: value for name, value in one.items() if name not in fit} for one in (found, wanted))
    return kept, expected


def no_rows(personal: Personal) -> Batch:
    """Return a batch without examples: a path of no steps only shows which tensors there are."""
    spec = personal.card["spec"]
    return Batch.of(torch.zeros(0, *spec[1]), torch.zeros(0, dtype=torch.int64))
