"""Momentum and Adam in the local steps, against torch's own optimizers."""

from typing import Any

import pytest
import torch
from plain_torch import LOSSES, close, leaves, random_episode, tanh_learner, together

from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.engine.round import TaskWork, run_round
from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.batch import Batch, Minibatches, TaskData
from quickbloom.common.maths.params import Params
from quickbloom.common.randomness import generator

ROWS = torch.tensor([[0, 7, 3], [10, 1, 8], [2, 9, 4], [5, 6, 0]])
RATE, BETA = 0.05, 0.7
TAKES = ("fedavg", "reptile", "fedprox", "ditto", "heads", "fedbn", "lgfedavg", "fedbabu", "knnper", "local")


def build(name: str, kind: str, **settings: Any) -> Any:
    options = {"inner-lr": RATE, "inner-momentum": BETA, **settings}
    return ALGORITHMS[name](ALGORITHMS[name].Options.model_validate(options), tanh_learner(kind))


def by_torch(
    optimizer: str, kind: str, start: Params, anchor: Params | None = None, strength: float = 0.0
) -> list[torch.Tensor]:
    """The end of torch's own optimizer on the same batches; with a pull towards `anchor`."""
    weights, episode = leaves(start), random_episode(kind)
    moves: torch.optim.Optimizer = (
        torch.optim.SGD(weights, RATE, momentum=BETA)
        if optimizer == "momentum"
        else torch.optim.Adam(weights, RATE, (BETA, 0.999))
    )
    for rows in ROWS:
        moves.zero_grad()
        loss = LOSSES[kind](weights, Batch(*(part[rows] for part in together(episode))))
        if anchor is not None:
            loss = loss + strength / 2 * sum(((w - a) ** 2).sum() for w, a in zip(weights, anchor.values(), strict=True))
        loss.backward()  # type: ignore[no-untyped-call]
        moves.step()
    return [value.detach() for value in weights]


def walk() -> Minibatches:
    return Minibatches(ROWS, torch.ones(4, 3, dtype=torch.float64))


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_local_steps_are_those_of_torchs_optimizer(optimizer: str, kind: str) -> None:
    for name in ("fedavg", "reptile"):
        algorithm = build(name, kind, **{"inner-optimizer": optimizer})
        meta = algorithm.init()
        gradient, _ = algorithm.meta_gradient(meta, random_episode(kind), walk())
        ends = [meta[key] - value for key, value in gradient.items()]
        assert close(dict(zip(meta, ends, strict=True)), by_torch(optimizer, kind, meta), atol=1e-10)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_the_pull_of_fedprox_and_ditto_goes_through_the_optimizer(optimizer: str) -> None:
    kind, strength = "regression", 0.6
    settings = {"inner-optimizer": optimizer, "strength": strength}
    fedprox, ditto = (build(name, kind, **settings) for name in ("fedprox", "ditto"))
    meta = {name: value + 0.1 for name, value in fedprox.init().items()}
    gradient, _ = fedprox.meta_gradient(meta, random_episode(kind), walk())
    expected = by_torch(optimizer, kind, meta, meta, strength)
    assert close({name: meta[name] - value for name, value in gradient.items()}, expected, atol=1e-10)
    kept = ditto.init()
    _, _, personal = ditto.contribute(meta, kept, random_episode(kind), walk())
    assert close(personal, by_torch(optimizer, kind, kept, meta, strength), atol=1e-10)


@pytest.mark.parametrize("name", TAKES)
def test_whoever_takes_another_optimizer_trains_with_it_mapped_as_alone(name: str) -> None:
    kind, sizes = "classification", [(6, 5), (6, 5), (4, 3)]
    own = {"keep": True} if name == "local" else {}
    if name == "fedbn":
        pytest.skip("needs a model with normalisation; it shares the steps of `heads`")

    def work() -> list[TaskWork]:
        episodes = [random_episode(kind, *size) for size in sizes]
        return [TaskWork(TaskData(one.support, one.query, one.query), generator(0, str(i))) for i, one in enumerate(episodes)]

    ends = {}
    for optimizer in ("sgd", "adam"):
        algorithm = build(name, kind, **own, **{"inner-optimizer": optimizer, "inner-steps": 3})
        together, alone = (run_round(algorithm, algorithm.init(), work(), size) for size in (8, 1))
        assert close(together.gradient, list(alone.gradient.values()), atol=1e-12)
        ends[optimizer] = {**together.gradient, **{f"kept {key}": value for key, value in together.kept[0].items()}}
    assert any(not torch.allclose(value, ends["adam"][key]) for key, value in ends["sgd"].items())


@pytest.mark.parametrize("name", ["scaffold", "feddyn", "apfl", "fedala", "fedrod", "fedproto", "fedpac"])
def test_algorithms_whose_paper_needs_plain_steps_say_so(name: str) -> None:
    with pytest.raises(ConfigError, match=rf'`{name}.inner-optimizer` must be "sgd".*got "adam"'):
        build(name, "classification", **{"inner-optimizer": "adam"})
