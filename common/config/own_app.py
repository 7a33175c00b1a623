"""Settings of somebody's own Flower app, whose ClientApp trains with code of its own (`client_app.own_trainer`).

The app's `[tool.flwr.app.config]` holds settings of both: those that this project knows, and the app's own, which its
functions read. The names that `flwr new` writes are understood: `num-server-rounds`, `learning-rate` and `local-epochs`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import nn

from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.config.parts import table_types
from quickbloom.common.config.run import NodeConfig, RunConfig, parse_run_config
from quickbloom.common.datasets import DATASETS
from quickbloom.common.datasets.base import Dataset, DataSpec, TaskInfo
from quickbloom.common.errors import ConfigError, did_you_mean
from quickbloom.common.maths.batch import TaskData
from quickbloom.common.models import MODELS
from quickbloom.common.models.base import Model
from quickbloom.common.options import Options

APP = "app"
"""Name of the data set and of the model of such a run."""
TRAINERS = ("fedavg", "reptile", "fedprox", "ditto")
"""Algorithms that need nothing of a device but to train from given weights."""
_DEFAULTS: dict[str, Any] = {"algorithm": "reptile", "baselines": False, "personal": False, "adapt-steps": 3}
_ALWAYS = {"secure-aggregation": False, "test-shots": "", "metric": "auto", "inner-dtype": "float32"}
_ALWAYS |= {"node-momentum": 0.0, "baselines": False, "personal": False, "augment": "", "dropout": False, "transductive": False}
"""Settings that cannot have another value, since what they ask for needs gradients or examples."""
_STEPS = ("inner-steps", "batch-size", "local-epochs", "inner-optimizer", "inner-momentum")
"""Settings of an algorithm that say how a task takes its steps."""


class AppData(Dataset):
    """Stands for data that only the app's own loaders read: one task on each node."""

    name: ClassVar[str] = APP
    Options: ClassVar[type[Options]] = Options
    model: ClassVar[str] = APP
    inner_lr: ClassVar[float] = 0.01

    @classmethod
    def tests_seen(cls, options: Any) -> bool:
        return True

    def __init__(self, options: Any, data_dir: Path, spec: DataSpec | None = None, task: TaskInfo | None = None) -> None:
        self._spec, self._task = spec, task

    @property
    def spec(self) -> DataSpec:
        if self._spec is None:
            raise ConfigError('`dataset = "app"` is read by the ClientApp of a Flower app alone: see docs/flower-app.md')
        return self._spec

    def tasks(self) -> list[TaskInfo]:
        return [self._task] if self._task else []

    def train_draw(self, task_id: str, rng: np.random.Generator) -> TaskData:
        raise ConfigError("the examples of a Flower app with a trainer of its own are seen by that trainer alone")

    def test_draws(self, task_id: str) -> list[TaskData]:
        raise ConfigError("the examples of a Flower app with a trainer of its own are seen by that trainer alone")


def settings_of(run_config: Mapping[str, Any], model: Callable[[], nn.Module]) -> RunConfig:
    """Return the run's settings from those of an app whose `model()` makes its network. Raises ConfigError.

    Registers the app's model and data, under the name "app", in this process.
    """
    _register(model)
    ours = _DEFAULTS | {key: value for key, value in run_config.items() if is_ours(key)}
    ours |= {"dataset": APP, "model": APP}
    if "rounds" not in run_config and "num-server-rounds" in run_config:
        ours["rounds"] = run_config["num-server-rounds"]
    algorithm = str(ours["algorithm"])
    if algorithm not in TRAINERS:
        known = "needs gradients of the model on given examples" if algorithm in ALGORITHMS else "is none that is known"
        raise ConfigError(
            f'`algorithm` must be one of {", ".join(TRAINERS)} for a Flower app with a trainer of its own, got "{algorithm}", '
            f"which {known}: choose one of these, or let this project's ClientApp train"
        )
    for key, only in _ALWAYS.items():
        if ours.get(key, only) != only:
            raise ConfigError(
                f"`{key}` must be {only!r} for a Flower app with a trainer of its own, got {ours[key]!r}: leave it out"
            )
    if (rate := f"{algorithm}.inner-lr") not in run_config and "learning-rate" in run_config:
        ours[rate] = run_config["learning-rate"]
    config = parse_run_config(ours).resolved()
    if "adapt-lrs" not in run_config:  # every rate is a training of its own
        options: Any = config.table(algorithm)
        config = config.model_copy(update={"adapt_lrs": f"{options.inner_lr:g}"})
    return config


def node_settings_of(node_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what this project knows of a node's settings; all others are the app's own."""
    return {key: value for key, value in node_config.items() if key in NodeConfig().model_dump(by_alias=True)}


def is_ours(key: str) -> bool:
    """Return whether this project has a setting of that name."""
    table, dot, _ = key.partition(".")
    return table in table_types() if dot else key in RunConfig().model_dump(by_alias=True)


def remarks_on(run_config: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each setting that is nearly one of this project's, or does nothing because the app trains."""
    known = RunConfig().model_dump(by_alias=True)
    # `flwr new` writes `batch-size` for the app's own loader.
    found = {key: did_you_mean(key, known) for key in run_config if not is_ours(key) and key != "batch-size"}
    slips = [f"`{key}` is no setting of quickbloom, so it is your app's own{hint}" for key, hint in found.items() if hint]
    idle = [key for key in run_config if key.partition(".")[0] in TRAINERS and key.partition(".")[2] in _STEPS]
    return slips + [
        f"`{key}` does nothing here, where your own function `train` takes the steps: set `local-epochs`, or leave it out"
        for key in idle
    ]


def _register(model: Callable[[], nn.Module]) -> None:
    class AppModel(Model):
        """The network of the app."""

        name = APP
        Options = Options
        own_trainer = True

        @classmethod
        def build(cls, options: Any, input_shape: tuple[int, ...], outputs: int, tokens: int = 0) -> nn.Module:
            return model()

    DATASETS[APP], MODELS[APP] = AppData, AppModel
