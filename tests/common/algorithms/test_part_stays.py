"""LG-FedAvg and FedBN against plain torch, over rounds in which tasks go on from the part that stayed with them."""

import pytest
import torch
import torch.nn.functional as F
from plain_torch import LOSSES, Loss, Weights, close, leaves, moved, random_episode, tanh_learner
from rounds import ROUNDS, batches, tasks, trained, whole
from torch import Tensor, nn

from quickbloom.common.algorithms.fedbn import FedBn
from quickbloom.common.algorithms.lgfedavg import LgFedAvg
from quickbloom.common.algorithms.part_stays import PartStays
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.datasets.base import DataSpec
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.batch import Batch
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params

OPTIONS = {"inner-lr": 0.2, "inner-steps": 4, "batch-size": 3}


def normed_learner(kind: str) -> Learner:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)).double()
    return Learner(module, kind, 3)


def normed_loss(kind: str) -> Loss:
    def loss(weights: Weights, batch: Batch) -> Tensor:
        w1, b1, scale, shift, w2, b2 = weights
        outputs = torch.tanh(F.layer_norm(batch.x @ w1.T + b1, (4,), scale, shift)) @ w2.T + b2
        return F.cross_entropy(outputs, batch.y) if kind == "classification" else F.mse_loss(outputs, batch.y)

    return loss


def algorithm_of(name: str, kind: str) -> tuple[PartStays, Loss, list[int]]:
    """The algorithm, the plain loss of all tensors in the model's order, and which of these stay."""
    if name == "fedbn":
        return FedBn(FedBn.Options.model_validate(OPTIONS), normed_learner(kind)), normed_loss(kind), [2, 3]
    return LgFedAvg(LgFedAvg.Options.model_validate(OPTIONS), tanh_learner(kind)), LOSSES[kind], [0, 1]


def in_order(algorithm: PartStays, meta: Params, kept: Params) -> Params:
    return {name: {**meta, **kept}[name] for name in algorithm.learner.trained}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("name", ["fedbn", "lgfedavg"])
def test_rounds_with_state_equal_plain_torch(name: str, kind: str) -> None:
    algorithm, loss, stays = algorithm_of(name, kind)
    data, shared = tasks(kind), leaves(algorithm.learner.initial())
    own = dict.fromkeys(range(3), shared)
    for number, chosen in enumerate(ROUNDS, 1):
        sizes = [len(whole(data[t]).x) if name == "lgfedavg" else 1 for t in chosen]
        for t in chosen:
            phi = [own[t][i] if i in stays else value for i, value in enumerate(shared)]
            for batch in batches(algorithm, data, number, t):
                phi = [value.detach().requires_grad_() for value in phi]
                phi = moved(phi, torch.autograd.grad(loss(phi, batch), phi), 0.2)
            own[t] = phi
        total = [sum(n * own[t][i] for n, t in zip(sizes, chosen, strict=True)) for i in range(len(shared))]
        shared = [torch.as_tensor(value).detach() / sum(sizes) for value in total]
    meta, kept = trained(algorithm, data)
    assert len(kept[0]) == len(stays) == len(shared) - len(meta)
    for t, expected in own.items():
        mixed = [expected[i] if i in stays else value for i, value in enumerate(shared)]
        assert close(in_order(algorithm, meta, kept[t]), mixed, atol=1e-10)
        assert not torch.allclose(expected[stays[0]], own[(t + 1) % 3][stays[0]], atol=1e-4)


@pytest.mark.parametrize("name", ["fedbn", "lgfedavg"])
def test_a_known_task_goes_on_from_its_part_and_a_new_one_from_a_fresh_one(name: str) -> None:
    algorithm, loss, _ = algorithm_of(name, "classification")
    support, meta = random_episode("classification").support, algorithm.init()
    kept = {key: value + 0.3 for key, value in algorithm.fresh().items()}
    for path, state in (
        (algorithm.personal_path(meta, kept, support, 0.1, 1), kept),
        (algorithm.adaptation_path(meta, support, 0.1, 1), algorithm.fresh()),
    ):
        phi = leaves(in_order(algorithm, meta, state))
        first, second = ({key: found[key] for key in algorithm.learner.trained} for found in path)
        assert close(first, phi, atol=0)
        assert close(second, moved(phi, torch.autograd.grad(loss(phi, support), phi), 0.1), atol=1e-12)


def test_fedbn_refuses_a_model_without_normalisation_in_one_sentence() -> None:
    config = parse_run_config({"algorithm": "fedbn", "model": "mlp", "fedbn.inner-lr": 0.1}).resolved()
    with pytest.raises(
        ConfigError, match=r"some parameters are those of normalisations, got 0 of 6: choose `model = \"conv4\"`"
    ):
        build_algorithm(config, DataSpec("classification", (4,), 3))


@pytest.mark.parametrize(
    ("settings", "stay"),
    [
        ({"model": "mlp", "mlp.norm": "layer", "mlp.hidden": "5,6"}, ["2.bias", "2.weight", "5.bias", "5.weight"]),
        ({"model": "conv4", "conv4.filters": 4}, [f"0.{i}.1.{part}" for i in range(4) for part in ("bias", "weight")]),
    ],
)
def test_fedbn_keeps_scale_and_shift_of_the_built_in_models(settings: dict[str, object], stay: list[str]) -> None:
    flat = {"algorithm": "fedbn", "fedbn.inner-lr": 0.1, **settings}
    algorithm = build_algorithm(parse_run_config(flat).resolved(), DataSpec("classification", (1, 8, 8), 3))
    assert sorted(algorithm.fresh()) == stay
    assert not set(algorithm.init()) & set(stay)
    assert algorithm.weight(7) == 1.0
