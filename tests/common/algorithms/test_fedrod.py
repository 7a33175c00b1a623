"""FedRoD against plain torch with two separate heads and a detached feature."""

import pytest
import torch
from plain_torch import Weights, close, leaves, moved, random_episode, tanh_learner
from rounds import ROUNDS, batches, tasks, trained, whole
from torch import Tensor, nn

from quickbloom.common.algorithms.fedrod import FedRod
from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.batch import Batch
from quickbloom.common.maths.learner import Learner


def fedrod() -> FedRod:
    options = {"inner-lr": 0.2, "inner-steps": 4, "batch-size": 3}
    return FedRod(FedRod.Options.model_validate(options), tanh_learner("classification"))


def balanced(outputs: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    """- log (n_y exp(o_y) / sum of n_c exp(o_c))."""
    shares = counts * outputs.exp()
    return -(shares[torch.arange(len(y)), y] / shares.sum(dim=1)).log().mean()


def both(generic: Weights, personal: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of the generic head, and of both together without a gradient to features and generic head."""
    w1, b1, w2, b2 = generic
    features = torch.tanh(x @ w1.T + b1)
    outputs = features @ w2.T + b2
    return outputs, outputs.detach() + features.detach() @ personal[0].T + personal[1]


def plain_step(generic: Weights, personal: Weights, batch: Batch, counts: Tensor, lr: float) -> tuple[Weights, Weights]:
    generic, personal = ([value.detach().requires_grad_() for value in some] for some in (generic, personal))
    one, two = both(generic, personal, batch.x)
    loss = balanced(one, batch.y, counts) + nn.functional.cross_entropy(two, batch.y)
    slopes = torch.autograd.grad(loss, [*generic, *personal])
    return moved(generic, slopes[:4], lr), moved(personal, slopes[4:], lr)


def test_rounds_with_state_equal_plain_torch_with_two_heads() -> None:
    algorithm, data = fedrod(), tasks("classification")
    theta = leaves(algorithm.init())
    zero = [torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)]
    personal = dict.fromkeys(range(3), zero)
    for number, chosen in enumerate(ROUNDS, 1):
        ends, sizes = [], []
        for t in chosen:
            examples, phi = whole(data[t]), theta
            counts = torch.bincount(examples.y, minlength=3).double()
            for batch in batches(algorithm, data, number, t):
                phi, personal[t] = plain_step(phi, personal[t], batch, counts, 0.2)
            ends.append(phi)
            sizes.append(len(examples.x))
        theta = [
            torch.as_tensor(sum(n * end[i] for n, end in zip(sizes, ends, strict=True)) / sum(sizes)).detach() for i in range(4)
        ]
    meta, kept = trained(algorithm, data)
    assert close(meta, theta, atol=1e-10)
    for t, head in personal.items():
        assert close(kept[t], head, atol=1e-10)
        predicted = algorithm.predict(next(algorithm.personal_path(meta, kept[t], data[t].support, 0.1, 0)), data[t].test.x)
        assert torch.allclose(predicted, both(theta, head, data[t].test.x)[1], rtol=0, atol=1e-9)


def test_a_new_task_starts_at_the_generic_model_and_moves_the_personal_head_alone() -> None:
    algorithm, support = fedrod(), random_episode("classification").support
    meta = algorithm.init()
    first, second = algorithm.adaptation_path(meta, support, 0.3, 1)
    assert close(first, list(meta.values()), atol=0)
    zero = [torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)]
    _, head = plain_step(leaves(meta), zero, support, torch.ones(3), 0.3)
    assert close(
        second, [*list(meta.values())[:2], *(a + b for a, b in zip(list(meta.values())[2:], head, strict=True))], 1e-12
    )


def test_a_model_whose_last_layer_is_not_linear_is_refused() -> None:
    learner = Learner(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)).double(), "classification", 3)
    with pytest.raises(ConfigError, match=r'`algorithm = "fedrod"` adds a personal layer to the last layer of the model'):
        FedRod(FedRod.Options.model_validate({"inner-lr": 0.1}), learner)
