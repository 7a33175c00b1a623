"""What a model predicts for the test rows of many tasks, before and after adaptation: as `engine.round.evaluate`, but outputs."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import vmap

from quickbloom.common.algorithms.base import Algorithm
from quickbloom.common.baselines.scoring import Outputs
from quickbloom.common.engine.chunking import AutoChunks, chunks
from quickbloom.common.engine.round import stack
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.maths.params import Params


def predict_tests(
    algorithm: Algorithm, meta: Params, draws: Sequence[TaskData], lr: float, steps: int, chunk_size: int | AutoChunks
) -> list[Outputs]:
    """Return the outputs for the test part of every draw, before adaptation to its support and after `steps` steps with `lr`."""
    device = algorithm.learner.device
    knows = type(algorithm).deviation is not Algorithm.deviation

    def outputs(theta: Params, support: Batch, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        before = None
        for phi in algorithm.passing_path(theta, support, lr, steps):
            if before is None:
                before = algorithm.predict(phi, x)
        after, deviation = algorithm.predict(phi, x), algorithm.deviation(phi, x)
        return before, after, after.new_zeros(after.shape[0], 1) if deviation is None else deviation

    found: list[Outputs | None] = [None] * len(draws)
    sizes = [(len(draw.support.x), len(draw.test.x)) for draw in draws]
    with torch.no_grad():
        for positions in chunks(sizes, chunk_size, exact=algorithm.learner.mixes_examples):
            support = stack([draws[i].support for i in positions], device)
            test = stack([draws[i].test for i in positions], device)
            parts = [part.double().cpu().numpy() for part in vmap(outputs, in_dims=(None, 0, 0))(meta, support, test.x)]
            for place, i in enumerate(positions):
                before, after, deviation = (part[place, : sizes[i][1]] for part in parts)
                found[i] = Outputs(before, after, deviation[:, 0] if knows else None)
    return [one for one in found if one is not None]
