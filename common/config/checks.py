"""Settings of a run that each are of the right type: names that must be known, and settings that exclude each other."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from quickbloom.common.config.parts import REGISTRIES
from quickbloom.common.datasets import DATASETS
from quickbloom.common.datasets.own import Own, OwnOptions
from quickbloom.common.datasets.partitioned import PartitionedOptions
from quickbloom.common.errors import ConfigError, did_you_mean
from quickbloom.common.maths.augmentation import read_augmentation
from quickbloom.common.models import is_own_model
from quickbloom.common.options import refuse_idle

if TYPE_CHECKING:
    from quickbloom.common.config.run import RunConfig, Scalar


def check(config: "RunConfig") -> None:
    """Raise ConfigError for settings that each are of the right type, and cannot work all the same."""
    _check_choices(config)
    _check_numbers(config)
    REGISTRIES["algorithm"][config.algorithm].check_options(config.table(config.algorithm))
    for key, path in (("output-dir", config.output_dir), ("resume-from", config.resume_from)):
        if path and not Path(path).is_absolute():
            raise ConfigError(f"`{key}` must be an absolute path, because the server runs elsewhere, got {path!r}")
    _check_tracking(config.mlflow)
    _check_privacy(config)
    _check_secure(config)
    _check_encoder(config)
    _check_scale(config)
    _check_asynchronous(config)
    _check_mean(config)
    _check_rule(config)
    if config.update_dtype != "top-k":
        refuse_idle(config, ["update-share"], f'with `update-dtype = "{config.update_dtype}"`, which sends all numbers')
    read_augmentation(config.augment)  # whether the examples are images only the data tell
    if config.dropout:
        _require("`dropout = true`", ("compile", config.compile is True, False, "tasks with random numbers are not compiled"))
    _check_partition(config)
    _check_users(config)


def check_choice(key: str, value: str, registry: Collection[str]) -> None:
    """Raise ConfigError if `value` of the setting `key` is not in `registry`."""
    if value not in registry:
        hint = did_you_mean(value, registry)
        if key == "algorithm" and not hint:
            hint = ": to use one of your own run its file instead of `quickbloom`, see docs/own-algorithm.md"
        raise ConfigError(f"`{key}` must be one of {', '.join(registry)}, got {value!r}{hint}")


def _check_choices(config: "RunConfig") -> None:
    for key, registry in REGISTRIES.items():
        value = getattr(config, key)
        if key == "model" and is_own_model(value):
            _check_own_model(value)
        else:
            check_choice(key, value, ["auto", *registry] if key == "model" else registry)


def _check_numbers(config: "RunConfig") -> None:
    """Raise ConfigError for lists of numbers that are written otherwise."""
    try:
        rates = config.lrs
    except ValueError:
        rates = (0.0,)
    if not all(0 < rate < float("inf") for rate in rates):
        raise ConfigError(f"`adapt-lrs` must be positive numbers with commas between them, got {config.adapt_lrs!r}")
    try:
        shots = config.shots
    except ValueError:
        shots = (0,)
    if not all(number > 0 for number in shots):
        raise ConfigError(f"`test-shots` must be whole numbers above 0 with commas between them, got {config.test_shots!r}")


def _check_tracking(uri: str) -> None:
    if uri and "://" not in uri:
        raise ConfigError(f"`mlflow` must be a URI such as http://localhost:5000 or sqlite:////data/mlflow.db, got {uri!r}")
    if "@" in urlsplit(uri).netloc:
        raise ConfigError(
            "`mlflow` must be without a user and a password, since every run writes its settings down: set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD where the server runs"
        )


def _check_privacy(config: "RunConfig") -> None:
    """Raise ConfigError for settings under which differential privacy does not hold."""
    privacy = config.privacy
    if not privacy.on:
        names = ("clip", "epsilon", "clip-quantile", "centre-noise")
        for key, value in ((name, getattr(privacy, name.replace("-", "_"))) for name in names):
            if value:
                raise ConfigError(
                    f"`privacy.{key}` does nothing without noise, got {value:g}: set `privacy.noise-multiplier` too"
                )
        refuse_idle(privacy, ["noise"], "without noise: set `privacy.noise-multiplier`, or", "privacy")
        return
    if privacy.clip == 0:
        raise ConfigError(
            "`privacy.clip` must be above 0 where `privacy.noise-multiplier` is: noise hides only what is bounded"
        )
    if privacy.noise == "tree":
        why = "a node of the tree adds up rounds, whose tasks must all be within one norm"
        _require('`privacy.noise = "tree"`', ("privacy.clip-quantile", privacy.clip_quantile, 0, why))
    _require(
        "`privacy.noise-multiplier` above 0",
        ("update-dtype", config.update_dtype, "float32", "what coding loses would come back unclipped"),
        ("aggregate", config.aggregate, "mean", "noise is accounted for on a sum"),
        ("over-select", config.over_select, 1, "with it, who is heard depends on who else takes part"),
        ("max-update-norm", config.max_update_norm, 0, "one task's data would decide whether all others of its node are heard"),
        ("min-replies", config.min_replies, 0, "a round that is skipped for want of replies tells who took part"),
    )


def _check_secure(config: "RunConfig") -> None:
    """Raise ConfigError for settings that need the update of a single node, or that leave nodes out."""
    if not config.secure_aggregation:
        refuse_idle(config, ["secure-threshold"], "without `secure-aggregation`")
        return
    _require(
        "`secure-aggregation`",
        ("aggregate", config.aggregate, "mean", "every other rule compares the updates of single nodes"),
        ("bucketing", config.bucketing, 1, "the server sees no reply of a single node to put into a bucket"),
        ("max-update-norm", config.max_update_norm, 0, "the server cannot see the norm of a masked update"),
        ("update-dtype", config.update_dtype, "float32", "masks hide whole numbers of 64 bits, which leaves nothing to save"),
        ("over-select", config.over_select, 1, "whoever is not waited for is a drop-out that the others have to make up for"),
    )


def why_not_seen(config: "RunConfig") -> str:
    """Return why training tasks cannot be scored with these settings, as the end of a sentence; "" if they can."""
    if config.privacy.on:
        return "with `privacy.noise-multiplier` above 0, because exact scores of training tasks are not private"
    if config.secure_aggregation:
        return "with `secure-aggregation`, because scores of a training task tell of it alone what sums hide"
    if not DATASETS[config.dataset].tests_seen(config.table(config.dataset)):
        return f"for the data set `{config.dataset}`, whose training tasks have no test examples of their own"
    return ""


def _check_users(config: "RunConfig") -> None:
    """Raise ConfigError for users that cannot be scored."""
    if config.evaluate_users in ("seen", "both") and (reason := why_not_seen(config)):
        raise ConfigError(f'`evaluate-users` must be "unseen" or "auto" {reason}, got {config.evaluate_users!r}')
    by_default = type(config).model_fields["test_tasks"].default
    if config.evaluate_users == "seen" and config.test_tasks not in (0, by_default):
        raise ConfigError(
            f'`test-tasks` must be 0 with `evaluate-users = "seen"`, which scores no task that is held out for it, got '
            f'{config.test_tasks:g}: leave it out, or set `evaluate-users` to "both"'
        )
    if not config.scores_seen:
        refuse_idle(config, ["seen-users"], why_not_seen(config) or f'with `evaluate-users = "{config.evaluate_users}"`')


ANY = "any:"
"""Start of a value of `root-tasks` that is no list of names."""
ASYNC_ALONE = ("async-concurrency", "async-buffer", "async-staleness", "async-max-staleness", "async-fairness")
"""Settings of mode async, which the other mode does not read."""


def _check_asynchronous(config: "RunConfig") -> None:
    """Raise ConfigError for settings that need a round that all its tasks share."""
    if config.mode != "async":
        refuse_idle(config, ASYNC_ALONE, f'with `mode = "{config.mode}"`, whose rounds wait for their tasks')
        return
    if config.privacy.on:
        raise ConfigError(
            '`mode` must be "sync" with `privacy.noise-multiplier` above 0, because its account holds for tasks that are '
            'chosen for a round whatever they do, and in "async" who answers fast decides'
        )
    if config.secure_aggregation:
        raise ConfigError(
            '`mode` must be "sync" with `secure-aggregation`, because masks cancel only among nodes that start a round together'
        )
    if 0 < config.async_fairness < 1:
        raise ConfigError(
            "`async-fairness` must be 0 (no limit) or a number from 1, because below 1 all tasks may reach their limit, and "
            f"nobody then works, got {config.async_fairness:g}"
        )
    _require(
        '`mode = "async"`',
        ("over-select", config.over_select, 1, "nobody is waited for anyway"),
        ("min-replies", config.min_replies, 0, "`async-buffer` says how many tasks a step needs"),
    )
    algorithm = REGISTRIES["algorithm"][config.algorithm]
    if algorithm.needs_whole:
        setting = f'`mode = "async"` and `algorithm = "{config.algorithm}"`'
        _require(setting, ("async-staleness", config.async_staleness, 0, algorithm.needs_mean))


def _check_encoder(config: "RunConfig") -> None:
    """Raise ConfigError for an encoder that is to be carried and cannot be."""
    own = config.table(Own.name)
    if config.dataset != Own.name or not isinstance(own, OwnOptions) or own.carry_encoder is not True:
        return
    if not own.encoder.startswith("onnx:"):
        raise ConfigError(
            '`own.carry-encoder` must be "auto" or false with any encoder but onnx:FILE, because code and directories are '
            f"never carried in a checkpoint, got true with '{own.encoder}'"
        )


def _check_mean(config: "RunConfig") -> None:
    """Raise ConfigError for a changed mean with an algorithm that is defined for the mean alone, or needs all answers."""
    algorithm = REGISTRIES["algorithm"][config.algorithm]
    if algorithm.needs_whole:
        _require(f'`algorithm = "{config.algorithm}"`', ("over-select", config.over_select, 1, algorithm.needs_mean))
    if why := algorithm.needs_mean:
        _require(
            f'`algorithm = "{config.algorithm}"`',
            ("aggregate", config.aggregate, "mean", why),
            ("node-momentum", config.node_momentum, 0.0, why),
            ("privacy.noise-multiplier", config.privacy.noise_multiplier, 0.0, why),
        )


def _check_rule(config: "RunConfig") -> None:
    """Raise ConfigError for settings of rules that do nothing with this one."""
    if config.aggregate == "mean":
        refuse_idle(config, ["malicious"], 'with `aggregate = "mean"`, which leaves nobody out')
        _require('`aggregate = "mean"`', ("bucketing", config.bucketing, 1, "the mean of buckets is the mean of their replies"))
    if config.aggregate != "centered-clip":
        refuse_idle(config, ["clip-radius", "clip-steps"], f'with `aggregate = "{config.aggregate}"`')
    _check_root(config)


def _check_root(config: "RunConfig") -> None:
    """Raise ConfigError for a root set that no rule uses, and for `fltrust` without one, or where it cannot work."""
    rule = f'`aggregate = "{config.aggregate}"`'
    if config.aggregate != "fltrust":
        refuse_idle(config, ["root-tasks", "root-path"], f"with {rule}, which needs no root set")
        return
    refuse_idle(config, ["malicious"], f"with {rule}, which compares every reply with the server's own and counts no liars")
    _require(
        rule,
        ("bucketing", config.bucketing, 1, "the mean of a bucket would carry a lie in the direction of the honest replies"),
        ("mode", config.mode, "sync", "it gives all replies the same length, also those that staleness has shortened"),
    )
    if not config.root_tasks and not config.root_path:
        raise ConfigError(
            f"`root-tasks` must name tasks whose examples the server has, with {rule}, which compares all replies with what "
            "the server computes of these, got '': name some, set it to any:N where the server reads the data set as well, or "
            "set `root-path` to a file"
        )
    text = config.root_tasks.strip()
    unnamed = bool(config.root_tasks) and not text.strip(", ")
    if unnamed or (text.startswith(ANY) and not text.removeprefix(ANY).strip().isdecimal()):
        raise ConfigError(f"`root-tasks` must be names of tasks, or any:N with a whole number N, got {config.root_tasks!r}")
    if config.root_path and (config.dataset != Own.name or config.partition):
        raise ConfigError(
            f"`root-path` is for the data set `{Own.name}` with users of its own, got {config.root_path!r} for "
            f"'{config.dataset}'{' with a `partition`' * bool(config.partition)}: use `root-tasks`, the server can read it"
        )


def _check_partition(config: "RunConfig") -> None:
    """Raise ConfigError for a partition that is none, where there is no table to spread, and for settings without use."""
    able = [name for name, dataset in DATASETS.items() if issubclass(dataset.Options, PartitionedOptions)]
    if config.dataset not in able:
        for key, value in (("partition", config.partition), ("users", config.users)):
            if value:
                raise ConfigError(
                    f"`{key}` is for the data sets {', '.join(able)}, whose examples can be one table, got {value!r} for "
                    f"'{config.dataset}', which has users of its own"
                )
        refuse_idle(config, _OF_PARTITIONS, _WITHOUT_PARTITION)
        return
    if (spread := config.spread) is not None:
        if spread.checked().scheme.kind != "dirichlet":
            why = f'with `partition = "{spread.text}"`, because dirichlet alone is redrawn for it'
            refuse_idle(config, ["least-per-user"], why)
    elif config.users:
        raise ConfigError(
            f"`users` says how many users share the examples of a `partition`, got {config.users} without one: set "
            "`partition`, such as dirichlet:0.1, or leave `users` out"
        )
    else:
        refuse_idle(config, _OF_PARTITIONS, _WITHOUT_PARTITION)


_OF_PARTITIONS = ("partition-seed", "least-per-user", "test-share", "support-share")
_WITHOUT_PARTITION = "without a `partition`, because only simulated users are drawn and divided by it"


def _check_scale(config: "RunConfig") -> None:
    """Raise ConfigError for a scale that all tasks share where nodes must not tell what their rows show."""
    own = config.table(Own.name)
    if config.dataset == Own.name and getattr(own, "scale", "") == "shared" and not config.shows_sums_of_nodes:
        raise ConfigError(
            '`own.scale` must be "task", or "features" behind an encoder, with privacy, `secure-aggregation` or an `aggregate` '
            'other than "mean", because each node would tell the means of its columns, got "shared"'
        )
    if config.dataset == Own.name and getattr(own, "scale", "") == "features":
        if config.aggregate != "mean":
            raise ConfigError(
                f'`own.scale` must be "task" with `aggregate` "{config.aggregate}", because one node that lies would move the '
                'mean of all features, got "features"'
            )
        if config.privacy.on and not config.privacy.centre_noise:
            raise ConfigError(
                '`own.scale` must be "task" with `privacy.noise-multiplier` unless `privacy.centre-noise` is above 0, because '
                'the mean of all features tells of every task, got "features"'
            )


def _require(setting: str, *needs: "tuple[str, Scalar, Scalar, str]") -> None:
    """Raise ConfigError unless every key has the value that `setting` needs. `needs`: (key, value, needed value, why)."""
    for key, came, needed, why in needs:
        if came != needed:
            raise ConfigError(f"`{key}` must be {needed!r} with {setting}, because {why}, got {came!r}")


def _check_own_model(value: str) -> None:
    module, _, factory = value.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), factory)):
        raise ConfigError(f'`model` must be "module:factory" for a model of your own, such as "my_models:small", got {value!r}')
