"""Batch norm of an adapted user: by the support set, so that no prediction depends on which others are made beside it."""

from typing import Any

import numpy as np
import pytest
import small_encoders
import torch
from torch import Tensor, nn

from quickbloom.common.algorithms import ALGORITHMS, Algorithm
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.datasets.base import DataSpec
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.engine.predicting import predict_tests
from quickbloom.common.engine.round import evaluate, path_of
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.maths.inner_loop import last
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params
from quickbloom.common.models import MODELS
from quickbloom.common.personal.cross_validation import ends_of_path

SMALL: dict[str, Any] = {"conv4.filters": 4, "resnet.channels": "4,6", "mlp.hidden": "7", "lstm.hidden": 4, "cnn.filters": 3}
SMALL |= {"cnn.units": 5, "cnn.padding": 2}
TRAINED = [name for name in sorted(MODELS) if not MODELS[name].own_trainer]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model(name: str, **settings: Any) -> tuple[Algorithm, TaskData]:
    """`fomaml` on a model of the registry, and a task with six support and five test examples of three classes."""
    tokens = small_encoders.VOCABULARY if MODELS[name].tokens else 0
    flat: dict[str, Any] = {"algorithm": "fomaml", "model": name, "fomaml.inner-lr": 0.1, **SMALL, **settings}
    flat |= {"transformer.directory": small_encoders.directory()} if MODELS[name].pretrained else {}
    shape = (7,) if tokens else (1, 8, 8)
    algorithm = build_algorithm(parse_run_config(flat).resolved(), DataSpec("classification", shape, 3, tokens))
    support, test = (torch.arange(n * 7).reshape(n, 7) % tokens if tokens else drawn(n, *shape, seed=n) for n in (6, 5))
    parts = Batch.of(support, torch.arange(6) % 3), Batch.of(test, torch.arange(5) % 3)
    return algorithm, TaskData(parts[0], parts[1], parts[1])


def one_by_one(algorithm: Algorithm, personal: Params, x: Tensor) -> Tensor:
    return torch.cat([algorithm.predict(personal, x[i : i + 1]) for i in range(len(x))])


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("name", TRAINED)
def test_a_prediction_of_an_adapted_user_is_the_same_alone_and_among_others(name: str, norm: str) -> None:
    if norm != "group" and name not in ("conv4", "resnet"):
        pytest.skip("no such normalisation")
    algorithm, data = model(name, **({f"{name}.norm": norm} if norm != "group" else {}))
    assert algorithm.learner.mixes_examples == (norm == "batch")
    _, personal = ends_of_path(algorithm, algorithm.init(), None, data.support, 0.1, 2)
    together = algorithm.predict(personal, data.test.x)
    assert (together - one_by_one(algorithm, personal, data.test.x)).abs().max() < 1e-6
    assert not algorithm.mixes(personal)


def test_a_transductive_model_is_said_to_be_one() -> None:
    batch, asked = {"conv4.norm": "batch"}, {"transductive": True}
    for settings, said in (({**batch, **asked}, 1), (batch, 0), (asked, 0)):
        algorithm, _ = model("conv4", **settings)
        assert len(algorithm.learner.remarks) == said


def with_batch_norm(name: str, *, transductive: bool = False) -> tuple[Algorithm, TaskData]:
    """An algorithm on a small network in float64, for three classes or targets, and a task."""
    kind = ALGORITHMS[name].kinds[0]
    options = ALGORITHMS[name].Options.model_validate({"inner-lr": 0.1})
    outputs = ALGORITHMS[name].model_outputs(options, 3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        norm = nn.BatchNorm1d(4, track_running_stats=False)
        learner = Learner(nn.Sequential(nn.Linear(3, 4), norm, nn.Tanh(), nn.Linear(4, outputs)).double(), kind, 3)
    learner.transductive = transductive

    def batch(size: int, seed: int) -> Batch:
        x, y = drawn(size, 3, seed=seed).double(), drawn(size, 3, seed=seed + 50).double()
        return Batch.of(x, torch.arange(size) % 3 if kind == "classification" else y)

    return ALGORITHMS[name](options, learner), TaskData(batch(6, 1), batch(4, 2), batch(5, 3))


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_algorithm_predicts_and_scores_by_the_support(name: str) -> None:
    algorithm, data = with_batch_norm(name)
    meta, x = algorithm.init(), data.test.x
    with torch.no_grad():
        personal = ends_of_path(algorithm, meta, None, data.support, 0.1, 2)[1]
        torch.testing.assert_close(one_by_one(algorithm, personal, x), algorithm.predict(personal, x), atol=1e-9, rtol=0)
        # Another batch of support would have been computed alike: its own predictions are those of training.
        bare = last(algorithm.adaptation_path(meta, data.support, 0.1, 2))
        of_support = [algorithm.predict(phi, data.support.x) for phi in (bare, personal)]
        torch.testing.assert_close(of_support[0], of_support[1], atol=1e-9, rtol=0)
        expected = [float(value) for value in algorithm.score(personal, data.test)]
    scores = evaluate(algorithm, meta, [[data], [data]], [0.1], steps=2, chunk_size=8)
    assert [part[1, 0, 2] for part in scores] == pytest.approx(expected, abs=1e-9)
    (found,) = predict_tests(algorithm, meta, [data], 0.1, 2, 8)
    np.testing.assert_allclose(found.after, algorithm.predict(personal, x).detach().numpy(), atol=1e-9)


@pytest.mark.parametrize("name", ["fomaml", "protonet", "alpaca"])
def test_the_transductive_scores_are_there_when_asked_for(name: str) -> None:
    algorithm, data = with_batch_norm(name, transductive=True)
    meta = algorithm.init()
    with torch.no_grad():
        bare = last(algorithm.adaptation_path(meta, data.support, 0.1, 2))
        expected = [float(value) for value in algorithm.score(bare, data.test)]
    scores = evaluate(algorithm, meta, [[data]], [0.1], steps=2, chunk_size=8)
    assert [part[0, 0, 2] for part in scores] == pytest.approx(expected, abs=1e-12)
    inductive, _ = with_batch_norm(name)
    assert abs(evaluate(inductive, meta, [[data]], [0.1], steps=2, chunk_size=8)[0][0, 0, 2] - expected[0]) > 1e-4


def test_the_statistics_are_those_of_the_support_by_hand() -> None:
    """Inputs 1, 3 have mean 2 and variance 1, so the input 5 becomes (5 - 2) / 1 = 3; scaled by 2 and shifted by 1 it is 7."""
    norm = nn.BatchNorm1d(1, eps=1e-12, track_running_stats=False)
    learner = Learner(nn.Sequential(norm), "regression", 1)
    params = {"0.weight": torch.tensor([2.0]), "0.bias": torch.tensor([1.0])}
    found = learner.statistics(params, torch.tensor([[1.0], [3.0]]))
    assert {name: value.tolist() for name, value in found.items()} == {"0.running_mean": [2.0], "0.running_var": [1.0]}
    assert learner.apply({**params, **found}, torch.tensor([[5.0]])).item() == pytest.approx(7.0)
    assert norm.running_mean is None


def test_a_layer_that_runs_twice_takes_the_statistics_of_both_times() -> None:
    """First 0, 2; these become -1, 1, and doubled -2, 2. The mean of all four is .5, their variance 12 / 4 - .25 = 2.75."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(1, eps=1e-12, track_running_stats=False)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.norm(2 * self.norm(x))
            return found

    learner = Learner(Twice(), "regression", 1)
    found = learner.statistics(learner.initial(), torch.tensor([[0.0], [2.0]]))
    assert found["norm.running_mean"].item() == pytest.approx(0.5)
    assert found["norm.running_var"].item() == pytest.approx(2.75)


def test_a_path_that_repeats_its_last_element_is_settled_once() -> None:
    algorithm, data = with_batch_norm("protonet")
    _, *path = path_of(algorithm, algorithm.init(), None, data.support, 0.1, 3)
    assert path[0] is path[1] is path[2]
    assert "1.running_mean" in path[0]


def test_large_batches_go_in_pieces_once_the_statistics_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm, data = with_batch_norm("fomaml")
    personal = ends_of_path(algorithm, algorithm.init(), None, data.support, 0.1, 1)[1]
    whole = algorithm.predict(personal, data.test.x)
    seen: list[int] = []
    algorithm.learner.module.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    monkeypatch.setattr("quickbloom.common.maths.batch.APPLIED_AT_ONCE", 6)
    torch.testing.assert_close(algorithm.predict(personal, data.test.x), whole, atol=1e-12, rtol=0)
    assert seen == [2, 2, 1]
