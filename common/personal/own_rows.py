"""A personal model from a task's own rows alone: ridge regression, or the constant, where the federation's model is worse.

Both are linear in the prepared inputs, so they are kept as what `algorithm = "local"` keeps with `model = "linear"`, one layer,
and are loaded, used, explained and exported like any other personal model.
"""

import numpy as np
import torch

from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.datasets.base import DataSpec
from quickbloom.common.datasets.own.text import Array
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.maths.batch import Batch
from quickbloom.common.maths.linear_head import LinearHead
from quickbloom.common.maths.params import Params
from quickbloom.common.personal.cross_validation import CONSTANT, constant, fitted


def config_of(config: RunConfig) -> RunConfig:
    """Return the settings of such a model for the data set of `config`, resolved."""
    return parse_run_config({"algorithm": "local", "model": "linear", "dataset": config.dataset}).resolved()


def tensors_of(name: str, support: Batch, spec: DataSpec, config: RunConfig) -> Params:
    """Return the tensors of "own" or "constant" for the rows of a task.

    `config`: see `config_of`. The outputs are values, or logits of the classes.
    """
    head = LinearHead(build_algorithm(config, spec).learner, config.algorithm)
    return head.replaced({}, torch.from_numpy(_matrix(name, support, spec, head.size)).float())


def _matrix(name: str, support: Batch, spec: DataSpec, size: int) -> Array:
    """Return A [inputs + 1, outputs]: the last row is the intercept."""
    classes = spec.outputs if spec.kind == "classification" else 0
    if name == CONSTANT:
        intercept = constant(support.y, classes)
        return np.concatenate([np.zeros((size - 1, len(intercept))), intercept[None]])
    ridge = fitted(support, classes)
    return ridge.scale * np.concatenate([ridge.coefficients, ridge.intercept[None]])
