"""All settings of a run and of a node, as frozen models built from Flower's flat dictionaries.

Keys are kebab-case. A key without a dot belongs to the run (`rounds`); a key with a dot belongs to
the table of one algorithm, data set or model (`maml.inner-lr`). Everything is checked here, once,
before anything runs. A mistake raises ConfigError with one sentence: the key, what was expected and
what came. Every key and its default is also in pyproject.toml, because Flower can only override
declared keys; a test keeps the two equal.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr

from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.algorithms.base import AlgorithmOptions
from quickbloom.common.config.checks import check, why_not_seen
from quickbloom.common.config.parts import PRIVACY, table_types
from quickbloom.common.config.privacy import PrivacyOptions
from quickbloom.common.config.validation import keys, validated
from quickbloom.common.datasets import DATASETS
from quickbloom.common.datasets.own import Own, OwnOptions
from quickbloom.common.datasets.partitioned import PartitionedOptions
from quickbloom.common.errors import ConfigError, did_you_mean
from quickbloom.common.metric import Chosen
from quickbloom.common.models import is_own_model
from quickbloom.common.options import Options, Text
from quickbloom.common.partition import Partition

HUB = "hub:"
"""Start of the names of data sets of the hub."""
Scalar = bool | int | float | str
Device = Literal["auto", "cpu", "cuda"]

_FIRST_STEPS, _DOUBLINGS = 10, 4
"""Steps of adaptation that are tried where `adapt-steps` is 0, and how often their number may double after training."""


class RunConfig(Options):
    """Settings of a run, shared by the server and all nodes."""

    algorithm: str = Field("reptile", description="algorithm to train with: a name in ALGORITHMS")
    dataset: str = Field("digits", description="data set with the tasks: a name in DATASETS, or hub:NAME")
    partition: Text = Field(
        "",
        description="how one table of examples is spread over simulated users: dirichlet:0.1, pathological:2, shards:2, "
        'size:linear, iid or natural:COLUMN; "": the data set has users of its own',
    )
    users: int = Field(0, ge=0, le=100_000, description="number of simulated users; 0: as many as the partition itself says")
    partition_seed: int = Field(0, ge=0, description="determines the partition, apart from the seed of the run")
    least_per_user: int = Field(
        10, ge=3, description="fewest examples of a user of a dirichlet partition, which is redrawn for it"
    )
    test_share: float = Field(0.25, gt=0, lt=1, description="share of a simulated user's examples that is its test part")
    support_share: float = Field(
        0.5, gt=0, lt=1, description="share of a simulated user's other examples that is its support part; the rest is query"
    )
    model: str = Field(
        "auto", description='a name in MODELS; "auto": the data set\'s recommendation; "module:factory": your own'
    )
    trainable: Text = Field(
        "all",
        description="parameters that are trained: all (that the model does not freeze), head, norm, bias, or patterns of "
        "names, with commas between them; the others are constants, which never travel",
    )
    weights: str = Field(
        "", description='file with the weights that the model starts from, .safetensors or torch\'s; "": drawn by the seed'
    )
    seed: int = Field(0, ge=0, description="determines the initial model, the task split and every draw")
    rounds: int = Field(100, ge=1, description="training rounds")
    fraction: float = Field(1.0, gt=0, le=1, description="share of the training tasks in a round")
    tasks_per_round: int = Field(0, ge=0, description="number of training tasks in a round; 0: use `fraction`")
    episodes: int = Field(1, ge=1, description="draws of support and query that a training task averages over in a round")
    validation_tasks: float = Field(0.15, ge=0, description="tasks held out to choose rates on: a part below 1, else a number")
    test_tasks: float = Field(0.2, ge=0, description="tasks held out for the final score: a part below 1, else a number")
    split: Literal["auto", "hashed", "exact"] = Field(
        "auto", description="hashed: each task by its own hash; exact: exact shares; auto: hashed for own data and with privacy"
    )
    augment: Text = Field(
        "",
        description="how images vary in training, once for each draw of a task: shift:N by up to N pixels each way, flip from "
        'left to right, rotate:N by up to N degrees, or several with commas; "": not at all, as wherever something is scored',
    )
    dropout: bool = Field(
        False,
        description="keep the model's dropout on in the local steps of training, for which tasks are computed one after the "
        "other; scores are without it in any case",
    )
    transductive: bool = Field(
        False,
        description="batch norm without running statistics normalises the examples to predict by their own batch, as in "
        "training, and not by their task's support set: scores then depend on which are predicted together",
    )
    evaluate_users: Literal["auto", "unseen", "seen", "both"] = Field(
        "auto",
        description="who is scored at the end: unseen, tasks that are held out; seen, training tasks on test examples of their "
        "own, and by default none is then held out; both; auto: both, where training tasks have such examples and may tell",
    )
    seen_users: int = Field(
        1000, ge=0, description="training tasks that are scored as seen users, drawn by the seed where there are more; 0: all"
    )
    metric: Literal["auto", Chosen] = Field(
        "auto",
        description="the score that validation chooses by and tables show first; auto: mse, or accuracy, but "
        "balanced_accuracy for own data with a class that has most rows",
    )
    evaluate_every: int = Field(10, ge=0, description="rounds between two evaluations on the validation tasks; 0: never")
    adapt_steps: int = Field(
        0,
        ge=0,
        le=10_000,
        description="K: held-out tasks are scored after 0, 1, .. K steps; 0: 10, and after training twice as many, "
        "up to 160, as long as the validation tasks gain",
    )
    adapt_lrs: Text = Field(
        "0.01,0.03,0.1,0.3,1", description="learning rates for adapting held-out tasks; the validation tasks choose one"
    )
    test_shots: Text = Field(
        "", description="also score the test tasks with only this many support examples per class: numbers with commas"
    )
    mode: Literal["sync", "async"] = Field(
        "sync",
        description="sync: a round waits for its tasks; async: nodes get new work as they come free, and a round is one step "
        "with what has come in",
    )
    async_concurrency: int = Field(
        0, ge=0, le=1_000_000, description="training tasks that are at work at any time in mode async; 0: as many as in a round"
    )
    async_buffer: int = Field(
        0, ge=0, le=1_000_000, description="training tasks that contribute to a step in mode async; 0: as many as in a round"
    )
    async_staleness: float = Field(
        0.5, ge=0, le=10, description="exponent a: what was computed s steps ago counts (1 + s) ** -a times; 0: all the same"
    )
    async_max_staleness: int = Field(50, ge=0, description="steps after which what a node computed is of no use any more")
    async_fairness: float = Field(
        2.0,
        ge=0,
        le=1000,
        description="a training task gets work in at most this many times the share of its turns that all get work in; 0: any",
    )
    devices: Text = Field(
        "",
        description="simulate slow devices in virtual time: even, lognormal, or the path of a CSV file with their speeds and "
        'hours; "": the time of this machine',
    )
    min_nodes: int = Field(2, ge=1, description="nodes that must answer the roll call")
    node_deadline: float = Field(60.0, gt=0, description="seconds to wait for `min-nodes` nodes")
    round_deadline: float = Field(600.0, gt=0, description="seconds to wait for the replies of a round, uploads included")
    over_select: float = Field(
        1.0, ge=1, le=100, description="ask this many times the tasks of a round, and continue once enough have answered"
    )
    min_replies: float = Field(
        0.0, ge=0, description="training tasks that must contribute: a part below 1, else a number; 0: one"
    )
    on_too_few: Literal["repeat", "skip", "stop"] = Field(
        "stop", description="what to do if fewer than `min-replies` contribute"
    )
    join: bool = Field(True, description="nodes that come during the run take part at once: their new tasks join the training")
    keep: Literal["auto", "last", "best"] = Field(
        "auto",
        description="the model that a run ends with: of the last round, or the best by the validation tasks, the one before "
        "training included; auto: best behind a frozen encoder, with a pretrained model or with `weights`, else last",
    )
    personal: bool = Field(
        True, description="at the end, nodes with a `state-dir` adapt the model to their own tasks and keep it there"
    )
    aggregate: Literal[
        "mean", "median", "trimmed-mean", "krum", "multi-krum", "geometric-median", "centered-clip", "fltrust"
    ] = Field("mean", description="how the nodes' replies are combined; all rules but `mean` give every node the same weight")
    malicious: float = Field(
        0.2, ge=0, lt=0.5, description="share of a round's nodes that may lie; sets what all rules but `mean` leave out"
    )
    bucketing: int = Field(
        1, ge=1, description="nodes in a random bucket, whose mean is one vote for every rule but `mean`; 1: no buckets"
    )
    clip_radius: float = Field(
        0.0,
        ge=0,
        description="tau of `centered-clip`: how far from its centre a reply counts; 0: the median distance, at every step",
    )
    clip_steps: int = Field(3, ge=1, le=1000, description="how often a round of `centered-clip` moves its centre")
    node_momentum: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="beta: a task sends (1 - beta) times its contribution and beta times what it sent before, which it keeps "
        "on its node; 0: its contribution alone",
    )
    root_tasks: Text = Field(
        "",
        description="root set of `fltrust`: names of tasks, with commas between them, whose examples the server reads as well, "
        'or any:N for N training tasks drawn by the seed; "": all tasks of `root-path`',
    )
    root_path: str = Field(
        "", description='file on the server with the root set of `fltrust`, for the data set `own`; "": that of the data set'
    )
    max_update_norm: float = Field(0.0, ge=0, description="reject replies whose meta-gradient has a larger norm; 0: no limit")
    secure_aggregation: bool = Field(False, description="nodes mask their meta-gradients, so that the server sees only the sum")
    secure_threshold: float = Field(
        0.66,
        gt=0.5,
        le=1,
        description="share of the nodes of a secure sum that must stay until its end; the others may drop out",
    )
    update_dtype: Literal["float32", "bfloat16", "float16", "int8", "top-k"] = Field(
        "float32", description="how nodes encode their meta-gradients; the error is added to the next one"
    )
    update_share: float = Field(0.05, gt=0, le=1, description="share of the numbers that `top-k` sends: the largest")
    baselines: bool = Field(
        True, description="at the end, score the test tasks by baselines too: a constant, own rows alone, one model for all"
    )
    checkpoint_every: int = Field(1, ge=0, description="rounds between two checkpoints; 0: only the last round")
    resume_from: str = Field("", description='absolute path of a run to continue or a checkpoint to start from; "": a new run')
    output_dir: str = Field("", description='absolute directory of the run; "": a new one in ~/quickbloom-runs')
    data_dir: str = Field("", description='where data files are; "": QUICKBLOOM_DATA_DIR, else the user\'s cache')
    device: Device = Field("auto", description="where nodes compute: auto takes CUDA where there is one")
    inner_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="number type in which nodes compute a pretrained, partly trained or own model; what is trained, its "
        "gradients and the outer step are float32 in any case",
    )
    chunk_size: int = Field(
        128, ge=0, description="tasks computed at once on a node: bounds its memory; 0: as many as its free memory allows"
    )
    tensorboard: bool = Field(False, description="the server writes TensorBoard's files, in `tensorboard` of the run directory")
    mlflow: str = Field("", description='URI of an MLflow tracking server to log the rounds to; "": none')
    wandb: str = Field(
        "", description='Weights & Biases project to log the rounds to, offline unless WANDB_MODE says otherwise; "": none'
    )
    compile: Literal["auto", True, False] = Field(
        False, description="compile rounds with torch.compile, once per size of tasks; auto: if that saves time in this run"
    )
    _tables: dict[str, Options] = PrivateAttr(default_factory=dict)

    @property
    def lrs(self) -> tuple[float, ...]:
        """`adapt-lrs` as numbers. Raises ValueError."""
        return tuple(float(part) for part in self.adapt_lrs.split(","))

    @property
    def first_steps(self) -> int:
        """The K of `adapt-steps` while the run trains."""
        return self.adapt_steps or _FIRST_STEPS

    @property
    def more_steps(self) -> tuple[int, ...]:
        """What K may grow to after training, ascending: nothing if it was set, or if further steps change nothing."""
        if self.adapt_steps or not ALGORITHMS[self.algorithm].uses_adapt_lr:
            return ()
        return tuple(_FIRST_STEPS * 2**doubling for doubling in range(1, _DOUBLINGS + 1))

    @property
    def shots(self) -> tuple[int, ...]:
        """`test-shots` as numbers, ascending."""
        return tuple(sorted({int(part) for part in self.test_shots.split(",")})) if self.test_shots else ()

    @property
    def privacy(self) -> PrivacyOptions:
        """The table `privacy`."""
        table = self.table(PRIVACY)
        assert isinstance(table, PrivacyOptions)
        return table

    @property
    def scores_seen(self) -> bool:
        """Whether training tasks are scored, at the end of the run."""
        if self.evaluate_users != "auto":
            return self.evaluate_users != "unseen"
        return not why_not_seen(self)

    @property
    def scores_unseen(self) -> bool:
        """Whether test tasks are scored, at the end of the run."""
        return self.evaluate_users != "seen"

    def tasks_in_round(self, train: int) -> int:
        """Return the intended number of tasks in a round, of `train` training tasks."""
        return min(train, self.tasks_per_round or math.ceil(self.fraction * train))

    def resolved(self) -> "RunConfig":
        """Return these settings with the data set's recommendations in place of `model = "auto"` and `inner-lr = 0`."""
        dataset = DATASETS[self.dataset]
        config = self.model_copy(update={"model": dataset.model if self.model == "auto" else self.model, **self._held_out()})
        chosen = self.table(self.algorithm)
        if isinstance(chosen, AlgorithmOptions) and chosen.inner_lr == 0:
            chosen = chosen.model_copy(update={"inner_lr": dataset.inner_lr})
        config._tables = {**self._tables, self.algorithm: chosen}
        own = self.table(Own.name)
        if isinstance(own, OwnOptions) and own.scale == "auto":
            config._tables[Own.name] = own.model_copy(update={"scale": self._scale_of(own)})
        return config

    def _scale_of(self, own: OwnOptions) -> str:
        """Return what `own.scale = "auto"` means."""
        if self.shows_sums_of_nodes:
            return "shared"
        may_centre = self.aggregate == "mean" and (not self.privacy.on or self.privacy.centre_noise > 0)
        return "features" if own.encoder and may_centre else "task"

    def _held_out(self) -> dict[str, float]:
        """Return the settings of held-out tasks that are not at their default because nobody unseen is scored."""
        if self.scores_unseen:
            return {}
        by_default = {name: type(self).model_fields[name].default for name in ("validation_tasks", "test_tasks")}
        return {name: 0.0 for name, value in by_default.items() if getattr(self, name) == value}

    @property
    def shows_sums_of_nodes(self) -> bool:
        """Whether a node may tell what its rows show together: without privacy, secure sums and rules against liars."""
        return not self.privacy.on and not self.secure_aggregation and self.aggregate == "mean"

    def table(self, name: str) -> Options:
        """Return the settings table of one algorithm, data set or model; an empty one for a user's own model."""
        if is_own_model(name):
            return Options()
        found = self._tables.get(name) or table_types()[name]()
        if name == self.dataset and isinstance(found, PartitionedOptions):
            return found.spread_by(self.spread)
        return found

    def with_table(self, name: str, table: Options) -> "RunConfig":
        """Return these settings with another table of one algorithm, data set or model."""
        config = self.model_copy()
        config._tables = {**self._tables, name: table}
        return config

    @property
    def spread(self) -> Partition | None:
        """How the data set's one table is spread over simulated users; None: it has users of its own."""
        dataset = DATASETS[self.dataset]
        text = self.partition or dataset.partition
        if not text:
            return None
        found = Partition(text, self.users, self.partition_seed, self.least_per_user, self.test_share, self.support_share)
        if not self.users and found.scheme.kind != "natural" and not found.scheme.sizes:
            return replace(found, users=dataset.users)
        return found

    def flat(self) -> dict[str, Scalar]:
        """Return all settings as Flower's flat dictionary: the inverse of `parse_run_config`."""
        flat: dict[str, Scalar] = self.model_dump(by_alias=True)
        for name in table_types():
            flat |= {f"{name}.{key}": value for key, value in self.table(name).model_dump(by_alias=True).items()}
        return flat


class NodeConfig(Options):
    """Settings of one node, from Flower's `--node-config`. They take precedence over those of the run."""

    partition_id: int = Field(0, ge=0, description="which part of the data set's tasks this node hosts")
    num_partitions: int = Field(1, ge=1, description="number of parts that the data set's tasks are divided into")
    data_dir: str = Field("", description="where this node's data files are")
    data_path: str = Field("", description='this node has its own file for the data set `own`; "": as the run says')
    task_column: str = Field("", description='task column of that file; "": as the run says')
    task_name: str = Field(
        "", description='name of the only task in that file, if it has no task column; "": the name of the file'
    )
    target_column: str = Field("", description='target column of that file; "": as the run says')
    time_column: str = Field("", description='column of that file that orders its rows; "": as the run says')
    encoder: str = Field("", description='where the encoder is on this node, as `own.encoder` says it; "": as the run says')
    least_in_sum: int = Field(
        0, ge=0, description="send meta-gradients only as part of a secure sum of so many nodes or more; 0: as the run says"
    )
    weights: str = Field("", description='where the file of `weights` is on this node; "": as the run says')
    model_directory: str = Field(
        "", description='where the directory of a pretrained model and its tokenizer is on this node; "": as the run says'
    )
    state_dir: str = Field(
        "", description='where this node keeps what never leaves it (heads, momentum); "": only during the run'
    )
    device: Literal["", "auto", "cpu", "cuda"] = Field("", description='where this node computes; "": as the run says')
    chunk_size: int = Field(0, ge=0, description="tasks computed at once on this node; 0: as the run says")
    threads: int = Field(1, ge=1, description="CPU threads of this node")
    show_rounds: bool = Field(False, description="log on this node what each round did, with its own scores")


def parse_run_config(flat: Mapping[str, Any]) -> RunConfig:
    """Return the settings of a run from Flower's `context.run_config`; missing keys get their defaults. Raises ConfigError."""
    own: dict[str, Any] = {}
    types = table_types()
    tables: dict[str, dict[str, Any]] = {name: {} for name in types}
    for key, value in spelled_out(flat).items():
        table, dot, name = key.partition(".")
        if not dot:
            own[key] = value
        elif table in tables:
            tables[table][name] = value
        else:
            raise ConfigError(f"there is no settings table `{table}` (setting `{key}`){did_you_mean(table, tables)}")
    algorithm = own.get("algorithm", RunConfig.model_fields["algorithm"].default)
    config = validated(RunConfig, own, near=keys(types.get(str(algorithm), Options), algorithm))
    config._tables.update({name: validated(types[name], values, name) for name, values in tables.items()})
    check(config)
    return config


def spelled_out(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same settings with `dataset = "hub:NAME"` as two: "hub" and `hub.name`. A local folder gets its whole path."""
    dataset = str(flat.get("dataset", ""))
    if not dataset.startswith(HUB):
        return dict(flat)
    name = dataset.removeprefix(HUB)
    folder = Path(name).expanduser()
    return {**flat, "dataset": "hub", "hub.name": str(folder.absolute()) if folder.is_dir() else name}


def parse_node_config(flat: Mapping[str, Any]) -> NodeConfig:
    """Return the settings of a node from Flower's `context.node_config`. Raises ConfigError."""
    config = validated(NodeConfig, flat, what="node setting")
    if config.partition_id >= config.num_partitions:
        raise ConfigError(
            f"node setting `partition-id` must be below `num-partitions` ({config.num_partitions}), got {config.partition_id}"
        )
    return config
