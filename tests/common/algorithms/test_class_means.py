"""FedProto and FedPAC against plain torch: rounds in which class means travel, some classes with some tasks alone."""

import pytest
import torch
import torch.nn.functional as F
from plain_torch import Weights, close, cross_entropy, leaves, line_learner, moved, random_episode, tanh_learner, tanh_outputs
from rounds import ROUNDS, batches, tasks, trained, whole
from torch import Tensor, nn

from quickbloom.common.algorithms.fedpac import FedPac
from quickbloom.common.algorithms.fedproto import FedProto
from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.maths.class_means import KNOWN, MEANS
from quickbloom.common.maths.learner import Learner

OPTIONS = {"inner-lr": 0.2, "inner-steps": 3, "batch-size": 3, "strength": 0.6}
Means = dict[int, Tensor]


def fedproto() -> FedProto:
    return FedProto(FedProto.Options.model_validate(OPTIONS), tanh_learner("classification"))


def fedpac() -> FedPac:
    return FedPac(FedPac.Options.model_validate({**OPTIONS, "head-steps": 2}), tanh_learner("classification"))


def features(weights: Weights, x: Tensor) -> Tensor:
    return torch.tanh(x @ weights[0].T + weights[1])


def step(weights: Weights, batch: Batch, means: Means, moving: slice, strength: float = 0.6) -> Weights:
    """One step of some tensors on the loss and the distance of every example to the mean of its class, if it has one."""
    weights = [value.detach().requires_grad_() for value in weights]
    loss, found = cross_entropy(weights, batch), features(weights, batch.x)
    for i, label in enumerate(batch.y.tolist()):
        if label in means:
            loss = loss + strength * F.mse_loss(found[i], means[label]) / len(batch.y)
    weights[moving] = moved(weights[moving], torch.autograd.grad(loss, weights[moving]), 0.2)
    return weights


def pooled(models: dict[int, Weights], data: list[TaskData], chosen: tuple[int, ...], before: Means) -> Means:
    """The mean over all examples of a class of the tasks of a round."""
    found = torch.cat([features(models[t], whole(data[t]).x).detach() for t in chosen])
    labels = torch.cat([whole(data[t]).y for t in chosen])
    return before | {label: found[labels == label].mean(0) for label in range(3) if (labels == label).any()}


def rare() -> list[TaskData]:
    """Class 2 with the first task alone, which is not in all rounds."""
    data = tasks("classification")
    third = [Batch(part.x, part.y % 2, part.weight) for part in (data[2].support, data[2].query, data[2].test)]
    return [data[0], data[1], TaskData(*third)]


def test_fedprotos_rounds_equal_plain_torch() -> None:
    algorithm, data = fedproto(), rare()
    own = dict.fromkeys(range(3), leaves(algorithm.fresh()))
    means: Means = {}
    for number, chosen in enumerate(ROUNDS, 1):
        for t in chosen:
            for batch in batches(algorithm, data, number, t):
                own[t] = step(own[t], batch, means, slice(0, 4))
        means = pooled(own, data, chosen, means)
    meta, kept = trained(algorithm, data)
    assert torch.allclose(meta[MEANS], torch.stack([means[label] for label in range(3)]), rtol=0, atol=1e-10)
    assert meta[KNOWN].tolist() == [1, 1, 1]
    for t, model in own.items():
        assert close(kept[t], model, atol=1e-10)
        x = data[t].test.x
        personal = next(algorithm.personal_path(meta, kept[t], data[t].support, 0.1, 0))
        assert torch.allclose(
            algorithm.predict(personal, x), -torch.cdist(features(model, x), meta[MEANS]).square(), rtol=0, atol=1e-9
        )


def test_fedpacs_rounds_equal_plain_torch() -> None:
    algorithm, data = fedpac(), rare()
    body = leaves(algorithm.init())[:2]
    heads = dict.fromkeys(range(3), leaves(algorithm.fresh()))
    means: Means = {}
    for number, chosen in enumerate(ROUNDS, 1):
        ends, sizes = {}, []
        for t in chosen:
            weights, drawn = [*body, *heads[t]], batches(algorithm, data, number, t)
            for batch in drawn[:2]:
                weights = step(weights, batch, {}, slice(2, 4))
            for batch in drawn[2:]:
                weights = step(weights, batch, means, slice(0, 2))
            heads[t], ends[t] = weights[2:], weights
            sizes.append(len(whole(data[t]).x))
        means = pooled(ends, data, chosen, means)
        body = [
            torch.as_tensor(sum(n * ends[t][i] for n, t in zip(sizes, chosen, strict=True)) / sum(sizes)).detach()
            for i in (0, 1)
        ]
    meta, kept = trained(algorithm, data)
    assert close({name: meta[name] for name in ("0.weight", "0.bias")}, body, atol=1e-10)
    assert torch.allclose(meta[MEANS], torch.stack([means[label] for label in range(3)]), rtol=0, atol=1e-10)
    for t, head in heads.items():
        assert close(kept[t], head, atol=1e-10)
        first, second = algorithm.personal_path(meta, kept[t], data[t].support, 0.2, 1)
        assert close(first, [*body, *head], atol=1e-10)
        assert close(second, step([*body, *head], data[t].support, {}, slice(2, 4)), atol=1e-10)


def test_a_class_that_nobody_shows_keeps_its_mean_and_one_never_seen_stays_unknown() -> None:
    algorithm = fedproto()
    meta = algorithm.init()
    meta[MEANS][1], meta[KNOWN][1] = 5.0, 1.0
    sums = {MEANS: torch.zeros(3, 4, dtype=torch.float64), KNOWN: torch.zeros(3, dtype=torch.float64)}
    sums[MEANS][0], sums[KNOWN][0] = 0.2, 0.1  # of few tasks: less than one example on average
    found = algorithm.server_step(meta, {}, sums, 0.5)
    assert (found.gradient, found.state) == ({}, {})
    assert torch.allclose(found.placed[MEANS], torch.tensor([[2.0], [5.0], [0.0]], dtype=torch.float64).expand(3, 4))
    assert found.placed[KNOWN].tolist() == [1, 1, 0]


def test_before_any_prototype_is_known_the_models_own_head_predicts_and_later_only_known_classes() -> None:
    algorithm, (support, query) = fedproto(), random_episode("classification")
    meta = algorithm.init()
    first, second = algorithm.adaptation_path(meta, support, 0.2, 1)
    own = leaves(algorithm.fresh())
    assert torch.allclose(algorithm.predict(first, query.x), tanh_outputs(own, query.x), rtol=0, atol=1e-12)
    assert algorithm.predictable(first).all()
    assert close({name: second[name] for name in algorithm.fresh()}, step(own, support, {}, slice(0, 4)), atol=1e-12)
    meta[KNOWN][:2] = 1.0
    some = next(algorithm.adaptation_path(meta, support, 0.2, 0))
    assert algorithm.predictable(some).tolist() == [True, True, False]
    assert (algorithm.predict(some, query.x)[:, 2] == -1e30).all()
    loss, accuracy = algorithm.score(some, query)
    counted = query.y < 2
    nearest = -torch.cdist(features(own, query.x), meta[MEANS][:2]).square()
    assert torch.allclose(loss, F.cross_entropy(nearest[counted], query.y[counted]), rtol=0, atol=1e-10)
    assert float(accuracy) <= float(counted.double().mean())


@pytest.mark.parametrize("kind", [FedProto, FedPac])
def test_a_model_without_a_body_is_refused(kind: type[FedProto | FedPac]) -> None:
    with pytest.raises(ConfigError, match="and nothing before it is trained"):
        kind(kind.Options.model_validate({"inner-lr": 0.1}), Learner(nn.Linear(3, 3), "classification", 3))
    with pytest.raises(ConfigError, match="is defined for classification"):
        kind(kind.Options.model_validate({"inner-lr": 0.1}), line_learner())
