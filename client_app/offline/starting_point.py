"""A checkpoint to adapt, or to compare a personal model with."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from quickbloom.client_app.offline.files import fits_together
from quickbloom.client_app.personal_models import META
from quickbloom.common.algorithms import Algorithm
from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.datasets.base import DataSpec
from quickbloom.common.datasets.own import Own, OwnOptions, task_of_file
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.errors import DataError
from quickbloom.common.maths.params import mismatch
from quickbloom.common.personal import checkpoint, facts
from quickbloom.common.personal import model as personal_model
from quickbloom.common.personal import trust as trusted
from quickbloom.common.personal.model import Origin

Say = Callable[[str], None]


@dataclass(frozen=True)
class StartingPoint:
    """What a checkpoint holds, with settings that are validated. `config`: resolved; `spec`: the form of its data."""

    found: checkpoint.Checkpoint
    config: RunConfig
    spec: DataSpec

    @classmethod
    def load(cls, path: str | Path, trust: Collection[str], say: Say) -> "StartingPoint":
        """Read a checkpoint, the newest of a run directory, or that of a node. Raises DataError or ConfigError."""
        place = Path(path).expanduser()
        found = checkpoint.load(place / META if (place / META).is_file() else place, say)
        what = f"the checkpoint '{found.path}'"
        facts.check(found.facts, facts.CheckpointFacts, what)
        settings = trusted.of_a_model(found.facts["config"], trust, what)
        config, spec = parse_run_config(settings).resolved(), personal_model.spec_of(found.facts)
        if config.dataset != "own":
            raise DataError(
                f"the checkpoint was trained on the data set `{config.dataset}`, and no file fits it: train with --data"
            )
        return cls(found, config, spec)

    def own(self, data: str, task: str, target: str) -> Own:
        """Return the tasks of a file, read as in training but for the names of its columns. Raises DataError."""
        options = self.config.table("own").model_copy(update={"path": data, "leave_out": ""})
        assert isinstance(options, OwnOptions)
        # As on a device that takes part, a named column must exist.
        named = {"task_column": task, "target_column": target, "task_name": "" if task else task_of_file(data)}
        given = {key: name for key, name in named.items() if name or (task and key == "task_name")}
        with fits_together(f"the checkpoint '{self.found.path}'"):
            own = Own(options.model_copy(update=given), Path(), self.spec.schema, whole=True)
        if own.spec.input_shape != self.spec.input_shape:
            raise DataError(
                f"the data '{data}' have inputs of shape {own.spec.input_shape}, the checkpoint needs {self.spec.input_shape}"
            )
        return own

    def algorithm(self) -> Algorithm:
        """Return the algorithm on a model that the meta-parameters fit. Raises DataError or ConfigError."""
        facts.check_size(self.config, self.spec, self.found.tensors, f"the checkpoint '{self.found.path}'")
        algorithm = build_algorithm(self.config, self.spec)
        if reason := mismatch(self.found.meta, algorithm.init()):
            raise DataError(f"the checkpoint '{self.found.path}' does not fit its own settings: {reason}")
        return algorithm

    def origin(self, algorithm: Algorithm) -> Origin:
        """Return what a card says of the checkpoint, with the rate and the steps to adapt with."""
        held = self.found.facts
        chosen = held.get("adapt") or {"lr": algorithm.options.inner_lr, "steps": self.config.adapt_steps}
        run, lineage = str(held.get("run", self.found.path)), str(held.get("lineage", ""))
        return Origin(int(held["round"]), lineage, run, float(chosen["lr"]), int(chosen["steps"]))
