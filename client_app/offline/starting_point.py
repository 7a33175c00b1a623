"""A checkpoint to adapt, or to compare a personal model with."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from quickbloom.client_app.offline.files import fits_together
from quickbloom.client_app.personal_models import META
from quickbloom.common.algorithms import ALGORITHMS, Algorithm
from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.datasets.base import DataSpec
from quickbloom.common.datasets.own import Own, OwnOptions, task_of_file
from quickbloom.common.datasets.own.columns import Schema
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.errors import DataError
from quickbloom.common.maths.params import Params, mismatch
from quickbloom.common.options import Options
from quickbloom.common.personal import checkpoint, facts
from quickbloom.common.personal import model as personal_model
from quickbloom.common.personal import trust as trusted
from quickbloom.common.personal.carried import place_of
from quickbloom.common.personal.model import Origin

Say = Callable[[str], None]


@dataclass(frozen=True)
class StartingPoint:
    """What a checkpoint holds, with settings that are validated. `config`: resolved; `spec`: the form of its data.

    `trust`: user code, as "module:factory", that may be imported if the checkpoint names it.
    """

    found: checkpoint.Checkpoint
    config: RunConfig
    spec: DataSpec
    trust: frozenset[str] = frozenset()
    _made: dict[tuple[str, ...], tuple[Algorithm, Params]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def load(cls, path: str | Path, trust: Collection[str], say: Say) -> "StartingPoint":
        """Read a checkpoint of one's own data, as `read` does. Raises DataError or ConfigError."""
        start = cls.read(path, trust, say)
        if start.config.dataset != "own":
            raise DataError(
                f"the checkpoint was trained on the data set `{start.config.dataset}`, and no file fits it: train with --data"
            )
        return start

    @classmethod
    def read(cls, path: str | Path, trust: Collection[str], say: Say) -> "StartingPoint":
        """Read a checkpoint, the newest of a run directory, or that of a node. Raises DataError or ConfigError."""
        place = Path(path).expanduser()
        found = checkpoint.load(place / META if (place / META).is_file() else place, say)
        what = f"the checkpoint '{found.path}'"
        facts.check(found.facts, facts.CheckpointFacts, what)
        settings = trusted.of_a_model(found.facts["config"], trust, what)
        config, spec = parse_run_config(settings).resolved(), personal_model.spec_of(found.facts)
        return cls(found, config, spec, frozenset(trust))

    def with_table(self, table: Options) -> "StartingPoint":
        """Return the same with other settings of its algorithm."""
        return replace(self, config=self.config.with_table(self.config.algorithm, table), _made={})

    def own(self, data: str, task: str, target: str, time: str = "", encoder: str = "") -> Own:
        """Return the tasks of a file, read as in training but for the names of its columns. Raises DataError.

        Classes that training never saw follow the others, if the algorithm takes them.
        """
        options = self.config.table("own").model_copy(update={"path": data, "leave_out": ""})
        assert isinstance(options, OwnOptions)
        if not encoder and options.encoder:
            encoder = place_of(self.found.encoder, options.encoder, self.trust, f"the checkpoint '{self.found.path}'")
        # As on a device that takes part, a named column must exist.
        named = {"task_column": task, "target_column": target, "time_column": time, "encoder": encoder}
        named["task_name"] = "" if task else task_of_file(data)
        given = {key: name for key, name in named.items() if name or (task and key == "task_name")}
        with fits_together(f"the checkpoint '{self.found.path}'"):
            own = Own.with_new_classes(options.model_copy(update=given), self.spec.schema, whole=True)
        if own.spec.input_shape != self.spec.input_shape:
            raise DataError(
                f"the data '{data}' have inputs of shape {own.spec.input_shape}, the checkpoint needs {self.spec.input_shape}"
            )
        if (new := self.new_classes(own)) and not self._algorithm.takes_new_classes:
            names = [f"`{name}`" for name, one in ALGORITHMS.items() if one.takes_new_classes]
            able = " and ".join([", ".join(names[:-1]), names[-1]])
            raise DataError(
                f"the data '{data}' hold the class '{new[0]}', which training never saw ({', '.join(self.classes)}): mend it, "
                f"or adapt a run of {able}, which learn new classes from your rows, where `{self.config.algorithm}` cannot",
                new[0],
            )
        return own

    @cached_property
    def classes(self) -> list[str]:
        """The classes of the training, by position; [] for numbers."""
        return Schema.from_json(self.spec.schema).classes

    def new_classes(self, own: Own) -> list[str]:
        """Return the classes of a file that training never saw."""
        return own.classes[len(self.classes) :]

    def own_of(self, own: Own, task_id: str) -> Own:
        """Return the data with the classes that a model of this task is to know. Raises DataError for a single new one.

        These are the classes of the training and the new ones of the task's rows, or the new ones alone if its rows have no
        other.
        """
        if not self.new_classes(own):
            return own
        held = own.classes_of(task_id)
        new = [label for label in held if label not in self.classes]
        if len(new) == len(held) == 1:
            raise DataError(f"the rows of the task '{task_id}' must have two classes or more, got '{new[0]}' alone", new[0])
        return own.of_classes(new if len(new) == len(held) else [*self.classes, *new])

    def classes_for(self, labels: Sequence[str], where: str) -> list[str]:
        """Return the classes by position of a model that is to know `labels`: those of the training if they are among them.

        Raises DataError, which says `where` the labels are from, if the model cannot know them.
        """
        if self.spec.schema and set(labels) <= set(self.classes):
            return self.classes
        if not self._algorithm.takes_new_classes:
            if self.spec.schema:
                raise DataError(
                    f"{where}: labels must be classes of the training ({', '.join(self.classes)}) for "
                    f"`{self.config.algorithm}`, got {', '.join(labels)}"
                )
            if len(labels) > self.spec.outputs:
                raise DataError(
                    f"{where}: a model of `{self.config.algorithm}` must have an output for each class, and this one has "
                    f"{self.spec.outputs} for {len(labels)}"
                )
        return list(labels)

    def model_for(self, classes: Sequence[str]) -> tuple[Algorithm, Params]:
        """Return the algorithm on a model with these classes, and its meta-parameters. Raises DataError or ConfigError."""
        key = tuple(classes) if self.spec.schema else (str(len(classes)),)
        if key not in self._made:
            self._made[key] = self._made_for(classes)
        return self._made[key]

    def _made_for(self, classes: Sequence[str]) -> tuple[Algorithm, Params]:
        trained, meta = self._trained, self.found.meta
        if not self.spec.schema:
            if len(classes) == self.spec.outputs or not self._algorithm.takes_new_classes:
                return trained, meta
            algorithm = build_algorithm(self.config, replace(self.spec, outputs=len(classes)))
            return algorithm, algorithm.with_classes(meta, [None] * len(classes))
        if list(classes) == self.classes:
            return trained, meta
        places = {label: place for place, label in enumerate(self.classes)}
        schema = replace(Schema.from_json(self.spec.schema), classes=list(classes)).to_json()
        algorithm = build_algorithm(self.config, replace(self.spec, outputs=len(classes), schema=schema))
        return algorithm, algorithm.with_classes(meta, [places.get(label) for label in classes])

    @property
    def _algorithm(self) -> type[Algorithm]:
        return ALGORITHMS[self.config.algorithm]

    @cached_property
    def _trained(self) -> Algorithm:
        """The algorithm on a model that the meta-parameters fit. Raises DataError or ConfigError."""
        facts.check_size(self.config, self.spec, self.found.tensors, f"the checkpoint '{self.found.path}'")
        algorithm = build_algorithm(self.config, self.spec)
        facts.check_constants(self.found.facts, algorithm.learner.digest, f"the checkpoint '{self.found.path}'")
        if reason := mismatch(self.found.meta, algorithm.init()):
            raise DataError(f"the checkpoint '{self.found.path}' does not fit its own settings: {reason}")
        return algorithm

    def origin(self) -> Origin:
        """Return what a card says of the checkpoint, with the rate and the steps to adapt with."""
        held = self.found.facts
        chosen = held.get("adapt") or {"lr": self._trained.options.inner_lr, "steps": self.config.first_steps}
        run, lineage = str(held.get("run", self.found.path)), str(held.get("lineage", ""))
        return Origin(int(held["round"]), lineage, run, float(chosen["lr"]), int(chosen["steps"]))
