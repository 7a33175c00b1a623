"""From settings and the form of the data to the algorithm with its model: the same on the server and on every node."""

import torch

from common.algorithms import ALGORITHMS, Algorithm
from common.config import RunConfig
from common.datasets.base import DataSpec
from common.learner import Learner
from common.models import build_model

_CPU = torch.device("cpu")


def build_algorithm(config: RunConfig, spec: DataSpec, device: torch.device = _CPU) -> Algorithm:
    """The algorithm of `config` (resolved) on its freshly initialised model. Raises ConfigError if these do not go together."""
    chosen, options = ALGORITHMS[config.algorithm], config.table(config.algorithm)
    outputs = chosen.model_outputs(options, spec.outputs)
    module = build_model(config.model, config.table(config.model), spec.input_shape, outputs, config.seed)
    return chosen(options, Learner(module.to(device), spec.kind, spec.outputs))
