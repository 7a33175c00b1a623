"""Partly trained models: frozen parameters and buffers are constants that all tasks share, with every algorithm."""

from typing import Any

import numpy as np
import pretrained_like
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from quickbloom.common.algorithms import ALGORITHMS, Algorithm
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.datasets.base import DataSpec
from quickbloom.common.engine.build import build_algorithm, constants_of
from quickbloom.common.engine.round import TaskWork, evaluate, run_round
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params
from quickbloom.common.randomness import generator

IMAGES = DataSpec("classification", (1, 12, 12), 3)
FIVE = ("fedavg", "reptile", "fomaml", "protonet", "anil")


def algorithm_of(name: str, model: str, **settings: Any) -> Algorithm:
    flat = {"algorithm": name, "model": f"pretrained_like:{model}", f"{name}.inner-lr": 0.1, **settings}
    flat |= {"protonet.embedding": 6} if name == "protonet" else {f"{name}.inner-steps": 2}
    return build_algorithm(parse_run_config(flat).resolved(), IMAGES)


def batch(seed: int, dtype: torch.dtype = torch.float32) -> Batch:
    x = torch.randn(6, *IMAGES.input_shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return Batch.of(x, torch.arange(6) % 3)


def work(seed: int) -> TaskWork:
    return TaskWork(TaskData(batch(seed), batch(seed + 100), batch(seed + 200)), generator(0, str(seed)))


@pytest.mark.parametrize("model", ["resnet", "efficientnet"])
@pytest.mark.parametrize("name", FIVE)
def test_a_pretrained_network_runs_without_a_change_of_the_module(name: str, model: str) -> None:
    algorithm = algorithm_of(name, model)
    learner = algorithm.learner
    assert learner.maps
    assert not learner.mixes_examples
    before = {key: value.clone() for key, value in learner.constants.items()}
    meta = algorithm.init()
    assert sorted(meta) == ["2.bias", "2.weight", "4.bias", "4.weight"]
    result = run_round(algorithm, meta, [work(1), work(2), work(3)], 128)
    assert result.gradient.keys() == meta.keys()
    assert all(value.abs().sum() > 0 for value in result.gradient.values())
    losses, scores = evaluate(algorithm, meta, [[work(1).data]], [0.1], 2, 128)
    assert np.isfinite(losses).all()
    assert np.isfinite(scores).all()
    after = learner.constants
    assert before.keys() == after.keys()
    assert {key.rpartition(".")[2] for key in before} >= {"running_mean", "running_var", "num_batches_tracked"}
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    # The same of one task after the other, without padding and without vmap.
    alone = [run_round(algorithm, meta, [work(seed)], 1).gradient for seed in (1, 2, 3)]
    for key, value in result.gradient.items():
        torch.testing.assert_close(value, sum(one[key] for one in alone) / 3, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 2])
def test_the_meta_gradient_of_a_partly_frozen_model_is_that_of_plain_autograd_on_the_module(steps: int) -> None:
    module = pretrained_like.resnet(IMAGES.input_shape, 3).double()
    options = ALGORITHMS["maml"].Options.model_validate({"inner-lr": 0.2, "inner-steps": steps})
    algorithm = ALGORITHMS["maml"](options, Learner(module, "classification", 3))
    support, query = batch(1, torch.float64), batch(2, torch.float64)
    found = run_round(algorithm, algorithm.init(), [TaskWork(TaskData(support, query, query), generator(0, "x"))], 1)

    module.eval()
    theta = {key: value for key, value in module.named_parameters() if value.requires_grad}
    phi: Params = dict(theta)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(functional_call(module, phi, (support.x,)), support.y)
        slopes = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
        phi = {key: value - 0.2 * slope for (key, value), slope in zip(phi.items(), slopes, strict=True)}
    after = nn.functional.cross_entropy(functional_call(module, phi, (query.x,)), query.y)
    expected = dict(zip(theta, torch.autograd.grad(after, list(theta.values())), strict=True))
    assert found.gradient.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found.gradient[key], value, atol=1e-10, rtol=1e-8)
    assert found.losses == pytest.approx([after.item()])


@pytest.mark.parametrize("name", ["ridge", "alpaca"])
def test_a_closed_form_head_leaves_the_constants_before_it_where_they_are(name: str) -> None:
    spec = IMAGES if "classification" in ALGORITHMS[name].kinds else DataSpec("regression", IMAGES.input_shape, 3)
    config = parse_run_config({"algorithm": name, "model": "pretrained_like:resnet", f"{name}.inner-lr": 0.1})
    algorithm = build_algorithm(config.resolved(), spec)
    assert {key for key in algorithm.init() if key[0].isdigit()} == {"2.bias", "2.weight", "4.bias", "4.weight"}
    one = batch(1)
    if spec.kind == "regression":
        one = one._replace(y=torch.randn(6, 3, generator=torch.Generator().manual_seed(0)))
    gradient = run_round(algorithm, algorithm.init(), [TaskWork(TaskData(one, one, one), generator(0, "x"))], 1).gradient
    assert gradient["2.weight"].abs().sum() > 0


@pytest.mark.parametrize("name", ["fedavg", "protonet", "heads"])
def test_a_node_without_numbers_of_its_own_computes_the_same(name: str) -> None:
    flat = {"algorithm": name, "model": "pretrained_like:resnet", f"{name}.inner-lr": 0.1}
    config = parse_run_config(flat).resolved()
    whole, bare = build_algorithm(config, IMAGES), build_algorithm(config, IMAGES, tried=True)
    if name != "heads":
        assert all(value.is_meta for value in bare.learner.trained.values())
    assert bare.learner.digest == whole.learner.digest == constants_of(config, IMAGES)
    assert (bare.learner.device, bare.learner.dtype) == (whole.learner.device, whole.learner.dtype)
    meta = whole.init()
    found = [run_round(one, meta, [work(1), work(2)], 128).gradient for one in (whole, bare)]
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


def test_a_built_in_model_of_which_only_some_is_trained() -> None:
    flat = {"algorithm": "fedavg", "model": "conv4", "conv4.filters": 4, "trainable": "head", "fedavg.inner-lr": 0.1}
    config = parse_run_config(flat).resolved()
    algorithm = build_algorithm(config, IMAGES, tried=True)
    assert sorted(algorithm.init()) == ["1.bias", "1.weight"]
    gradient = run_round(algorithm, build_algorithm(config, IMAGES).init(), [work(1)], 1).gradient
    whole = build_algorithm(parse_run_config({**flat, "trainable": "all"}).resolved(), IMAGES)
    # By hand: SGD on the whole model, with all but the head held where they are.
    start = whole.init()
    theta = {key: start[key].clone() for key in gradient}
    rng = generator(0, "1")
    indices = whole.minibatch_indices(12, rng)
    assert indices is not None
    both = Batch(*(torch.cat(parts) for parts in zip(work(1).data.support, work(1).data.query, strict=True)))
    for rows in indices:
        part = Batch(*(value[rows] for value in both))
        slopes = torch.func.grad(lambda head, part=part: whole.learner.loss({**start, **head}, part))(theta)
        theta = {key: value - 0.1 * slopes[key] for key, value in theta.items()}
    for key, value in gradient.items():
        torch.testing.assert_close(value, start[key] - theta[key], atol=1e-6, rtol=1e-5)


class Shared(nn.Module):
    """Whole numbers, and a buffer that is no part of the state."""

    order: Tensor
    angles: Tensor
    on: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 2)
        self.register_buffer("order", torch.tensor([5, 4, 3, 2, 1, 0]))
        self.register_buffer("angles", torch.linspace(0, 1, 6), persistent=False)
        self.register_buffer("on", torch.tensor([True, True, True, False, True, True]))

    def forward(self, x: Tensor) -> Any:
        return self.linear(torch.where(self.on, x[:, self.order] + self.angles, 0.0))


def test_the_hash_tells_constants_apart_by_name_and_number() -> None:
    one, other = (Learner(Shared(), "regression") for _ in range(2))
    assert sorted(one.constants) == ["angles", "on", "order"]
    assert one.digest == other.digest  # what is trained does not count
    assert len(one.digest) == 64
    assert Learner(nn.Linear(2, 2), "regression").digest == ""
    for name in ("order", "on"):
        changed = Shared()
        getattr(changed, name).copy_(getattr(changed, name).roll(1))
        assert Learner(changed, "regression").digest != one.digest, name
    nudged = Shared()
    nudged.angles += 1e-7  # as another processor may compute it
    assert Learner(nudged, "regression").digest == one.digest
    frozen = Shared()
    frozen.linear.bias.requires_grad_(False)
    assert Learner(frozen, "regression").digest != one.digest


def test_batch_norm_that_is_frozen_with_its_statistics_is_said_once() -> None:
    algorithm = algorithm_of("reptile", "resnet")
    assert len(algorithm.learner.remarks) == 2
    assert "dropout is off" in algorithm.learner.remarks[0]
    assert "running statistics" in algorithm.learner.remarks[1]
