"""Proto-MAML: its head is a prototypical network's, its gradient that of plain autograd and of finite differences."""

import pytest
import torch
from plain_torch import NO_MINIBATCHES, Weights, central_differences, close, leaves, random_episode, tanh_learner, tanh_outputs
from torch import Tensor

from quickbloom.common.algorithms.protomaml import ProtoMaml
from quickbloom.common.algorithms.protonet import ProtoNet
from quickbloom.common.maths.batch import Batch, Episode
from quickbloom.common.maths.inner_loop import last

LR, STEPS = 0.07, 3


def network(**more: object) -> ProtoMaml:
    settings = {"inner-lr": LR, "inner-steps": STEPS, "embedding": 5, **more}
    return ProtoMaml(ProtoMaml.Options.model_validate(settings), tanh_learner("classification", outputs=5))


def plain_head(theta: Weights, support: Batch) -> tuple[Tensor, Tensor]:
    """2 c and -||c||^2 for each of 3 classes, from the means of the embedded examples."""
    embedded = tanh_outputs(theta, support.x)
    means = torch.stack([embedded[support.y == label].mean(0) for label in range(3)])
    return 2 * means, -(means**2).sum(1)


def plain_loss(weights: Weights, batch: Batch) -> Tensor:
    logits = tanh_outputs(weights[:4], batch.x) @ weights[4].T + weights[5]
    return -logits.log_softmax(1)[torch.arange(len(batch.y)), batch.y].mean()


def plain_objective(theta: Weights, episode: Episode, *, through: bool) -> Tensor:
    phi: Weights = [*theta, *plain_head(theta, episode.support)]
    for _ in range(STEPS):
        # Copies, since the inner gradient is by embedding and head apart, although the head was made from the embedding.
        at = [value + 0 for value in phi] if through else [value.detach().requires_grad_() for value in phi]
        slopes = torch.autograd.grad(plain_loss(at, episode.support), at, create_graph=through)
        phi = [value - LR * slope for value, slope in zip(phi, slopes, strict=True)]
    return plain_loss(phi, episode.query)


@pytest.mark.parametrize("second_order", [False, True])
def test_its_gradient_equals_plain_autograd(second_order: bool) -> None:
    algorithm, episode = network(**{"second-order": second_order}), random_episode("classification", 7, 8)
    theta = leaves(algorithm.init())
    objective = plain_objective(theta, episode, through=second_order)
    gradient, loss = algorithm.meta_gradient(algorithm.init(), episode, NO_MINIBATCHES)
    assert gradient.keys() == algorithm.init().keys()
    assert close(gradient, torch.autograd.grad(objective, theta), atol=1e-10)
    assert loss.item() == pytest.approx(objective.item(), abs=1e-12)


def test_its_second_order_gradient_matches_finite_differences() -> None:
    algorithm, episode = network(**{"second-order": True}), random_episode("classification", 7, 8)

    def value(theta: Weights) -> Tensor:
        return plain_objective([one.detach().requires_grad_() for one in theta], episode, through=True)

    gradient, _ = algorithm.meta_gradient(algorithm.init(), episode, NO_MINIBATCHES)
    assert close(gradient, central_differences(value, list(algorithm.init().values())), atol=1e-8)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_before_any_gradient_step_it_is_a_prototypical_network(temperature: float) -> None:
    episode = random_episode("classification", 7, 8)
    algorithm = network(temperature=temperature)
    settings = {"inner-lr": LR, "embedding": 5, "temperature": temperature}
    other = ProtoNet(ProtoNet.Options.model_validate(settings), algorithm.learner)
    here, there = (last(one.adaptation_path(algorithm.init(), episode.support, LR, 1)) for one in (algorithm, other))
    probabilities = algorithm.predict(here, episode.query.x).softmax(1)
    torch.testing.assert_close(probabilities, other.predict(there, episode.query.x).softmax(1), rtol=1e-9, atol=0)
    torch.testing.assert_close(algorithm.score(here, episode.query), other.score(there, episode.query))


def test_a_class_that_the_support_does_not_show_is_never_predicted_and_stays_unknown() -> None:
    algorithm, episode = network(), random_episode("classification", 7, 8)
    kept = episode.support.y != 1
    support = Batch(*(part[kept] for part in episode.support))
    personal = last(algorithm.adaptation_path(algorithm.init(), support, LR, 4))
    assert algorithm.predictable(personal).tolist() == [True, False, True]
    assert not (algorithm.predict(personal, episode.query.x).argmax(1) == 1).any()
    loss, accuracy = algorithm.score(personal, episode.query)
    assert loss.item() < 20  # the examples of class 1 are in the accuracy alone
    wrong = (algorithm.predict(personal, episode.query.x).argmax(1) != episode.query.y).double().mean()
    assert accuracy.item() == pytest.approx(1 - wrong.item())


def test_examples_of_weight_zero_have_no_influence() -> None:
    algorithm, episode = network(), random_episode("classification", 7, 8)

    def padded(batch: Batch) -> Batch:
        x = torch.cat([batch.x, torch.full((2, 3), 9.0, dtype=torch.float64)])
        return Batch(
            x, torch.cat([batch.y, torch.tensor([0, 2])]), torch.cat([batch.weight, torch.zeros(2, dtype=torch.float64)])
        )

    gradient, loss = algorithm.meta_gradient(algorithm.init(), episode, NO_MINIBATCHES)
    other = Episode(padded(episode.support), padded(episode.query))
    same, padded_loss = algorithm.meta_gradient(algorithm.init(), other, NO_MINIBATCHES)
    assert close(same, list(gradient.values()), atol=1e-12)
    assert padded_loss.item() == pytest.approx(loss.item(), abs=1e-12)
