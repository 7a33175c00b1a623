"""Epochs in place of steps: a task with more examples takes more steps, as the benchmarks of personalised learning have it."""

from math import prod

import numpy as np
import pytest
import torch
from plain_torch import LOSSES, close, leaves, random_episode, sgd, tanh_learner, together
from pydantic import ValidationError
from torch import Tensor, nn

from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.algorithms.heads import Heads
from quickbloom.common.algorithms.local import Local
from quickbloom.common.engine.round import TaskWork, run_round
from quickbloom.common.maths.batch import Batch, Minibatches, TaskData
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params
from quickbloom.common.models.cnn import Cnn, CnnOptions

ROWS = torch.tensor([[0, 7, 3], [10, 1, 8], [2, 9, 4], [5, 6, 0]])


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1)


def client(target: float, support: int, query: int) -> TaskWork:
    """All examples are (1, target), so that a step of rate r moves w to target + (1 - 2r) (w - target), whatever it draws."""
    seen, asked = (Batch.of(column(*[1.0] * size), column(*[target] * size)) for size in (support, query))
    return TaskWork(TaskData(seen, asked, asked), np.random.default_rng(0))


def on_one_weight(name: str, **settings: float) -> tuple[object, Params]:
    options = ALGORITHMS[name].Options.model_validate({"inner_lr": 0.1, **settings})
    algorithm = ALGORITHMS[name](options, Learner(nn.Linear(1, 1, bias=False).double(), "regression"))
    return algorithm, {"weight": column(1)}


@pytest.mark.parametrize("chunk_size", [1, 64])
def test_tasks_of_unlike_size_take_unlike_many_steps_by_hand(chunk_size: int) -> None:
    # Batches of 2, 3 epochs: 5, 12 and 1 examples are 2, 6 and 1 batches an epoch. The fourth is as large as the first.
    algorithm, meta = on_one_weight("fedavg", batch_size=2, local_epochs=3)
    clients = [(3.0, 2, 3, 6), (-5.0, 8, 4, 18), (1.5, 1, 1, 3), (4.0, 3, 2, 6)]
    result = run_round(algorithm, meta, [client(*of[:3]) for of in clients], chunk_size)  # type: ignore[arg-type]
    ends = [target + 0.8**steps * (1 - target) for target, _, _, steps in clients]
    sizes = [support + query for _, support, query, _ in clients]
    mean = sum(size * (1 - end) for size, end in zip(sizes, ends, strict=True)) / sum(sizes)
    assert result.gradient["weight"].item() == pytest.approx(mean, abs=1e-12)
    assert result.losses == pytest.approx([(end - of[0]) ** 2 for end, of in zip(ends, clients, strict=True)], abs=1e-12)
    assert result.weight == sum(sizes)


@pytest.mark.parametrize("chunk_size", [1, 64])
def test_perfedavg_counts_its_meta_steps_in_epochs_by_hand(chunk_size: int) -> None:
    # Two batches of 2 a step: 5, 13 and 3 examples are 1, 3 and 1 steps an epoch. A step from w by the first order:
    # w - 2 a (w - y) after the inner one, then w - 2 b (1 - 2 a) (w - y), with a = .1 and b = .25: .6 times the distance.
    settings = {"batch_size": 2, "local_epochs": 2, "local_lr": 0.25, "variant": "fo"}
    algorithm, meta = on_one_weight("perfedavg", **settings)  # type: ignore[arg-type]
    clients = [(3.0, 2, 3, 2), (-5.0, 9, 4, 6), (1.5, 2, 1, 2)]
    result = run_round(algorithm, meta, [client(*of[:3]) for of in clients], chunk_size)  # type: ignore[arg-type]
    ends = [target + 0.6**steps * (1 - target) for target, _, _, steps in clients]
    weights = [algorithm.weight(support + query) for _, support, query, _ in clients]  # type: ignore[attr-defined]
    mean = sum(weight * (1 - end) for weight, end in zip(weights, ends, strict=True)) / sum(weights)
    assert result.gradient["weight"].item() == pytest.approx(mean, abs=1e-12)


def test_pfedme_counts_its_local_rounds_in_epochs_by_hand() -> None:
    # One proximal step of rate a from w: phi = (w - 2 a (w - y) + a lambda w) / (1 + a lambda), so w - phi = .2 / 1.01 (w - y).
    # Then w moves by eta lambda (w - phi) = .5 * .2 / 1.01 (w - y), in 2 epochs of 2 batches.
    settings = {"batch_size": 2, "local_epochs": 2, "inner_steps": 1, "local_lr": 5.0, "strength": 0.1}
    algorithm, meta = on_one_weight("pfedme", **settings)
    result = run_round(algorithm, meta, [client(3.0, 3, 2)], 64)  # type: ignore[arg-type]
    assert 1 - result.gradient["weight"].item() == pytest.approx(3 + (1 - 0.1 / 1.01) ** 4 * (1 - 3), abs=1e-12)


def test_scaffold_divides_by_the_steps_that_were_taken_by_hand() -> None:
    # 6 steps, since 5 examples are 2 batches of 2, three times: the task's control is the mean of its gradients.
    algorithm, meta = on_one_weight("scaffold", batch_size=2, local_epochs=3)
    meta |= {"control/weight": column(0)}
    result = run_round(algorithm, meta, [client(3.0, 2, 3)], 64)  # type: ignore[arg-type]
    end = 3 + 0.8**6 * (1 - 3)
    assert result.kept[0]["weight"].item() == pytest.approx((1 - end) / (6 * 0.1), abs=1e-12)


def test_fedrep_moves_the_head_for_its_epochs_and_then_the_body() -> None:
    walk, episode = Minibatches(ROWS, torch.ones(4, 3, dtype=torch.float64)), random_episode("classification")
    epochs = {"inner-lr": 0.2, "batch-size": 3, "local-epochs": 1, "head-epochs": 1}
    steps = {"inner-lr": 0.2, "inner-steps": 2, "head-steps": 2}
    of_epochs, of_steps = (Heads(Heads.Options.model_validate(of), tanh_learner("classification")) for of in (epochs, steps))
    found, expected = (of.contribute(of.init(), of.fresh(), episode, walk) for of in (of_epochs, of_steps))
    assert close(found[0], list(expected[0].values()), atol=0)
    assert close(found[2], list(expected[2].values()), atol=0)
    drawn = of_epochs.minibatch_indices(7, np.random.default_rng(0))
    assert drawn.shape == (4, 3)
    assert all(len({*drawn[i], *drawn[i + 1]}) == 6 for i in (0, 2))  # no example twice in an epoch


@pytest.mark.parametrize("wrong", [{"head-epochs": 1}, {"head-epochs": 1, "local-epochs": 1, "head-steps": 1}])
def test_epochs_beside_steps_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match=r"heads\.head-epochs.*local-epochs"):
        Heads.Options.model_validate(wrong)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_local_model_that_is_kept_goes_on_where_it_stopped(kind: str) -> None:
    algorithm = Local(Local.Options.model_validate({"inner-lr": 0.2, "keep": True}), tanh_learner(kind))
    episode, walk = random_episode(kind), Minibatches(ROWS, torch.ones(4, 3, dtype=torch.float64))
    batches = [Batch(*(part[rows] for part in together(episode))) for rows in ROWS]
    kept = algorithm.fresh()
    for _ in range(2):
        gradient, _, kept = algorithm.contribute({}, kept, episode, walk)
        assert gradient == {}
    assert close(kept, sgd(LOSSES[kind], leaves(tanh_learner(kind).initial()), batches * 2, 0.2), atol=1e-12)
    path = list(algorithm.personal_path({}, kept, episode.support, 0.3, 1))
    assert close(path[0], list(kept.values()), atol=0)
    assert close(path[1], sgd(LOSSES[kind], leaves(kept), [episode.support], 0.3), atol=1e-12)


def test_the_cnn_has_the_size_of_the_benchmarks() -> None:
    # PFLlib's on Fashion-MNIST: 1 * 32 * 25 + 32, 32 * 64 * 25 + 64, 1024 * 512 + 512, 512 * 10 + 10.
    module = Cnn.build(CnnOptions(), (1, 28, 28), 10)
    expected = [(32, 1, 5, 5), (32,), (64, 32, 5, 5), (64,), (512, 1024), (512,), (10, 512), (10,)]
    assert [tuple(value.shape) for value in module.parameters()] == expected
    assert sum(map(prod, expected)) == 582026
