"""The root set of `aggregate = "fltrust"`: a few tasks whose examples the server has, so that it computes what they contribute.

Cao, Fang, Liu, Gong 2021, "FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping": the server's own contribution
g_0 says which direction is to be trusted (`aggregation.fltrust`). It comes from the same algorithm as those of the nodes, on
draws of its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from quickbloom.common.algorithms import Algorithm
from quickbloom.common.config.checks import ANY
from quickbloom.common.config.run import RunConfig
from quickbloom.common.datasets import load_dataset
from quickbloom.common.datasets.base import Dataset, TaskInfo, resolve_data_dir
from quickbloom.common.engine.chunking import AutoChunks
from quickbloom.common.engine.round import TaskWork, run_round
from quickbloom.common.errors import ConfigError, DataError, as_told, did_you_mean
from quickbloom.common.maths.augmentation import read_augmentation
from quickbloom.common.maths.params import Params, add
from quickbloom.common.randomness import generator
from quickbloom.server_app.messaging.admission import group_of, why_not_trained
from quickbloom.server_app.messaging.population import Population

RULE = "fltrust"


class RootSet:
    """The tasks `task_ids` of `dataset`, which are in this process. `algorithm`: that of the run."""

    def __init__(self, config: RunConfig, algorithm: Algorithm, dataset: Dataset, task_ids: Sequence[str]) -> None:
        self._config = config
        self._algorithm = algorithm
        self._dataset = dataset
        self.task_ids = list(task_ids)
        self._augmentation = read_augmentation(config.augment)

    def contribution(self, meta: Params, number: int, before: Params) -> Params:
        """Return g_0, the mean contribution of the root tasks in round `number`; zeros if none has finite numbers.

        `before`: g_0 of the round before, {} for none. With `node-momentum` it goes on in this one, as on the nodes.
        """
        config = self._config
        work = [self._work(task_id, number, episode) for task_id in self.task_ids for episode in range(config.episodes)]
        result = run_round(self._algorithm, meta, work, config.chunk_size or AutoChunks(self._algorithm.learner.device))
        if not before or not config.node_momentum:
            return result.gradient
        beta = config.node_momentum
        return add({name: (1 - beta) * value for name, value in result.gradient.items()}, before, beta)

    def _work(self, task_id: str, number: int, episode: int) -> TaskWork:
        place: tuple[Any, ...] = (number, task_id, episode)
        rng = generator(self._config.seed, "root", *place)
        drawn = self._dataset.train_draw(task_id, rng)
        if self._augmentation:
            drawn = self._augmentation.of(drawn, generator(self._config.seed, "augment root", *place))
        return TaskWork(drawn, rng)


def root_set(config: RunConfig, population: Population, algorithm: Algorithm) -> RootSet | None:
    """Return the root set that the settings name; None for a rule that needs none. Raises ConfigError if it cannot be used."""
    if config.aggregate != RULE:
        return None
    if algorithm.fresh():
        raise ConfigError(
            f'`algorithm` must be one whose tasks keep nothing on their nodes with `aggregate = "{RULE}"`, because the server '
            f'cannot compute what a task with a state of its own would contribute, got "{config.algorithm}"'
        )
    if not algorithm.init():
        raise ConfigError(
            f'`algorithm` must be one whose tasks send something with `aggregate = "{RULE}"`, got "{config.algorithm}": leave '
            "`aggregate` out"
        )
    dataset = _read(config, population)
    return RootSet(config, algorithm, dataset, _chosen(config, population, {one.task_id: one for one in dataset.tasks()}))


def drawn(able: Sequence[str], number: int, seed: int) -> list[str]:
    """Return so many of the tasks that are `able`, in their order: what any:N stands for."""
    chosen = generator(seed, "root tasks").choice(len(able), number, replace=False)
    return [able[i] for i in sorted(chosen)]


def _read(config: RunConfig, population: Population) -> Dataset:
    """Return the data with the root tasks. Raises ConfigError if this server cannot read them, or they have another form."""
    table = config.table(config.dataset)
    options = table.model_copy(update={"path": config.root_path}) if config.root_path else table
    where = f"`root-path` ('{config.root_path}')" if config.root_path else "`root-tasks`"
    try:
        dataset = load_dataset(config.dataset, options, resolve_data_dir(config.data_dir), population.schema)
        if dataset.spec == population.spec:
            return dataset
        reason = "its columns, classes or inputs are others than those of the nodes"
    except (DataError, ConfigError) as error:
        reason = str(error)
    raise ConfigError(
        f'{where} must be data that the server can read, because `aggregate = "{RULE}"` needs them there: {reason}'
    )


def _chosen(config: RunConfig, population: Population, there: Mapping[str, TaskInfo]) -> list[str]:
    """Return the names of the root tasks, sorted. Raises ConfigError for one that cannot be used."""
    held_out = {one: split for split in ("validation", "test") for one in population.splits[split]}
    groups = {group_of(population.tasks[one]) for one in held_out}
    reasons = {name: why_not_trained(task, groups) for name, task in there.items()}
    text = config.root_tasks.strip()
    if text.startswith(ANY):
        ours = there if config.root_path else population.splits["train"]
        able, number = sorted(name for name in ours if reasons.get(name) == ""), int(text.removeprefix(ANY))
        if not 1 <= number <= len(able):
            raise ConfigError(
                f"`root-tasks` must be any:1 to any:{len(able)}, since the server has {len(able)} tasks that may train, got "
                f"{text!r}"
            )
        return drawn(able, number, config.seed)
    names = sorted({name.strip() for name in text.split(",")} - {""}) or sorted(there)
    for name in names:
        told = as_told(name, 100)
        if name in held_out:
            raise ConfigError(
                f"`root-tasks` must be tasks that are not held out, because scores of what the server has seen say nothing, "
                f"got '{told}', which is a {held_out[name]} task of this run: name another, or any:N for training tasks"
            )
        if name not in there:
            raise ConfigError(
                f"`root-tasks` must name tasks that the server can read, got '{told}'{did_you_mean(name, there)}: it has "
                f"{len(there)}, such as '{as_told(min(there, default=''), 100)}'"
            )
        if reasons[name]:
            raise ConfigError(f"`root-tasks` must be tasks to train on, got '{told}': {reasons[name]}")
    return names
