"""Scores of a checkpoint on foreign episodes: how often a user would be told a wrong class.

    quickbloom.score("runs/r", "episodes.npz", together=True).alone

Three numbers that are often confused: each query by itself, as a device predicts; all queries of an episode together, where
batch norm takes their statistics ("transductive"); and prototypes that all queries together have moved (`protonet.refine`).
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quickbloom.client_app.offline.episodes import ForeignEpisode, inputs_of, read_episodes
from quickbloom.client_app.offline.files import fits_together
from quickbloom.client_app.offline.starting_point import Say, StartingPoint
from quickbloom.common.algorithms import Algorithm
from quickbloom.common.errors import ConfigError, DataError
from quickbloom.common.formatting import counted
from quickbloom.common.maths.batch import Batch
from quickbloom.common.maths.intervals import half_width
from quickbloom.common.maths.learner import hits
from quickbloom.common.maths.params import Params
from quickbloom.common.metric import ACCURACY
from quickbloom.common.personal.cross_validation import ends_of_path


@dataclass(frozen=True)
class EpisodeScores:
    """Errors of a checkpoint, each the share of an episode's queries that got a wrong class, in 0..1, episode by episode.

    `alone`: each query by itself; `together`: all queries of the episode at once; `refined`: after they moved the prototypes
    `refinements` times; the last two are None unless they were asked for. `queries`: of all episodes; `steps` of adaptation
    with the rate `lr`.
    """

    round: int
    queries: int
    steps: int
    lr: float
    refinements: int
    alone: list[float]
    together: list[float] | None = None
    refined: list[float] | None = None

    @property
    def error(self) -> float:
        """The mean over the episodes of the error with each query alone."""
        return float(np.mean(self.alone))

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers: of every kind the mean, the half-width of its 95 % interval over episodes, and each episode."""
        kinds = {name: None if each is None else _summary(each) for name, each in self._kinds().items()}
        facts = {name: value for name, value in asdict(self).items() if name not in kinds}
        return {**facts, "episodes": len(self.alone), "error": kinds}

    def lines(self) -> Iterator[str]:
        """Yield a sentence for a person on every error that is known."""
        number = f"{counted(len(self.alone), 'episode')}, {counted(self.queries, 'example')}"
        said = {"alone": "each query alone", "together": "all queries of an episode together"}
        said["refined"] = f"the same, and prototypes moved by them {counted(self.refinements, 'time')}"
        for name, each in self._kinds().items():
            if each is not None:
                found = _summary(each)
                yield f"error {ACCURACY.score(found['mean'], found['ci95'] or math.nan)}: {said[name]} ({number})"

    def _kinds(self) -> dict[str, list[float] | None]:
        return {"alone": self.alone, "together": self.together, "refined": self.refined}


def _summary(each: Sequence[float]) -> dict[str, Any]:
    half = float(half_width(np.array(each))) if len(each) > 1 else math.nan
    return {"mean": float(np.mean(each)), "ci95": half if math.isfinite(half) else None, "each": list(each)}


def score(
    checkpoint_path: str | Path,
    episodes: Any,
    together: bool = False,
    refine: int = 0,
    steps: int | None = None,
    trust: Collection[str] = (),
    say: Say = lambda sentence: None,
) -> EpisodeScores:
    """Score a checkpoint on foreign episodes: it adapts to the support of each, and predicts its queries.

    `checkpoint_path`: a checkpoint, a run directory, or a node's `state-dir`, of any data set with classes. `episodes`: see
    `read_episodes`. `together`: also with all queries of an episode at once, where the model looks at its batch. `refine`: also
    with prototypes that the queries move so many times, for `protonet`. `steps`: of adaptation; None: as the checkpoint says.
    With `protonet` and `ridge` an episode may have any number of classes, else at most as many as the model has outputs.
    `trust`, `say`: see `adapt`. Raises DataError or ConfigError.
    """
    if refine < 0 or (steps is not None and steps < 0):
        raise ConfigError(f"`refine` and `steps` must be 0 or more, got {refine} and {steps}")
    start = StartingPoint.read(checkpoint_path, trust, say)
    what = f"the checkpoint '{start.found.path}'"
    if start.spec.kind != "classification":
        raise DataError(f"{what} was trained on numbers, and errors are shares of wrong classes: name a run with classes")
    table = start.config.table(start.config.algorithm)
    if refine and not hasattr(table, "refine"):
        raise ConfigError(f"`--refine` moves prototypes, which `{start.config.algorithm}` has not: leave it out")
    # A path that refines would not be that of a query alone.
    plain = start.with_table(table.model_copy(update={"refine": False})) if hasattr(table, "refine") else start
    refining = start.with_table(table.model_copy(update={"refine": True})) if refine else None
    given, lr = read_episodes(episodes), start.origin().lr
    found = start.origin().steps if steps is None else steps
    errors: dict[str, list[float]] = {"alone": [], "together": [], "refined": []}
    with fits_together(what):
        for one in given:
            data = _Data.of(one, plain)
            errors["alone"].append(data.error(plain, lr, found, transductive=False))
            if together:
                errors["together"].append(data.error(plain, lr, found, transductive=True))
            if refining:
                errors["refined"].append(data.error(refining, lr, 1 + refine, transductive=True))
    return EpisodeScores(
        int(start.found.facts["round"]),
        sum(len(one.query_y) for one in given),
        found,
        lr,
        refine,
        errors["alone"],
        errors["together"] if together else None,
        errors["refined"] if refine else None,
    )


@dataclass(frozen=True)
class _Data:
    """An episode as a model reads it. `classes`: the labels by position, if the model is to know others than in training."""

    classes: tuple[str, ...]
    support: Batch
    x: Tensor
    y: Tensor

    @classmethod
    def of(cls, given: ForeignEpisode, start: StartingPoint) -> "_Data":
        classes = start.classes_for(given.labels, given.name)
        place = {label: at for at, label in enumerate(classes)}
        support_x, query_x = (inputs_of(x, start.config, start.spec, given.name) for x in (given.support_x, given.query_x))
        support_y, query_y = (torch.tensor([place[label] for label in y]) for y in (given.support_y, given.query_y))
        return cls(tuple(classes), Batch.of(support_x, support_y), query_x, query_y)

    def error(self, start: StartingPoint, lr: float, steps: int, *, transductive: bool) -> float:
        """Return the share of wrong classes, with each query alone unless `transductive`."""
        algorithm, meta = start.model_for(self.classes)
        algorithm.learner.transductive = transductive
        with torch.no_grad():
            _, personal = ends_of_path(algorithm, meta, None, self.support, lr, steps)
            outputs = _outputs(algorithm, personal, self.x, together=transductive)
        return int((hits(outputs, self.y) == 0).sum()) / len(self.y)


def _outputs(algorithm: Algorithm, personal: Params, x: Tensor, *, together: bool) -> Tensor:
    groups = [x] if together else torch.split(x, 1)
    return torch.cat([algorithm.predict(personal, group.to(algorithm.learner.device)).cpu() for group in groups])
