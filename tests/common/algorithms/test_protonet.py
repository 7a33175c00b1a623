"""Prototypical networks against a plane with two classes worked by hand, and against explicit distances in plain autograd."""

import itertools
import math

import pytest
import torch
from plain_torch import NO_MINIBATCHES, Weights, central_differences, close, leaves, random_episode, tanh_learner, tanh_outputs
from torch import Tensor, nn

from quickbloom.common.algorithms.protonet import ProtoNet
from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.batch import Batch, Episode
from quickbloom.common.maths.inner_loop import last
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params

IDENTITY = {"weight": torch.eye(2, dtype=torch.float64)}


def plane(classes: int = 2) -> ProtoNet:
    """Inputs in the plane, which a linear layer embeds; with the weights IDENTITY as they are."""
    learner = Learner(nn.Linear(2, 2, bias=False).double(), "classification", classes)
    return ProtoNet(ProtoNet.Options.model_validate({"inner-lr": 0.1, "embedding": 2}), learner)


def points(*examples: tuple[float, float, int]) -> Batch:
    """(x, y, class) each."""
    places = torch.tensor([example[:2] for example in examples], dtype=torch.float64)
    return Batch.of(places, torch.tensor([example[2] for example in examples]))


SUPPORT = points((0, 0, 0), (2, 0, 0), (0, 3, 1))
"""Prototypes (1, 0) and (0, 3)."""


def adapted(algorithm: ProtoNet, support: Batch) -> Params:
    return last(algorithm.adaptation_path(IDENTITY, support, 0.1, 1))


def test_prototypes_loss_and_accuracy_by_hand() -> None:
    # (1, 1): squared distances 1 and 1 + 4 = 5, so log p(0) = -log(1 + e^-4). (0, 2): distances 1 + 4 = 5 and 1; of class 0, so
    # log p(0) = -log(1 + e^4), and it is taken for class 1.
    personal = adapted(plane(), SUPPORT)
    assert torch.equal(personal["prototypes"], torch.tensor([[1.0, 0.0], [0.0, 3.0]], dtype=torch.float64))
    loss, accuracy = plane().score(personal, points((1, 1, 0), (0, 2, 0)))
    assert loss.item() == pytest.approx((math.log1p(math.exp(-4)) + math.log1p(math.exp(4))) / 2, abs=1e-12)
    assert accuracy.item() == 0.5


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_diverged_embedding_recognises_nothing(broken: float) -> None:
    algorithm = plane()
    personal = adapted(algorithm, points((0, 0, 0), (4, 0, 1)))
    spoilt = {name: torch.full_like(value, broken) if name == "weight" else value for name, value in personal.items()}
    loss, accuracy = algorithm.score(spoilt, points((1, 0, 0), (0, 1, 0), (3, 0, 1)))
    assert accuracy.item() == 0.0
    assert not math.isfinite(loss.item())


def test_the_temperature_divides_the_distances() -> None:
    # As above with a temperature of 2: differences of 4 / 2 = 2.
    settings = {"inner-lr": 0.1, "embedding": 2, "temperature": 2.0}
    algorithm = ProtoNet(ProtoNet.Options.model_validate(settings), plane().learner)
    loss, accuracy = algorithm.score(adapted(algorithm, SUPPORT), points((1, 1, 0), (0, 2, 0)))
    assert loss.item() == pytest.approx((math.log1p(math.exp(-2)) + math.log1p(math.exp(2))) / 2, abs=1e-12)
    assert accuracy.item() == 0.5


def plain_objective(theta: Weights, episode: Episode) -> Tensor:
    """Cross-entropy over explicit squared distances to class means, one query example at a time."""
    embedded, total = tanh_outputs(theta, episode.support.x), torch.zeros((), dtype=torch.float64)
    means = [embedded[episode.support.y == c].mean(0) for c in range(3)]
    for x, y in zip(tanh_outputs(theta, episode.query.x), episode.query.y, strict=True):
        scores = torch.stack([-((x - mean) ** 2).sum() for mean in means])
        total = total - scores.log_softmax(0)[y]
    return total / len(episode.query.y)


def network() -> ProtoNet:
    return ProtoNet(
        ProtoNet.Options.model_validate({"inner-lr": 0.1, "embedding": 5}), tanh_learner("classification", outputs=5)
    )


def test_protonet_gradient_equals_plain_autograd() -> None:
    algorithm, episode = network(), random_episode("classification", 7, 8)
    theta = leaves(algorithm.init())
    objective = plain_objective(theta, episode)
    gradient, loss = algorithm.meta_gradient(algorithm.init(), episode, NO_MINIBATCHES)
    assert gradient.keys() == algorithm.init().keys()
    assert close(gradient, torch.autograd.grad(objective, theta), atol=1e-10)
    assert loss.item() == pytest.approx(objective.item(), abs=1e-12)


def test_protonet_gradient_matches_finite_differences() -> None:
    algorithm, episode = network(), random_episode("classification", 7, 8)
    slopes = central_differences(lambda theta: plain_objective(theta, episode), list(algorithm.init().values()))
    gradient, _ = algorithm.meta_gradient(algorithm.init(), episode, NO_MINIBATCHES)
    assert close(gradient, slopes, atol=1e-8)


def test_examples_of_weight_zero_have_no_influence() -> None:
    def padded(batch: Batch, label: int) -> Batch:
        more = torch.full((2, *batch.x.shape[1:]), 9.0, dtype=torch.float64)
        y = torch.cat([batch.y, torch.tensor([label, label])])
        return Batch(torch.cat([batch.x, more]), y, torch.cat([batch.weight, torch.zeros(2, dtype=torch.float64)]))

    algorithm, episode = network(), random_episode("classification", 7, 8)
    gradient, loss = algorithm.meta_gradient(algorithm.init(), episode, NO_MINIBATCHES)
    for label in range(3):
        other = Episode(padded(episode.support, label), padded(episode.query, label))
        same, padded_loss = algorithm.meta_gradient(algorithm.init(), other, NO_MINIBATCHES)
        assert close(same, list(gradient.values()), atol=1e-12)
        assert padded_loss.item() == pytest.approx(loss.item(), abs=1e-12)


def test_a_class_of_padding_alone_has_no_prototype() -> None:
    support = Batch(SUPPORT.x, SUPPORT.y, torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    assert adapted(plane(), support)["known"].tolist() == [1, 0]


def test_query_examples_of_a_class_without_support_are_errors_and_not_in_the_loss() -> None:
    # Of the queries above, a third one of class 2, at the origin, where the prototype of nothing would be. Accuracy 1/3.
    algorithm = plane(classes=3)
    query = points((1, 1, 0), (0, 2, 0), (0, 0, 2))
    loss, accuracy = algorithm.score(adapted(algorithm, SUPPORT), query)
    assert loss.item() == pytest.approx((math.log1p(math.exp(-4)) + math.log1p(math.exp(4))) / 2, abs=1e-12)
    assert accuracy.item() == pytest.approx(1 / 3, abs=1e-12)


def test_a_task_whose_query_classes_all_lack_support_has_a_gradient_of_zero() -> None:
    algorithm = plane(classes=3)
    gradient, loss = algorithm.meta_gradient(IDENTITY, Episode(SUPPORT, points((1, 1, 2))), NO_MINIBATCHES)
    assert loss.item() == 0
    assert not gradient["weight"].any()


@pytest.mark.parametrize("order", [[1, 2, 0], [2, 1, 0]])
def test_renaming_the_classes_changes_no_score(order: list[int]) -> None:
    algorithm, episode = network(), random_episode("classification", 7, 8)
    new = torch.tensor(order)
    renamed = Episode(*(Batch(batch.x, new[batch.y], batch.weight) for batch in episode))
    scores = [
        torch.stack(algorithm.score(last(algorithm.adaptation_path(algorithm.init(), support, 0.1, 1)), query))
        for support, query in (episode, renamed)
    ]
    assert torch.allclose(scores[0], scores[1], rtol=0, atol=1e-12)


def test_before_adaptation_all_classes_are_alike() -> None:
    before, *_ = plane(classes=4).adaptation_path(IDENTITY, SUPPORT, 0.1, 2)
    loss, accuracy = plane(classes=4).score(before, points((5, 1, 0), (0, 2, 1), (7, 0, 2), (1, 1, 3)))
    assert loss.item() == pytest.approx(math.log(4), abs=1e-12)
    assert accuracy.item() == 0.25


def test_more_steps_than_one_and_the_rate_change_nothing() -> None:
    paths = [list(plane().adaptation_path(IDENTITY, SUPPORT, lr, 3)) for lr in (0.01, 1.0)]
    for path in paths:
        assert all(torch.equal(phi["prototypes"], paths[0][1]["prototypes"]) for phi in path[1:])
        assert all(torch.equal(phi["weight"], IDENTITY["weight"]) for phi in path)


def test_the_model_gets_as_many_outputs_as_the_embedding_has_dimensions() -> None:
    assert ProtoNet.model_outputs(ProtoNet.Options.model_validate({"embedding": 17}), 5) == 17


def test_regression_is_refused() -> None:
    with pytest.raises(ConfigError, match='`algorithm = "protonet"` is defined for classification'):
        ProtoNet(ProtoNet.Options.model_validate({"inner-lr": 0.1, "embedding": 5}), tanh_learner("regression", outputs=5))


def in_pairs(learner: Learner, embedding: int, temperature: float = 1.0) -> ProtoNet:
    settings = {"inner-lr": 0.1, "embedding": embedding, "pairs": True, "temperature": temperature}
    return ProtoNet(ProtoNet.Options.model_validate(settings), learner)


def test_pairs_by_hand() -> None:
    # Support (0, 0) of class 0 and (2, 0) of class 1, query (1, 0) of class 0. The only pair is (0, 0) and (1, 0), distance 1;
    # from (0, 0) the other class is 4 away: log(1 + e^(1 - 4)). From (1, 0) it is 1 away: log(1 + e^(1 - 1)) = log 2.
    learner = Learner(nn.Linear(2, 2, bias=False).double(), "classification", 2)
    episode = Episode(points((0, 0, 0), (2, 0, 1)), points((1, 0, 0)))
    expected = (math.log1p(math.exp(-3)) + math.log(2)) / 2
    assert in_pairs(learner, 2).objective(IDENTITY, episode).item() == pytest.approx(expected, abs=1e-12)
    expected = (math.log1p(math.exp(-3 / 4)) + math.log(2)) / 2
    assert in_pairs(learner, 2, temperature=4.0).objective(IDENTITY, episode).item() == pytest.approx(expected, abs=1e-12)


def plain_pairs(theta: Weights, episode: Episode) -> Tensor:
    """Every ordered pair of a class as an episode of its own: cross-entropy over explicit squared distances."""
    embedded = torch.cat([tanh_outputs(theta, batch.x) for batch in episode])
    y = torch.cat([batch.y for batch in episode]).tolist()
    losses = []
    for i, j in itertools.permutations(range(len(y)), 2):
        if y[i] == y[j]:
            candidates = [j, *(n for n in range(len(y)) if y[n] != y[i])]
            scores = torch.stack([-((embedded[i] - embedded[n]) ** 2).sum() for n in candidates])
            losses.append(-scores.log_softmax(0)[0])
    return torch.stack(losses).mean()


def test_gradient_of_pairs_equals_plain_autograd() -> None:
    algorithm, episode = in_pairs(tanh_learner("classification", outputs=5), 5), random_episode("classification", 7, 8)
    theta = leaves(algorithm.init())
    objective = plain_pairs(theta, episode)
    gradient, loss = algorithm.meta_gradient(algorithm.init(), episode, NO_MINIBATCHES)
    assert close(gradient, torch.autograd.grad(objective, theta), atol=1e-10)
    assert loss.item() == pytest.approx(objective.item(), abs=1e-12)


def test_examples_of_weight_zero_are_in_no_pair() -> None:
    algorithm, episode = in_pairs(tanh_learner("classification", outputs=5), 5), random_episode("classification", 7, 8)
    weight = torch.cat([torch.ones(7), torch.zeros(1)]).double()
    masked = Episode(episode.support, episode.query._replace(weight=weight))
    without = Episode(episode.support, Batch(*(values[:7] for values in episode.query)))
    gradient, loss = algorithm.meta_gradient(algorithm.init(), masked, NO_MINIBATCHES)
    expected, expected_loss = algorithm.meta_gradient(algorithm.init(), without, NO_MINIBATCHES)
    assert close(gradient, list(expected.values()), atol=1e-12)
    assert loss.item() == pytest.approx(expected_loss.item(), abs=1e-12)


def test_an_episode_of_one_example_per_class_has_no_pair_and_a_gradient_of_zero() -> None:
    algorithm = in_pairs(Learner(nn.Linear(2, 2, bias=False).double(), "classification", 3), 2)
    gradient, loss = algorithm.meta_gradient(IDENTITY, Episode(points((0, 3, 0)), points((1, 1, 2))), NO_MINIBATCHES)
    assert loss.item() == 0
    assert not gradient["weight"].any()


def refined(learner: Learner, embedding: int, temperature: float = 1.0) -> ProtoNet:
    settings = {"inner-lr": 0.1, "embedding": embedding, "refine": True, "temperature": temperature}
    return ProtoNet(ProtoNet.Options.model_validate(settings), learner)


def test_a_refinement_by_hand() -> None:
    # One example of each class, (0, 0) and (4, 0), and (1, 0) and (3, 0) to predict at a temperature of 8 / log 3. Distances 1
    # and 9: the first is of class 0 with a probability of 1 / (1 + e^(-8 / temperature)) = 3/4, the second with 1/4.
    # New prototype of class 0: (0 + 3/4 * 1 + 1/4 * 3) / (1 + 3/4 + 1/4) = 3/4; that of class 1 is 4 - 3/4 likewise.
    learner, temperature = Learner(nn.Linear(2, 2, bias=False).double(), "classification", 2), 8 / math.log(3)
    algorithm = refined(learner, 2, temperature)
    _, first, second = algorithm.adaptation_path(IDENTITY, points((0, 0, 0), (4, 0, 1)), 0.1, 2)
    query = points((1, 0, 0), (3, 0, 1))
    for personal, prototype in ((first, 0.0), (second, 0.75)):
        difference = ((3 - prototype) ** 2 - (1 - prototype) ** 2) / temperature
        loss, _ = algorithm.score(personal, query)
        assert loss.item() == pytest.approx(math.log1p(math.exp(-difference)), abs=1e-12)
        logits = algorithm.predict(personal, query.x)
        assert (logits[0, 0] - logits[0, 1]).item() == pytest.approx(difference, abs=1e-12)


def plain_refinement(theta: Weights, episode: Episode, times: int) -> Tensor:
    """Logits of the query after soft k-means, one class at a time."""
    support, query = (tanh_outputs(theta, batch.x) for batch in episode)
    of_class = [support[episode.support.y == c] for c in range(3)]
    prototypes = [part.mean(0) for part in of_class]

    def logits() -> Tensor:
        return -torch.stack([((query - p) ** 2).sum(1) for p in prototypes], 1)

    for _ in range(times):
        share = logits().softmax(1)
        sums = [part.sum(0) + sum(w * z for w, z in zip(share[:, c], query, strict=True)) for c, part in enumerate(of_class)]
        prototypes = [total / (len(of_class[c]) + share[:, c].sum()) for c, total in enumerate(sums)]
    return logits()


def test_every_further_step_is_one_of_soft_k_means() -> None:
    algorithm, episode = refined(tanh_learner("classification", outputs=5), 5), random_episode("classification", 7, 8)
    theta = algorithm.init()
    for step, personal in enumerate(algorithm.adaptation_path(theta, episode.support, 0.1, 4)):
        if step:
            expected = plain_refinement(list(theta.values()), episode, step - 1).softmax(1)
            found = algorithm.predict(personal, episode.query.x).softmax(1)
            torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def test_refinement_is_no_part_of_training() -> None:
    learner, episode = tanh_learner("classification", outputs=5), random_episode("classification", 7, 8)
    plain = ProtoNet(ProtoNet.Options.model_validate({"inner-lr": 0.1, "embedding": 5}), learner)
    gradient, _ = refined(learner, 5).meta_gradient(plain.init(), episode, NO_MINIBATCHES)
    expected, _ = plain.meta_gradient(plain.init(), episode, NO_MINIBATCHES)
    assert close(gradient, list(expected.values()), atol=0)


def test_padding_and_a_class_without_support_take_no_part_in_a_refinement() -> None:
    algorithm, episode = refined(tanh_learner("classification", outputs=5), 5), random_episode("classification", 7, 8)
    support = episode.support._replace(weight=(episode.support.y != 2).double())
    personal = last(algorithm.adaptation_path(algorithm.init(), support, 0.1, 3))
    weight = torch.cat([torch.ones(6), torch.zeros(2)]).double()
    masked = algorithm.score(personal, episode.query._replace(weight=weight))
    without = algorithm.score(personal, Batch(*(values[:6] for values in episode.query)))
    torch.testing.assert_close(masked, without, atol=1e-12, rtol=0)
    assert (algorithm.predict(personal, episode.query.x)[:, 2] == -1e30).all()


def test_predictions_depend_on_one_another_only_where_prototypes_are_refined() -> None:
    learner = tanh_learner("classification", outputs=5)
    assert not network().mixes_examples
    assert refined(learner, 5).mixes_examples
    with_batch_norm = Learner(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)), "classification", 2)
    assert ProtoNet(ProtoNet.Options.model_validate({"inner-lr": 0.1}), with_batch_norm).mixes_examples
