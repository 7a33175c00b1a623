"""From settings and the form of the data to the algorithm with its model: the same on the server and on every node."""

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.parameter import is_lazy

from common.algorithms import ALGORITHMS, Algorithm
from common.config import RunConfig
from common.datasets.base import DataSpec
from common.errors import ConfigError, in_one_line
from common.learner import Learner
from common.models import MODELS, build_model
from common.params import Params

_CPU = torch.device("cpu")


def build_algorithm(config: RunConfig, spec: DataSpec, device: torch.device = _CPU) -> Algorithm:
    """The algorithm of `config` (resolved) on its freshly initialised model. Raises ConfigError if these do not go together."""
    chosen, options = ALGORITHMS[config.algorithm], config.table(config.algorithm)
    outputs = chosen.model_outputs(options, spec.outputs)
    _check_inputs(config.model, spec)
    module = build_model(config.model, config.table(config.model), spec.input_shape, outputs, config.seed)
    learner = Learner(module, spec.kind, spec.outputs)
    try_out(learner, config.model, spec, outputs)
    module.to(device)
    return chosen(options, learner)


def _check_inputs(model: str, spec: DataSpec) -> None:
    """Tokens only for the models that read tokens; what the user's own one reads is not known before it is tried."""
    if model in MODELS and MODELS[model].tokens != spec.tokens:
        reads, come = ("token ids", "numbers") if MODELS[model].tokens else ("numbers", "token ids")
        raise ConfigError(
            f'`model = "{model}"` reads {reads}, but the inputs of these data, of shape {spec.input_shape}, are {come}: choose '
            '`model = "auto"`, which fits the data set'
        )


def try_out(learner: Learner, model: str, spec: DataSpec, outputs: int) -> None:
    """Run the model once on two made-up examples, alone and as the nodes do: a misfit is found before anything is trained.

    Raises ConfigError with a sentence about the setting `model`. The global random state stays as it is.
    """
    shape = (2, *spec.input_shape)
    # The largest id, which an embedding that is too small does not have.
    x = torch.full(shape, spec.outputs - 1) if spec.tokens else torch.zeros(shape)
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
            result: object = learner.apply(params, x)
        except Exception as error:  # the user's code may raise anything
            raise ConfigError(f"{expected}, but it raised {in_one_line(error)}") from error
        if not isinstance(result, Tensor):
            raise ConfigError(f"{expected}, got a {type(result).__name__}")
        if result.shape != (2, outputs) or not result.is_floating_point():
            raise ConfigError(f"{expected}, got {result.dtype} of shape {tuple(result.shape)}")
        try:
            _outputs_and_slopes_of_a_stack(learner, params, x)
        except Exception as error:  # see above
            raise ConfigError(
                f"{subject} must work under torch.func.vmap and grad, which compute all tasks of a node at once, but it raised "
                f"{in_one_line(error)}: leave out dropout, changes in place and torch's own recurrent layers"
            ) from error


def _outputs_and_slopes_of_a_stack(learner: Learner, params: Params, x: Tensor) -> None:
    """What a node computes, for one task: scores and gradients, with parameters and examples of the task's own."""

    def outputs_and_slopes(params: Params, x: Tensor) -> tuple[Tensor, Params]:
        return learner.apply(params, x), grad(lambda params: learner.apply(params, x).square().sum())(params)

    # As for held-out tasks: without a graph around it torch takes other ways, which may not be mapped where the usual ones are.
    with torch.no_grad():
        vmap(outputs_and_slopes, randomness="error")({name: value[None] for name, value in params.items()}, x[None])
