"""Builds the algorithm and its model from settings and the form of the data, alike on the server and on every node."""

import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from quickbloom.common import registries
from quickbloom.common.algorithms import ALGORITHMS, Algorithm
from quickbloom.common.config.run import RunConfig
from quickbloom.common.datasets.base import DataSpec
from quickbloom.common.engine.round import TaskWork, evaluate, run_round
from quickbloom.common.errors import ConfigError, in_one_line
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import LARGE
from quickbloom.common.models import MODELS, build_model
from quickbloom.common.models.conv4 import SMALLEST_SIDE
from quickbloom.common.options import Options
from quickbloom.common.randomness import generator

_CPU = torch.device("cpu")


def build_algorithm(config: RunConfig, spec: DataSpec, device: torch.device = _CPU, *, tried: bool = False) -> Algorithm:
    """Return the algorithm of `config` (resolved) on its freshly initialised model. Raises ConfigError for a misfit.

    `tried`: the model was already tested in training and scoring, which takes several times its
    memory, and its parameters will come from elsewhere. The model then holds no numbers where the
    algorithm allows that.
    """
    model = config.model if config.model != "auto" else model_for(spec, config.algorithm)
    chosen, options = ALGORITHMS[config.algorithm], config.table(config.algorithm)
    outputs = chosen.model_outputs(options, spec.outputs)
    _check_inputs(model, spec)
    ours = model in MODELS and not registries.is_users(chosen)
    # On the device "meta" tensors have shapes and no numbers.
    with torch.device("meta") if tried and ours and chosen.starts_from_meta else nullcontext():
        module = build_model(model, config.table(model), spec.input_shape, outputs, config.seed, spec.tokens)
        learner = Learner(module, spec.kind, spec.outputs)
        try_out(learner, model, spec, outputs)
    if learner.device.type == "meta":
        learner.drop_numbers()
    if not tried and not (ours and _size(learner) >= LARGE):  # the tests cover the large ones by small ones
        try_out_with(chosen(_few_steps(options), learner), model, spec)
    learner.to(device)
    return chosen(options, learner)


def _size(learner: Learner) -> int:
    return sum(value.nbytes for value in learner.module.parameters())


def model_for(spec: DataSpec, algorithm: str) -> str:
    """Return the model recommended for inputs of this shape: conv4 for images that are large enough, else the algorithm's own.

    It depends on what server and nodes both know.
    """
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
            with _watching(learner):
                result: object = learner.apply(params, x)
        except Exception as error:  # the user's code may raise anything
            raise ConfigError(f"{expected}, but it raised {in_one_line(error)}") from error
        if not isinstance(result, Tensor):
            raise ConfigError(f"{expected}, got a {type(result).__name__}")
        if result.shape != (2, outputs) or not result.is_floating_point():
            raise ConfigError(f"{expected}, got {result.dtype} of shape {tuple(result.shape)}")


@contextmanager
def _watching(learner: Learner) -> Iterator[None]:
    """Record which layer with parameters runs last; that need not be the layer made last."""

    def note(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            learner.last_layer = name

        return hook

    layers = [(name, module) for name, module in learner.module.named_modules() if list(module.parameters(recurse=False))]
    handles = [module.register_forward_hook(note(name)) for name, module in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def try_out_with(algorithm: Algorithm, model: str, spec: DataSpec) -> None:
    """Run training and scoring once, as a node does, on two made-up examples. Raises ConfigError."""
    y = torch.zeros(2, dtype=torch.int64) if spec.kind == "classification" else torch.zeros(2, spec.outputs)
    batch = Batch.of(_made_up(spec), y)
    data = TaskData(batch, batch, batch)
    meta = algorithm.init()
    with torch.random.fork_rng(devices=[]):
        try:
            run_round(algorithm, meta, [TaskWork(data, generator(0, "try"))], chunk_size=1)
            evaluate(algorithm, meta, [[data]], [algorithm.options.inner_lr], steps=1, chunk_size=1)
        except Exception as error:  # the user's code may raise anything
            if model in MODELS and registries.is_users(type(algorithm)):
                raise ConfigError(
                    f'`algorithm = "{algorithm.name}"` must work under torch.func.vmap, without `if`, `float()` or `.item()` '
                    f"on a tensor and without changes in place, but it raised {in_one_line(error)}{_where(error)}"
                ) from error
            raise ConfigError(
                f'`model = "{model}"` must work under torch.func.vmap and be differentiable as often as '
                f'`algorithm = "{algorithm.name}"` needs it, but it raised {in_one_line(error)}: leave out dropout, changes in '
                "place, torch's own recurrent layers and fused attention"
            ) from error


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
    """Return the options with at most two steps of every kind, which find the same errors as a thousand."""
    few = {name: min(2, value) for name, value in options if name.endswith("_steps")}
    return options.model_copy(update=few)
