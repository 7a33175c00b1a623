"""A node's objects that its process keeps between messages: settings, data set, model."""

import json
import sys
from collections.abc import Mapping
from copy import copy
from functools import lru_cache
from typing import Any

import torch
from flwr.app import Context

from quickbloom.common.algorithms import Algorithm
from quickbloom.common.config.run import NodeConfig, RunConfig, parse_node_config, parse_run_config
from quickbloom.common.datasets import load_dataset
from quickbloom.common.datasets.base import DataSpec, TaskInfo, resolve_data_dir
from quickbloom.common.datasets.own import Own, OwnOptions, task_of_file
from quickbloom.common.datasets.own.scales import scales_from_json
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.engine.chunking import AutoChunks
from quickbloom.common.engine.compiling import Auto
from quickbloom.common.errors import ConfigError, DataError, in_one_line
from quickbloom.common.maths.params import Params, mismatch
from quickbloom.common.options import Options
from quickbloom.common.printable import flawed
from quickbloom.common.wire.messages import WireError


class Node:
    """One node of a run: the tasks it hosts and the algorithm it runs. Building it reads the data, so `node_of` caches it."""

    def __init__(self, run: RunConfig, config: NodeConfig, agreed: str = "") -> None:
        """Read the data. `agreed`: the schema that the nodes of the run agreed on; "": that of this node's file."""
        torch.set_num_threads(config.threads)
        self.compile = Auto(run.rounds) if run.compile == "auto" else run.compile
        self.episodes = run.episodes
        self.state_dir = config.state_dir
        self.least_in_sum = config.least_in_sum
        self.show_rounds = config.show_rounds
        self.device = device_of(config.device or run.device)
        # Training and scoring need different amounts of memory.
        self.chunk_size = config.chunk_size or run.chunk_size or AutoChunks(self.device)
        self.chunk_size_scoring = config.chunk_size or run.chunk_size or AutoChunks(self.device)
        run = self.run = _with_own_places(run, config)
        data_dir = resolve_data_dir(config.data_dir or run.data_dir)
        self.dataset = load_dataset(run.dataset, _with_own_file(run, config), data_dir, agreed)
        tasks = self.dataset.tasks()
        # A node hosts all tasks of its own file; only a shared file is divided among nodes.
        self.tasks: list[TaskInfo] = tasks if config.data_path else tasks[config.partition_id :: config.num_partitions]
        if wrong := flawed([*(task.task_id for task in tasks), *self.dataset.left_out]):
            raise DataError(f"the data have a task '{wrong[0]}', which cannot be used: {wrong[1]}", wrong[0])
        self._hosted = {task.task_id for task in self.tasks}

    @property
    def algorithm(self) -> Algorithm:
        """The run's algorithm on this node's device. Raises ConfigError."""
        return _algorithm(self.run, self.dataset.spec, self.device)

    def algorithm_for(self, meta: Params) -> tuple[Algorithm, Params]:
        """Return the run's algorithm on this node's device, and `meta` there. Raises WireError if `meta` does not fit."""
        algorithm = self.algorithm
        if reason := mismatch(meta, algorithm.init()):
            raise WireError(f"the model that the server sent does not fit this node's data: {reason}")
        return algorithm, {name: value.to(self.device) for name, value in meta.items()}

    def check_hosted(self, task_ids: list[str]) -> list[str]:
        """Return `task_ids`. Raises WireError if this node does not host one of them."""
        if foreign := sorted(set(task_ids) - self._hosted):
            raise WireError(f"this node does not host the task '{foreign[0]}'")
        return task_ids


def node_of(context: Context, told: Mapping[str, Any] | None = None, agreed: str = "", scales: str = "") -> Node:
    """Return this process's Node for the settings in `context`, built once. Raises ConfigError or DataError.

    `told`: settings from the message, which take precedence over those of the run. `agreed` and `scales`:
    what the nodes agreed on, from the message, see `tell_agreed`.
    """
    run_config = {**context.run_config, **(told or {})}
    # One string shared by all nodes of a process, since Flower simulates a thousand in each.
    text = sys.intern(json.dumps(run_config, sort_keys=True))
    place = text, json.dumps(dict(context.node_config), sort_keys=True), agreed
    return _scaled(*place, scales) if scales else _cached(*place)


@lru_cache(maxsize=1024)
def _scaled(run_config: str, node_config: str, agreed: str, scales: str) -> Node:
    """Return the node with its data on these scales. The data are not read again."""
    node = copy(_cached(run_config, node_config, agreed))
    if not isinstance(node.dataset, Own):
        raise WireError("only the data set `own` has scales")
    try:
        columns, target = scales_from_json(scales)
        node.dataset = node.dataset.on_scales(columns, target)
    except (TypeError, ValueError) as error:
        raise WireError(f"the scales that the server sent cannot be read ({in_one_line(error)})") from None
    return node


@lru_cache(maxsize=1024)  # more than the nodes of one process, else each would be rebuilt for every message
def _cached(run_config: str, node_config: str, agreed: str) -> Node:
    flat_node: dict[str, Any] = json.loads(node_config)
    return Node(_run(run_config), parse_node_config(flat_node), agreed)


@lru_cache(maxsize=8)
def _run(text: str) -> RunConfig:
    flat: dict[str, Any] = json.loads(text)
    return parse_run_config(flat).resolved()


@lru_cache(maxsize=8)
def _algorithm(run: RunConfig, spec: DataSpec, device: torch.device) -> Algorithm:
    """Return the algorithm, shared by all nodes of a process with data of the same form, since it holds no state of a task."""
    return build_algorithm(run, spec, device, tried=True)  # the server has tried it


def _with_own_places(run: RunConfig, config: NodeConfig) -> RunConfig:
    """Return the settings of the run, in which the node's own places of the model's files take precedence."""
    if not config.weights and not config.model_directory:
        return run
    own = run.model_copy(update={"weights": config.weights or run.weights})
    places: dict[str, str] = {"transformer": "directory", "intents": "tokenizer"} if config.model_directory else {}
    own_data = run.table("own")
    if places and isinstance(own_data, OwnOptions) and own_data.tokenizer:
        places["own"] = "tokenizer"
    moved = {name: run.table(name).model_copy(update={place: config.model_directory}) for name, place in places.items()}
    own._tables = {**run._tables, **moved}
    return own


def _with_own_file(run: RunConfig, config: NodeConfig) -> Options:
    """Return the settings of the data set, in which the node's own file and columns take precedence."""
    options = run.table(run.dataset)
    named = {"path": config.data_path, "task_column": config.task_column, "target_column": config.target_column}
    named |= {"time_column": config.time_column, "encoder": config.encoder}
    # A column that this node names must exist; the run's column may exist on other nodes only.
    name = config.task_name or (task_of_file(config.data_path) if config.data_path and not config.task_column else "")
    given = {key: value for key, value in {**named, "task_name": name}.items() if value}
    if config.task_column and not config.task_name:
        given["task_name"] = ""
    if given and run.dataset != "own":
        raise ConfigError(
            "node settings `data-path`, `task-column`, `task-name`, `target-column`, `time-column` and `encoder` need "
            f'`dataset = "own"`, got {run.dataset!r}'
        )
    if config.data_path and run.partition:
        raise ConfigError(
            f"`partition` spreads one table that all nodes read, got '{run.partition}' beside the node setting `data-path`: "
            "leave one of them out"
        )
    return options.model_copy(update=given)


def device_of(setting: str) -> torch.device:
    if setting == "cuda" and not torch.cuda.is_available():
        raise ConfigError('`device` is "cuda", but this node has no CUDA device: use "auto" or "cpu"')
    if setting == "auto":
        setting = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(setting)
