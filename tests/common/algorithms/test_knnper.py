"""kNN-Per against scikit-learn's nearest neighbours on features computed by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from plain_torch import random_episode, tanh_learner, tanh_outputs
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quickbloom.common.algorithms.fedavg import FedAvg
from quickbloom.common.algorithms.knnper import MIXING, KnnPer
from quickbloom.common.engine.round import evaluate
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params


def knnper(**more: object) -> KnnPer:
    return KnnPer(KnnPer.Options.model_validate({"inner-lr": 0.1, "neighbours": 4, **more}), tanh_learner("classification"))


def neighbours(meta: Params, support: Batch, x: Tensor, k: int = 4) -> np.ndarray:
    def features(x: Tensor) -> np.ndarray:
        found: np.ndarray = torch.tanh(x @ meta["0.weight"].T + meta["0.bias"]).numpy()
        return found

    model = KNeighborsClassifier(k, weights=lambda distances: np.exp(-distances)).fit(features(support.x), support.y)
    assert list(model.classes_) == [0, 1, 2]
    found: np.ndarray = model.predict_proba(features(x))
    return found


def own(meta: Params, x: Tensor) -> np.ndarray:
    found: np.ndarray = tanh_outputs(list(meta.values()), x).softmax(dim=1).numpy()
    return found


def test_predictions_equal_those_of_scikit_learn_mixed_with_the_model() -> None:
    algorithm, (support, query) = knnper(mixing=0.3), random_episode("classification", 9, 8)
    meta = algorithm.init()
    before, after, more = algorithm.adaptation_path(meta, support, 0.1, 2)
    assert np.allclose(algorithm.predict(before, query.x).softmax(dim=1), own(meta, query.x), rtol=0, atol=1e-12)
    expected = 0.3 * neighbours(meta, support, query.x) + 0.7 * own(meta, query.x)
    for personal in (after, more):
        assert np.allclose(algorithm.predict(personal, query.x).softmax(dim=1), expected, rtol=0, atol=1e-6)
    loss, accuracy = algorithm.score(after, query)
    right = expected[np.arange(8), query.y]
    assert float(loss) == pytest.approx(-np.log(right).mean(), abs=1e-6)
    assert float(accuracy) == (expected.argmax(1) == query.y.numpy()).mean()


def test_the_share_of_the_neighbours_is_the_best_by_leave_one_out() -> None:
    algorithm, (support, _) = knnper(), random_episode("classification", 12, 8)
    for centre in (0.0, 3.0):  # classes that cannot, and that can be told apart by their neighbours
        data = support._replace(x=support.x + centre * support.y.unsqueeze(1))
        meta = algorithm.init()
        *_, personal = algorithm.adaptation_path(meta, data, 0.1, 1)
        votes = np.concatenate(
            [neighbours(meta, Batch(*(part[torch.arange(12) != i] for part in data)), data.x[i : i + 1]) for i in range(12)]
        )
        # Without the example its class, of four, has three votes: as if each were 4 / 3.
        votes[np.arange(12), data.y] *= 4 / 3
        votes /= votes.sum(axis=1, keepdims=True)
        losses = []
        for share in np.linspace(0, 1, 11):
            mixed = share * votes + (1 - share) * own(meta, data.x)
            losses.append(-np.log(mixed.clip(1e-6)[np.arange(12), data.y]).mean())
        assert float(personal[MIXING]) == pytest.approx(np.argmin(losses) / 10)
        assert (centre == 3.0) == (float(personal[MIXING]) > 0.5)


@pytest.mark.parametrize(("labels", "share"), [([0, 1, 2], 0.5), ([1], 0.0)])
def test_where_no_example_can_be_judged_the_share_is_a_half_or_nothing_for_one_class(labels: list[int], share: float) -> None:
    algorithm, support = knnper(), random_episode("classification", len(labels), 5).support
    *_, personal = algorithm.adaptation_path(algorithm.init(), support._replace(y=torch.tensor(labels)), 0.1, 1)
    assert personal[MIXING].tolist() == [share]


def test_padding_and_too_few_examples_change_nothing() -> None:
    algorithm, meta = knnper(), knnper().init()
    tasks = []
    for size in (1, 2, 11):
        support, query = random_episode("classification", size, 5)
        tasks.append([TaskData(support, query, query)])
    losses, scores = evaluate(algorithm, meta, tasks, [0.1], 2, chunk_size=8)
    for t, (data,) in enumerate(tasks):
        for step, personal in enumerate(algorithm.adaptation_path(meta, data.support, 0.1, 2)):
            loss, score = algorithm.score(personal, data.test)
            assert losses[t, 0, step] == pytest.approx(float(loss), abs=1e-10)
            assert scores[t, 0, step] == pytest.approx(float(score))
    assert losses[0, 0, 0] == pytest.approx(losses[0, 0, 1], abs=1e-12)  # the share of one class alone is 0


def test_training_is_fedavgs() -> None:
    for name in ("meta_gradient", "contribute", "weight", "minibatch_indices", "sum_up"):
        assert getattr(KnnPer, name) is getattr(FedAvg, name)
    with pytest.raises(ValueError, match="mixing"):
        knnper(mixing=1.5)


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the largest tensor that any operation returns, in numbers."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        sizes = (one.untyped_storage().nbytes() // one.element_size() for one in tree_leaves(found) if isinstance(one, Tensor))
        self.most = max(self.most, *sizes, 0)
        return found


def test_no_tensor_holds_every_pair_of_examples_and_every_feature() -> None:
    learner = Learner(nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 3)), "classification", 3)
    algorithm = KnnPer(KnnPer.Options.model_validate({"inner-lr": 0.1, "neighbours": 4}), learner)
    support, query = (Batch.of(torch.randn(size, 5), torch.arange(size) % 3) for size in (90, 80))
    with Largest() as noted:  # type: ignore[no-untyped-call]
        _, after = algorithm.adaptation_path(algorithm.init(), support, 0.1, 1)
        algorithm.score(after, query)
    assert 90 * 90 <= noted.most < 90 * 80 * 64
