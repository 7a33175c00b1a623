"""Builds the algorithm and its model from settings and the form of the data, alike on the server and on every node."""

import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from quickbloom.common import registries
from quickbloom.common.algorithms import ALGORITHMS, Algorithm
from quickbloom.common.config.run import RunConfig
from quickbloom.common.datasets.base import DataSpec
from quickbloom.common.datasets.own import is_encoded
from quickbloom.common.engine.round import TaskWork, evaluate, run_round
from quickbloom.common.errors import ConfigError, in_one_line
from quickbloom.common.maths.augmentation import read_augmentation
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import LARGE
from quickbloom.common.models import MODELS, build_model
from quickbloom.common.models.conv4 import SMALLEST_SIDE
from quickbloom.common.models.pretrained import ALL, load_weights
from quickbloom.common.models.pretrained import chosen as to_train
from quickbloom.common.options import Options
from quickbloom.common.randomness import generator

_CPU = torch.device("cpu")
_TRANSDUCTIVE = (
    "With `transductive = true` batch norm compares examples that are predicted together, so scores say nothing of one alone"
)
SMALL = 2**22
"""Bytes of a model below which its numbers are not spared: work without numbers imports torch's compiler, of 100 MB."""


def build_algorithm(config: RunConfig, spec: DataSpec, device: torch.device = _CPU, *, tried: bool = False) -> Algorithm:
    """Return the algorithm of `config` (resolved) on its freshly initialised model. Raises ConfigError for a misfit.

    `tried`: the model was already tested in training and scoring, which takes several times its
    memory, and its parameters will come from elsewhere. What is trained then holds no numbers where the
    algorithm allows that. A user's model is tested in any case, to find how it is to be computed.
    """
    chosen, options = ALGORITHMS[config.algorithm], config.table(config.algorithm)
    model = _model_of(config, spec)
    if augmentation := read_augmentation(config.augment):
        augmentation.check(spec.input_shape)
    if _trains_itself(model):
        module = build_model(model, config.table(model), spec.input_shape, spec.outputs, config.seed)
        learner = Learner(module, spec.kind, spec.outputs)
        learner.remarks.clear()  # what becomes of dropout and batch norm is the app's own business
        return chosen(options, learner)
    ours = model in MODELS and not registries.is_users(chosen)
    foreign = model not in MODELS or registries.is_users(MODELS[model]) or MODELS[model].pretrained
    # A user's model is tried below, which takes numbers.
    bare = tried and ours and not foreign and chosen.starts_from_meta
    learner, own_size = _build_learner(config, spec, bare=bare)
    if own_size:
        options = options.model_copy(update={"embedding": own_size})
    if learner.device.type == "meta":
        learner.drop_numbers()
    # The tests cover large built-in models by small ones.
    learner.reduced = _reduced(config, model, learner)
    learner.transductive = config.transductive
    learner.uses_kernels = not registries.is_users(chosen)
    if learner.transductive and learner.mixes_examples:
        learner.remarks.append(_TRANSDUCTIVE)
    if config.dropout:
        learner.keep_dropout()
        if not tried:
            _try_dropout(learner, model, spec)
    if foreign or not (tried or (ours and _size(learner) >= LARGE)):
        _try_reduced(chosen(_few_steps(options), learner), model, spec)
    learner.to(device)
    if tried and learner.constants and chosen.starts_from_meta:
        learner.drop_numbers()
    return chosen(options, learner)


def _reduced(config: RunConfig, model: str, learner: Learner) -> torch.dtype | None:
    """Return the shorter number type that `inner-dtype` asks for, or None. Raises ConfigError for a model that has none."""
    if config.inner_dtype == "float32":
        return None
    if model in MODELS and not learner.constants:
        raise ConfigError(
            f'`inner-dtype` must be "float32" with `model = "{model}"`, which is small and trained as a whole, by code written '
            f'for float32, got "{config.inner_dtype}": it is for pretrained and partly trained models, and your own'
        )
    return torch.bfloat16


def _try_reduced(algorithm: Algorithm, model: str, spec: DataSpec) -> None:
    """Try a model out as `try_out_with` does; the error for a number type that it cannot be computed in says so."""
    try:
        try_out_with(algorithm, model, spec)
    except ConfigError as error:
        if algorithm.learner.reduced is None:
            raise
        algorithm.learner.reduced = None
        try_out_with(algorithm, model, spec)  # whose error is about more than the number type
        raise ConfigError(
            f'`inner-dtype` must be "float32" with `model = "{model}"`, which cannot be computed in bfloat16 '
            f"({in_one_line(error.__cause__ or error)})"
        ) from error


def _try_dropout(learner: Learner, model: str, spec: DataSpec) -> None:
    """Raise ConfigError unless the model draws random numbers in training, and changes nothing then."""
    subject, before = f'`model = "{model}"`', _versions(learner)
    with learner.training(0), torch.no_grad():
        state = torch.random.get_rng_state()
        try:
            outputs: object = learner.apply(learner.initial(), _made_up(spec).to(learner.device))
        except Exception as error:  # the user's code may raise anything
            raise ConfigError(
                f"`dropout` must be false with {subject}, which raised {in_one_line(error)} in training mode: leave it out"
            ) from error
        same = torch.equal(torch.random.get_rng_state(), state)
    if not isinstance(outputs, Tensor):
        raise ConfigError(
            f"`dropout` must be false with {subject}, which returned a {type(outputs).__name__} in training mode: leave it out"
        )
    if same:
        raise ConfigError(
            f"`dropout` must be false with {subject}, which has no dropout: leave it out, or choose another `model`"
        )
    if changed := [name for name, version in _versions(learner).items() if before.get(name) != version]:
        raise ConfigError(
            f"`dropout` must be false with {subject}, which changes its buffer `{changed[0]}` in training mode, and all tasks "
            "share it: leave it out"
        )


def constants_of(config: RunConfig, spec: DataSpec) -> str:
    """Return the SHA-256 of the constants of the model of `config` (resolved), see `Learner.digest`; "" if it has none.

    Raises ConfigError as `build_algorithm` does.
    """
    model = _model_of(config, spec)
    if _trains_itself(model):
        return build_algorithm(config, spec).learner.digest
    if model in MODELS and not MODELS[model].pretrained and not registries.is_users(MODELS[model]) and config.trainable == ALL:
        return ""
    return _build_learner(config, spec, bare=False)[0].digest


def _trains_itself(model: str) -> bool:
    """Return whether a Flower app trains the model by code of its own, so that it needs no tests here."""
    return model in MODELS and MODELS[model].own_trainer


def _model_of(config: RunConfig, spec: DataSpec) -> str:
    return config.model if config.model != "auto" else model_for(spec, config.algorithm)


def _build_learner(config: RunConfig, spec: DataSpec, *, bare: bool) -> tuple[Learner, int]:
    """Return the model with its weights, after one forward pass, and the size of its own embedding, 0 if it makes none.

    `bare`: as a structure without numbers, on the device "meta", if it is large and has nothing but what is trained.
    """
    chosen, model = ALGORITHMS[config.algorithm], _model_of(config, spec)
    outputs = chosen.model_outputs(config.table(config.algorithm), spec.outputs)
    _check_inputs(model, spec)
    own_size = MODELS[model].embedding(config.table(model), spec.input_shape) if chosen.embeds and model in MODELS else 0
    bare = bare and config.trainable == ALL and not MODELS[model].pretrained
    # On the device "meta" tensors have shapes and no numbers.
    with torch.device("meta") if bare else nullcontext():
        made = 0 if own_size else outputs
        module = build_model(model, config.table(model), spec.input_shape, made, config.seed, spec.tokens)
        learner = Learner(module, spec.kind, spec.outputs)
        small = bare and _size(learner) < SMALL
        if not small:
            try_out(learner, model, spec, own_size or outputs)
    if small:
        return _build_learner(config, spec, bare=False)
    if bare and learner.constants:
        return _build_learner(config, spec, bare=False)
    if config.weights and not bare and (said := load_weights(module, config.weights, learner.ran[-1])):
        learner.remarks.append(said)
    if config.trainable != ALL:
        learner.freeze(to_train(module, config.trainable, learner.ran[-1]))
    if not learner.trained:
        raise ConfigError(
            f'`model = "{model}"` must have parameters to train, got a module that is frozen as a whole: let it train some of '
            "them (`requires_grad`), or name them with `trainable`"
        )
    return learner, own_size


def _size(learner: Learner) -> int:
    return sum(value.nbytes for value in learner.module.parameters())


def model_for(spec: DataSpec, algorithm: str) -> str:
    """Return the model recommended for inputs of this shape: conv4 for images that are large enough, else the algorithm's own.

    For the features of a frozen encoder it is a linear one, or starts from them as they are: fresh layers lose to that. Token
    ids need a pretrained transformer. It depends on what server and nodes both know.
    """
    if spec.tokens:
        return "transformer"
    if is_encoded(spec) and ALGORITHMS[algorithm].model_for_tables != "linear":
        return "residual"
    images = len(spec.input_shape) == 3 and min(spec.input_shape[1:]) >= SMALLEST_SIDE
    return "conv4" if images else ALGORITHMS[algorithm].model_for_tables


def _check_inputs(model: str, spec: DataSpec) -> None:
    """Raise ConfigError if one side has tokens and the other numbers. A user's model is checked by trying it."""
    if model in MODELS and MODELS[model].tokens != bool(spec.tokens):
        reads, come = ("token ids", "numbers") if MODELS[model].tokens else ("numbers", "token ids")
        raise ConfigError(
            f'`model = "{model}"` reads {reads}, but the inputs of these data, of shape {spec.input_shape}, are {come}: choose '
            '`model = "auto"`, which fits the data set'
        )


def try_out(learner: Learner, model: str, spec: DataSpec, outputs: int) -> None:
    """Run the model once on two made-up examples, so that a misfit is found before training. Note which layer is last.

    Raises ConfigError with a sentence about the setting `model`. The global random state is not
    changed.
    """
    shape, x = (2, *spec.input_shape), _made_up(spec)
    subject = f'`model = "{model}"`'
    expected = f"{subject} must map {'int64 token ids' if spec.tokens else 'float32 inputs'} of shape {shape}"
    expected += f" to outputs of shape {(2, outputs)}"
    parameters = list(learner.module.parameters())
    if not parameters or any(is_lazy(value) for value in parameters):
        found = "lazy ones, without a shape" if parameters else "a module without any"
        raise ConfigError(f"{subject} must have parameters to train, got {found}")
    params = learner.initial()
    with torch.random.fork_rng(devices=[]):
        try:
            learner.apply(params, x)  # once for what a module may prepare when it first runs
            before = _versions(learner)
            with _watching(learner):
                result: object = learner.apply(params, x)
        except Exception as error:  # the user's code may raise anything
            raise ConfigError(f"{expected}, but it raised {in_one_line(error)}") from error
        if changed := [name for name, version in _versions(learner).items() if before.get(name) != version]:
            raise ConfigError(
                f"{subject} must leave its buffers as they are in evaluation mode, since all tasks share them, and it changes "
                f"`{changed[0]}`: leave that out"
            )
        if not isinstance(result, Tensor):
            raise ConfigError(f"{expected}, got a {type(result).__name__}")
        if result.shape != (2, outputs) or not result.is_floating_point():
            raise ConfigError(f"{expected}, got {result.dtype} of shape {tuple(result.shape)}")


def _versions(learner: Learner) -> dict[str, tuple[int, int]]:
    """Return for every constant what changes when another tensor takes its place, or it is written to."""
    return {name: (id(value), value._version) for name, value in learner.module.named_buffers()}


@contextmanager
def _watching(learner: Learner) -> Iterator[None]:
    """Record in which order layers with parameters run; the last one need not be the one made last."""

    def note(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            learner.ran = [*(other for other in learner.ran if other != name), name]

        return hook

    layers = [(name, module) for name, module in learner.module.named_modules() if list(module.parameters(recurse=False))]
    handles = [module.register_forward_hook(note(name)) for name, module in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def try_out_with(algorithm: Algorithm, model: str, spec: DataSpec) -> None:
    """Train and score once, as a node does, on two tasks of two made-up examples, and note how the model is to be computed.

    A model that `torch.func.vmap` cannot map goes task by task, and one whose fused attention lacks a derivative takes
    torch's plain one. Raises ConfigError if nothing helps.
    """
    learner, users = algorithm.learner, registries.is_users(type(algorithm))
    reasons: list[Exception] = []
    unmapped = ""
    for ways in _WAYS[:1] if users and model in MODELS else _WAYS:
        learner.maps, learner.plain_attention = ways.maps, ways.plain_attention
        try:
            _try_once(algorithm, spec, slow=ways.slow)
        except Exception as error:  # the user's code may raise anything
            reasons.append(error)
            unmapped = in_one_line(error) if ways.maps else unmapped
        else:
            if not learner.maps:
                learner.remarks.append(
                    f'`model = "{model}"` cannot be mapped over tasks by torch.func.vmap ({unmapped}), so every node '
                    "computes its tasks one after the other, which takes longer"
                )
            return
    learner.maps, learner.plain_attention = True, False
    if users and model in MODELS:
        raise ConfigError(
            f'`algorithm = "{algorithm.name}"` must work under torch.func.vmap, without `if`, `float()` or `.item()` '
            f"on a tensor and without changes in place, but it raised {in_one_line(reasons[0])}{_where(reasons[0])}"
        ) from reasons[0]
    raise ConfigError(
        f'`model = "{model}"` must be differentiable by torch.func as often as `algorithm = "{algorithm.name}"` needs it, but '
        f"it raised {in_one_line(reasons[-1])}: leave out random operations, and changes in place of what depends on parameters"
    ) from reasons[-1]


@dataclass(frozen=True)
class _Way:
    """A way to compute a model. `slow`: also if vmap maps some operation of it by a loop of its own."""

    maps: bool
    plain_attention: bool
    slow: bool = True


_WAYS = (_Way(True, False, False), _Way(True, True, False), _Way(True, False), _Way(False, False), _Way(False, True))
"""The fastest first."""
_NO_RULE = "There is a performance drop"


def _try_once(algorithm: Algorithm, spec: DataSpec, *, slow: bool) -> None:
    y = torch.zeros(2, dtype=torch.int64) if spec.kind == "classification" else torch.zeros(2, spec.outputs)
    batch = Batch.of(_made_up(spec), y)
    data = TaskData(batch, batch, batch)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore" if slow else "error", message=_NO_RULE)
        meta, state = algorithm.init(), torch.random.get_rng_state()
        # Two tasks, since a single one is not mapped.
        run_round(algorithm, meta, [TaskWork(data, generator(0, "try")) for _ in range(2)], chunk_size=2)
        evaluate(algorithm, meta, [[data]] * 2, [algorithm.options.inner_lr], steps=1, chunk_size=2)
        if not torch.equal(torch.random.get_rng_state(), state):
            raise RuntimeError("it called a random operation")


def _where(error: Exception) -> str:
    """Return the last line of user code in the traceback of `error`: " (my_algorithm.py, line 31)"; "" if there is none."""
    others = (str(Path(__file__).parent), str(Path(torch.__file__).parents[1]), sysconfig.get_path("stdlib"))
    # Not extract_tb, which `sys.tracebacklimit` cuts short.
    frames = ((frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__))
    own = [f" ({Path(file).name}, line {line})" for file, line in frames if not file.startswith(others)]
    return own[-1] if own else ""


def _made_up(spec: DataSpec) -> Tensor:
    shape = (2, *spec.input_shape)
    # The largest id finds an embedding that is too small.
    return torch.full(shape, spec.tokens - 1) if spec.tokens else torch.zeros(shape)


def _few_steps(options: Options) -> Options:
    """Return the options with at most two steps or epochs of every kind, which find the same errors as a thousand."""
    few = {name: min(2, value) for name, value in options if name.endswith(("_steps", "_epochs"))}
    return options.model_copy(update=few)
