"""A torch module as pure functions: losses by hand, weights, and modules that are refused."""

import math

import pytest
import torch
from torch import nn

from quickbloom.common.maths.batch import Batch
from quickbloom.common.maths.learner import Learner, hits


def test_classification_loss_and_accuracy_by_hand() -> None:
    # Outputs equal inputs. Row 1: logits (0, log 3), class 1: p = 3/4. Row 2: (0, 0), class 1: p = 1/2, and argmax picks 0.
    learner = Learner(nn.Linear(2, 2, bias=False), "classification")
    batch = Batch.of(torch.tensor([[0.0, math.log(3)], [0.0, 0.0]]), torch.tensor([1, 1]))
    loss, accuracy = learner.score({"weight": torch.eye(2)}, batch)
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    assert accuracy.item() == 0.5
    assert learner.loss({"weight": torch.eye(2)}, batch).item() == loss.item()


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("label", [0, 1])
def test_an_output_that_is_not_finite_is_wrong_whatever_the_class(broken: float, where: int, label: int) -> None:
    # The first row is right, the second one broken in one output: half of two are right, of either class.
    row = [0.0, 0.0]
    row[where] = broken
    right = torch.nn.functional.one_hot(torch.tensor(label), 2).float()
    found = hits(torch.stack([right, torch.tensor(row)]), torch.tensor([label, label]))
    assert found.tolist() == [1.0, 0.0]


def test_a_diverged_classifier_scores_nothing_and_its_loss_stays_not_finite() -> None:
    learner = Learner(nn.Linear(2, 3), "classification")
    params = {name: torch.full_like(value, math.nan) for name, value in learner.initial().items()}
    loss, accuracy = learner.score(params, Batch.of(torch.randn(6, 2), torch.tensor([0, 0, 0, 0, 1, 2])))
    assert accuracy.item() == 0.0
    assert not math.isfinite(loss.item())


def test_regression_loss_is_averaged_over_outputs_and_examples_by_hand() -> None:
    # Errors (1, 3) and (0, 2): means of squares 5 and 2, together 3.5. The metric is the same number.
    learner = Learner(nn.Linear(2, 2, bias=False), "regression")
    batch = Batch.of(torch.tensor([[1.0, 3.0], [4.0, 2.0]]), torch.tensor([[0.0, 0.0], [4.0, 0.0]]))
    loss, mse = learner.score({"weight": torch.eye(2)}, batch)
    assert (loss.item(), mse.item()) == (3.5, 3.5)


@pytest.mark.parametrize("padding", [1e30, -1e30, math.inf])
def test_examples_of_weight_zero_leave_no_trace(padding: float) -> None:
    learner = Learner(nn.Linear(1, 1, bias=False), "regression")
    batch = Batch(torch.tensor([[2.0], [padding]]), torch.zeros(2, 1), torch.tensor([1.0, 0.0]))
    loss, mse = learner.score({"weight": torch.ones(1, 1)}, batch)
    assert (loss.item(), mse.item()) == (4.0, 4.0)


def test_initial_hands_out_copies_of_the_modules_parameters() -> None:
    module = nn.Linear(2, 1)
    learner = Learner(module, "regression")
    before = module.weight.detach().clone()
    learner.initial()["weight"].zero_()
    assert torch.equal(module.weight, before)
    assert set(learner.initial()) == {"weight", "bias"}
    assert not learner.initial()["weight"].requires_grad


def test_running_statistics_are_used_and_never_updated() -> None:
    norm = nn.BatchNorm1d(1, affine=False)
    norm.running_mean, norm.running_var = torch.tensor([2.0]), torch.tensor([4.0 - norm.eps])
    learner = Learner(nn.Sequential(nn.Linear(1, 1, bias=False), norm), "regression")
    x = torch.tensor([[2.0], [6.0]])
    for _ in range(2):  # ((1 * x) - 2) / 2
        assert torch.allclose(learner.apply({"0.weight": torch.ones(1, 1)}, x), torch.tensor([[0.0], [2.0]]))
    assert norm.num_batches_tracked == 0


def test_what_is_frozen_is_no_parameter() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).requires_grad_(False)
    module[1].bias.requires_grad_(True)
    learner = Learner(module, "regression")
    assert set(learner.initial()) == {"1.bias"}
    assert sorted(learner.constants) == ["0.bias", "0.weight", "1.weight"]
    learner.drop_numbers()
    assert module[1].bias.is_meta
    assert not module[1].weight.is_meta
    expected = module[0](torch.ones(1, 2)) @ module[1].weight.T + 3
    assert torch.equal(learner.apply({"1.bias": torch.tensor([3.0])}, torch.ones(1, 2)), expected)


@pytest.mark.parametrize(
    ("norm", "mixes"),
    [
        (nn.BatchNorm1d(4), False),
        (nn.BatchNorm1d(4, track_running_stats=False), True),
        (nn.GroupNorm(2, 4), False),
        (nn.ReLU(), False),
    ],
)
def test_only_batch_norm_mixes_the_examples_of_a_batch(norm: nn.Module, mixes: bool) -> None:
    assert Learner(nn.Sequential(nn.Linear(4, 4), norm), "regression").mixes_examples is mixes


@pytest.mark.parametrize("size", [1.0, 1e4, 1e15])
def test_cross_entropy_keeps_its_digits_for_large_logits(size: float) -> None:
    learner = Learner(nn.Identity(), "classification")
    logits = torch.tensor([[size, size + 1, size - 1]]) if size < 1e8 else torch.tensor([[size, size, size]])
    found = learner.loss({}, Batch.of(logits, torch.tensor([0])))
    assert found.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, torch.tensor([0])).item(), rel=1e-6)


def test_a_parameter_that_two_layers_share_is_given_once_and_used_by_both() -> None:
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    module[1].weight = module[0].weight
    given = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    found = Learner(module, "regression").apply({"0.weight": given}, torch.tensor([[1.0, 10.0]]))
    assert found.tolist() == [[6.0, 60.0]]  # the square of the matrix is six times the identity
