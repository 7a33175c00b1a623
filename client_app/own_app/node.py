"""A node of somebody's own Flower app: one task, which the app's own functions train and score."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quickbloom.client_app.node import Node, device_of
from quickbloom.client_app.own_app.trainer import Pull, Trainer, seeded
from quickbloom.common.algorithms import ALGORITHMS, Algorithm
from quickbloom.common.config.own_app import APP, AppData, node_settings_of
from quickbloom.common.config.run import RunConfig, parse_node_config
from quickbloom.common.datasets.base import DataSpec, TaskInfo
from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params, subtract
from quickbloom.common.models import build_model
from quickbloom.common.options import Options
from quickbloom.common.randomness import generator

_BUFFERS = "buffers of the network: "
"""How the task's own buffers, such as running statistics, are named in its state."""


class AppNode(Node):
    """One task. `epochs`: of a round; `constants`: the hash of what its network has besides what is trained.

    The network's buffers (batch norm's statistics) stay here, as in FedBN. Building it loads the node's own data alone.
    """

    def __init__(self, run: RunConfig, node_config: Mapping[str, Any], trainer: Trainer, epochs: int) -> None:
        config = parse_node_config(node_settings_of(node_config))
        torch.set_num_threads(config.threads)
        self.run, self.trainer, self.epochs = run, trainer, epochs
        self.state_dir, self.least_in_sum, self.show_rounds = config.state_dir, config.least_in_sum, config.show_rounds
        self.device = device_of(config.device or run.device)
        with seeded(generator(run.seed, "load", config.partition_id)):
            self._train, self._test = trainer.loaders(config.partition_id, config.num_partitions)
            example = trainer.input_of(self._train)
        # As long as the longest, so that the names sort as the numbers do.
        task = f"user {config.partition_id:0{len(str(config.num_partitions - 1))}d}"
        count = _examples(self._train)
        if count < 2:
            raise ConfigError(f"the trainloader of partition {config.partition_id} must have at least 2 examples, got {count}")
        shape = tuple(example.shape[1:])
        module = build_model(APP, Options(), shape, 0, run.seed)
        spec = DataSpec(trainer.kind, shape, _outputs(module, example))
        info = TaskInfo(task, count - count // 2, count // 2, _examples(self._test))
        self.dataset, self.tasks, self._hosted = AppData(Options(), Path(), spec, info), [info], {task}
        self._own = ALGORITHMS[run.algorithm](run.table(run.algorithm), Learner(module, trainer.kind))
        self.constants = self._own.learner.digest
        self.buffers = {name: value.detach().clone() for name, value in module.named_buffers()}

    @property
    def algorithm(self) -> Algorithm:
        return self._own

    @property
    def num_examples(self) -> int:
        return self.tasks[0].num_support + self.tasks[0].num_query

    def fresh(self) -> Params:
        """Return the state that the task starts with: the algorithm's, and the network's buffers."""
        return self._own.fresh() | {_BUFFERS + name: value.clone() for name, value in self.buffers.items()}

    def contribute(self, meta: Params, kept: Params, rng: np.random.Generator) -> tuple[Params, float, Params]:
        """Return (g, loss, new state): g = theta - phi after the app's epochs, as in FedAvg, Reptile, FedProx and Ditto."""
        options: Any = self._own.options
        buffers, personal = _apart(kept)
        pull = Pull(meta, options.strength) if self.run.algorithm == "fedprox" else None
        phi, after, loss = self._trained(meta, buffers, self.epochs, options.inner_lr, rng, pull)
        if personal:
            personal, _, _ = self._trained(personal, buffers, self.epochs, options.inner_lr, rng, self._own_pull(meta))
        return (
            self._own.with_zero_head(subtract(meta, phi)),
            loss,
            personal | {_BUFFERS + name: value for name, value in after.items()},
        )

    def scores(
        self, meta: Params, kept: Params | None, lrs: list[float], steps: int, rng: np.random.Generator
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return (losses, metrics), each [1, rates, steps + 1]: of the test part, after 0..`steps` epochs of the app's trainer.

        `kept`: the state of a task that has trained; None for a held-out task.
        """
        result = np.full((2, 1, len(lrs), steps + 1), np.nan)
        buffers, personal = _apart(kept or self.fresh())
        start = personal if kept and personal else meta
        for i, lr in enumerate(lrs):
            phi, own = start, buffers
            result[:, 0, i, 0] = self._scored(phi, own)
            for step in range(1, steps + 1):
                phi, own, _ = self._trained(phi, own, 1, lr, rng, self._own_pull(meta))
                result[:, 0, i, step] = self._scored(phi, own)
        return result[0], result[1]

    def _own_pull(self, meta: Params) -> Pull | None:
        """Return the pull on a personal model, which Ditto has."""
        options: Any = self._own.options
        return Pull(meta, options.strength) if self.run.algorithm == "ditto" else None

    def _trained(
        self, start: Params, buffers: Params, epochs: int, lr: float, rng: np.random.Generator, pull: Pull | None
    ) -> tuple[Params, Params, float]:
        net = self._with(start, buffers).train()
        with seeded(rng):
            loss = self.trainer.trained(net, self._train, epochs, lr, self.device, pull)
            if loss is None:
                loss, _ = self.trainer.scored(net.eval(), self._train, self.device)
        return *self._read(net), loss

    def _scored(self, params: Params, buffers: Params) -> tuple[float, float]:
        with torch.no_grad():
            return self.trainer.scored(self._with(params, buffers).eval(), self._test, self.device)

    def _with(self, params: Params, buffers: Params) -> nn.Module:
        """Return the network with these numbers. It is one object, so its numbers are copied in and out."""
        net = self._own.learner.module.to(self.device)
        with torch.no_grad():
            for name, value in net.named_parameters():
                value.grad = None
                if name in params:
                    value.copy_(params[name])
            for name, buffer in net.named_buffers():
                buffer.copy_(buffers[name])
        return net

    def _read(self, net: nn.Module) -> tuple[Params, Params]:
        """Return copies of what is trained and of the buffers, on the CPU."""
        trained = self._own.learner.trained
        params = {name: value.detach().cpu().clone() for name, value in net.named_parameters() if name in trained}
        return params, {name: value.detach().cpu().clone() for name, value in net.named_buffers()}


def _apart(kept: Params) -> tuple[Params, Params]:
    """Return the buffers in a task's state by their own names, and the rest."""
    buffers = {name.removeprefix(_BUFFERS): value for name, value in kept.items() if name.startswith(_BUFFERS)}
    return buffers, {name: value for name, value in kept.items() if not name.startswith(_BUFFERS)}


def _examples(loader: Any) -> int:
    """Return the number of examples of a loader, of which a sampler may leave some out; of one without a length, by batches."""
    try:
        return min(len(loader.dataset), len(getattr(loader, "sampler", None) or loader.dataset))
    except (AttributeError, TypeError):
        return sum(len(_first(batch)) for batch in loader)


def _first(batch: Any) -> Any:
    """Return the first part of a batch, which has a row for each example."""
    if isinstance(batch, Tensor):
        return batch
    return next(iter(batch.values())) if isinstance(batch, dict) else batch[0]


def _outputs(net: nn.Module, example: Tensor) -> int:
    """Return the number of the network's outputs. Raises ConfigError."""
    try:
        with torch.no_grad():
            found = net.eval()(example[:2].to(next(net.parameters()).device))
        return int(found.shape[1])
    except Exception as error:  # the app's code may raise anything
        raise ConfigError(
            f"your network must turn inputs of shape {tuple(example.shape[1:])} into [examples, outputs], but that raised "
            f"{type(error).__name__}: give `inputs=lambda batch: ...`, which returns what your network reads"
        ) from error
