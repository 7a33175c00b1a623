"""Validates the facts of checkpoints and personal models before use: types, ranges and sizes.

The facts are JSON in a file that anybody may have made. A missing fact, a wrong type or an absurd
value ends in one sentence. A model whose settings claim far more numbers than the file holds is
refused before it is built.
"""

from collections.abc import Mapping
from math import prod
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import Tensor

from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.config.run import RunConfig
from quickbloom.common.datasets.base import DataSpec
from quickbloom.common.errors import ConfigError, DataError, as_told
from quickbloom.common.metric import CHOSEN_BY, of_kind
from quickbloom.common.models import MODELS, build_model
from quickbloom.common.personal.checkpoint import ENCODER
from quickbloom.common.printable import flaw_of

MOST_INPUTS, MOST_TOKENS, MOST_IDS, MOST_OUTPUTS = 2**22, 4096, 2**20, 2**20
"""Limits of one example: numbers, tokens, ids that a token may be, and classes or targets."""
MOST_PARAMETERS, MOST_ACTIVATIONS = 2**22, 2**27
"""Limits of a model: parameters, and activations for two examples, both beyond four times the numbers in its file.

A checkpoint lacks the heads that stay on nodes.
"""
_LONGEST_SIZES = 1000
_MOST_ITEMS, _DEEPEST = 1_000_000, 12

Name = Annotated[str, Field(max_length=1000)]
Count = Annotated[int, Field(ge=0, le=10**12)]
Number = Annotated[float, Field(ge=0, le=1e30)]
Settings = Annotated[dict[Name, bool | int | float | Annotated[str, Field(max_length=1_000_000)]], Field(max_length=1000)]


class _Facts(BaseModel):
    """Base of all facts. Unlisted facts are allowed, and only their size is checked."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _of_modest_size(cls, facts: Any) -> Any:
        _look_through(facts)
        return facts


class _Adapted(_Facts):
    lr: Number
    steps: Annotated[int, Field(ge=0, le=10_000)]
    whole: bool = False


class _Described(_Facts):
    """Facts that both kinds of file have: their model and their data."""

    config: Settings
    spec: list[Any]
    tokens: bool | Annotated[int, Field(ge=0, le=MOST_IDS)] = 0
    constants: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""
    columns_and_classes: Annotated[str, Field(max_length=50_000_000)] = Field("", alias="schema")

    @field_validator("config")
    @classmethod
    def _config(cls, config: dict[str, Any]) -> dict[str, Any]:
        # Otherwise a model could have half a million layers.
        for key, value in config.items():
            if key.partition(".")[0] in MODELS and len(str(value)) > _LONGEST_SIZES:
                raise ValueError(f"`{as_told(key, 60)}` must have at most {_LONGEST_SIZES} characters")
        return config

    @field_validator("spec")
    @classmethod
    def _spec(cls, spec: list[Any]) -> list[Any]:
        kind, shape, outputs = spec
        if kind not in ("classification", "regression"):
            raise ValueError("must begin with classification or regression")
        if not isinstance(shape, list) or not 1 <= len(shape) <= 4 or not all(_whole(size, MOST_INPUTS) for size in shape):
            raise ValueError("must have a shape of one to four sizes above 0")
        if prod(shape) > MOST_INPUTS:
            raise ValueError(f"must have at most {MOST_INPUTS} inputs")
        if not _whole(outputs, MOST_OUTPUTS):
            raise ValueError(f"must have from 1 to {MOST_OUTPUTS} outputs")
        return spec

    @model_validator(mode="after")
    def _tokens(self) -> "_Described":
        if self.tokens and prod(self.spec[1]) > MOST_TOKENS:
            raise ValueError(f"`spec` must have at most {MOST_TOKENS} tokens")
        return self


class _Run(_Facts):
    directory: Name
    lineage: Name
    round: Count


class _Score(_Facts):
    name: Annotated[str, Field(pattern=f"^({'|'.join(metric.name for metric in CHOSEN_BY)})$")]
    before: Annotated[float, Field(ge=-1, le=1e300)] | None
    after: Annotated[float, Field(ge=-1, le=1e300)] | None
    constant: Annotated[float, Field(ge=-1, le=1e300)] | None = None
    own: Annotated[float, Field(ge=-1, le=1e300)] | None = None
    interval: dict[Name, Annotated[list[float], Field(min_length=2, max_length=2)] | None] = {}
    test: Count
    folds: Count = 0
    own_rows: bool = False
    kept: Annotated[str, Field(pattern="^(before|after|own|constant)$")] = "after"


class _Seen(_Facts):
    numbers: dict[Name, Annotated[list[float], Field(min_length=2, max_length=2)]] = {}
    categories: dict[Name, list[Annotated[str, Field(max_length=16)]]] = {}


class CardFacts(_Described):
    """Facts of a personal model."""

    task: Name
    run: _Run
    adapted: _Adapted
    preparation: dict[str, Any]
    columns: dict[str, Any]
    data: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    score: _Score
    seen: _Seen | None = None
    temperature: Annotated[float, Field(ge=1e-6, le=1e6)] | None = None
    deviation: Number | None = None

    @field_validator("preparation")
    @classmethod
    def _preparation(cls, preparation: dict[str, Any]) -> dict[str, Any]:
        features = preparation.get("features", [])
        # Otherwise one column of a file could become any number of inputs.
        if not isinstance(features, list) or len({str(name) for name in features}) != len(features):
            raise ValueError("must name every column once")
        return preparation

    @field_validator("task")
    @classmethod
    def _task(cls, task: str) -> str:
        if flaw := flaw_of(task):
            raise ValueError(flaw)
        return task


class CheckpointFacts(_Described):
    """Facts of a checkpoint, from a run or from a node."""

    round: Count
    lineage: Name = ""
    run: Name = ""
    adapt: _Adapted | None = None


class _Bytes(_Facts):
    up: Count
    down: Count


class _Seconds(_Facts):
    total: Number
    cpu: Number


class _SoFar(_Facts):
    bytes: _Bytes
    failures: Count
    late: Count
    best: dict[Name, int | float] | None
    best_model: Count | None = Field(None, alias="best-model")
    seconds: _Seconds
    resumed: Annotated[int, Field(ge=0, le=10**6)]
    clip: Number
    joined: Count = 0


class _Validation(_Facts):
    tasks: list[Name]
    lrs: list[Number]


class _Kept(_Facts):
    round: Count
    last: Annotated[float, Field(ge=-1, le=1e300)] | None


class BestFacts(CheckpointFacts):
    """Facts of the best model of a run so far."""

    lineage: Name
    validation: _Validation


class RunFacts(CheckpointFacts):
    """Facts of a checkpoint that a run is resumed from."""

    lineage: Name
    splits: dict[Annotated[str, Field(pattern="^(train|validation|test)$")], list[Name]]
    joined: list[Name] = []
    unused: list[Name] | None = None
    branch: Name = ""
    nodes: Annotated[int, Field(ge=1, le=100_000)]
    in_process: bool = Field(alias="in-process")
    so_far: _SoFar = Field(alias="so-far")
    validation: _Validation | None = None
    kept: _Kept | None = None

    @model_validator(mode="after")
    def _best(self) -> "RunFacts":
        asked = str(self.config.get("metric", "auto"))
        metric = of_kind(self.spec[0]).name if asked == "auto" else asked
        if self.so_far.best is not None and metric not in self.so_far.best:
            raise ValueError(f"`so-far.best` must have a number `{metric}`")
        return self


def check(facts: Mapping[str, Any], form: type[_Facts], what: str) -> None:
    """Raise DataError unless the facts have this form. `what`: "the checkpoint 'a.safetensors'"."""
    try:
        form.model_validate(facts)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "missing":
            raise DataError(f"{what} lacks `{as_told(str(first['loc'][0]), 60)}`: make it anew") from None
        name = ".".join(str(part) for part in first["loc"]) or "facts"
        said = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        raise DataError(
            f"{what} cannot be used: `{as_told(name, 60)}` is not what it should be ({as_told(said, 200)})"
        ) from None


def check_constants(facts: Mapping[str, Any], digest: str, what: str) -> None:
    """Raise DataError unless a model made here has the constants of the one that was trained. `digest`: `Learner.digest`."""
    expected = str(facts.get("constants", ""))
    if digest != expected:
        raise DataError(
            f"{what} was trained with constants (frozen weights) of SHA-256 {expected or '(none)'}, and those of the model "
            f"here have {digest or '(none)'}: name the files of the training, such as `--set weights=FILE`"
        )


def check_size(config: RunConfig, spec: DataSpec, tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise DataError for a built-in model that is much larger than its file. Nothing of that size is allocated.

    `config`: resolved. Raises ConfigError for a model that does not fit the data.
    """
    from quickbloom.common.engine.build import model_for

    name = config.model if config.model != "auto" else model_for(spec, config.algorithm)
    if name not in MODELS or MODELS[name].pretrained or config.weights:
        return  # code or files that the user has named
    if MODELS[name].tokens != bool(spec.tokens):
        raise DataError(f"{what} cannot be used: its model `{name}` is not for such data")
    outputs = ALGORITHMS[config.algorithm].model_outputs(config.table(config.algorithm), spec.outputs)
    parameters, activations = _sizes(config, name, spec, outputs)
    held = sum(value.numel() for name, value in tensors.items() if not name.startswith(ENCODER))
    if parameters > MOST_PARAMETERS + 4 * held or activations > MOST_ACTIVATIONS + 4 * held:
        raise DataError(
            f"{what} cannot be used: by its settings its model has {parameters} parameters and computes {activations} numbers "
            f"for two examples, and the file holds {held}"
        )


def _sizes(config: RunConfig, name: str, spec: DataSpec, outputs: int) -> tuple[int, int]:
    """Return (parameters, activations of all layers for two examples), computed without memory on the device "meta"."""
    made: list[int] = []
    try:
        with torch.device("meta"), torch.no_grad():
            module = build_model(name, config.table(name), spec.input_shape, outputs, config.seed, spec.tokens)
            for layer in module.modules():
                layer.register_forward_hook(lambda _, __, output: made.append(output.numel()))
            x = torch.zeros(2, *spec.input_shape, dtype=torch.int64 if spec.tokens else torch.float32)
            module(x)
    except (ConfigError, DataError):
        raise
    except (RuntimeError, ValueError, TypeError, OverflowError, AttributeError) as error:
        raise DataError(f"its model cannot be built ({as_told(str(error), 100)})") from None
    return sum(value.numel() for value in module.parameters()), sum(made)


def _whole(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _look_through(facts: Any) -> None:
    """Raise ValueError for numbers that are not finite, too many items, or too deep nesting."""
    waiting, seen = [(facts, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if depth > _DEEPEST or seen > _MOST_ITEMS:
            raise ValueError("too many values, or values nested too deeply")
        if isinstance(value, float) and not abs(value) < float("inf"):
            raise ValueError("a number that is not finite")
        if isinstance(value, dict):
            waiting += [(item, depth + 1) for item in value.values()]
        elif isinstance(value, list):
            waiting += [(item, depth + 1) for item in value]
