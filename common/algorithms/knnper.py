"""kNN-Per (Marfoq, Neglia, Kameni, Vidal 2022, "Personalized Federated Learning through Local Memorization", Algorithm 1).

Training is FedAvg's. A task personalises without a gradient: it stores the features of its support examples, the inputs of
the model's last layer, and predicts with lambda p_knn + (1 - lambda) p_model, where the k nearest stored examples vote by
exp(-distance). The first "step" stores them; further steps change nothing. By itself lambda is the one of 0, 0.1,
.. 1 with which each support example would be predicted best by all others, its class having as many votes as with it.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from quickbloom.common.algorithms.base import AlgorithmOptions
from quickbloom.common.algorithms.fedavg import FedAvg
from quickbloom.common.algorithms.local_sgd import AveragedOptions
from quickbloom.common.maths.batch import Batch
from quickbloom.common.maths.learner import Learner, cross_entropy, hits, mean_over_examples
from quickbloom.common.maths.linear_head import LinearHead
from quickbloom.common.maths.params import Params, split
from quickbloom.common.maths.prototypes import members_of

FEATURES, CLASSES, MIXING = "knn_features", "knn_classes", "knn_mixing"
"""Names of personal tensors: features of the stored examples [n, features], their classes as rows of zeros with a one [n,
classes], of zeros alone for padding, and lambda [1]."""
_TRIED = 11
_FAR = 1e30
_LEAST = 1e-6


class KnnPerOptions(AveragedOptions):
    neighbours: int = Field(10, ge=1, le=10_000, description="stored examples that vote for a prediction (k)")
    mixing: float = Field(
        -1.0,
        ge=-1,
        le=1,
        description="share of the neighbours in a prediction (lambda), 0 to 1; below 0: each task's own, by leave-one-out",
    )


class KnnPer(FedAvg):
    """g is FedAvg's; personalised by the nearest support examples in the model's features."""

    name = "knnper"
    Options: ClassVar[type[AlgorithmOptions]] = KnnPerOptions
    kinds = ("classification",)
    uses_adapt_lr = False
    per_step = (FEATURES, CLASSES)

    def __init__(self, options: Any, learner: Learner) -> None:
        super().__init__(options, learner)
        self._last = LinearHead(learner, self.name, "compares the inputs of")

    def adaptation_path(self, meta: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """Yield the server's model, then with the stored support set; `lr` is not used, further steps change nothing."""
        none = meta[self._last.bias].new_zeros
        empty = {FEATURES: none(0, self._last.size - 1), CLASSES: none(0, self.learner.outputs), MIXING: none(1)}
        yield {**meta, **empty}
        if steps:
            stored = {FEATURES: self._features(meta, support.x), CLASSES: members_of(support, self.learner.outputs)}
            mixing = self._chosen(meta, stored, support) if self.options.mixing < 0 else none(1) + self.options.mixing
            yield from [{**meta, **stored, MIXING: mixing}] * steps

    def _features(self, model: Params, x: Tensor) -> Tensor:
        return self._last.features(model, x)[:, :-1]

    def _chosen(self, model: Params, stored: Params, support: Batch) -> Tensor:
        """Return the lambda [1] of least loss over the support examples, each predicted without itself.

        Without it its class has one vote less than all others, which is made up for. An example that is the only one of its
        class cannot be judged; if none can, lambda is 0.5, or 0 where all are of one class.
        """
        members = stored[CLASSES]
        counts = members.sum(dim=0)
        of_own = counts[support.y]
        votes = self._votes(stored, stored[FEATURES], itself=False)
        votes = torch.where(members > 0, votes * (of_own / (of_own - 1).clamp(min=1)).unsqueeze(-1), votes)
        votes = votes / votes.sum(dim=-1, keepdim=True).clamp(min=_LEAST)
        own = self.learner.apply(model, support.x).softmax(dim=-1)
        shares = torch.linspace(0, 1, _TRIED, dtype=votes.dtype, device=votes.device)
        judged = torch.where(of_own > 1, support.weight, 0.0)
        losses = torch.stack([(cross_entropy(_logits(own, votes, share), support.y) * judged).sum() for share in shares])
        unjudged = 0.5 * ((counts > 0).sum() > 1).to(shares.dtype)
        return torch.where(judged.sum() > 0, shares[losses.argmin()], unjudged).unsqueeze(0)

    def _votes(self, stored: Params, features: Tensor, *, itself: bool = True) -> Tensor:
        """Return the neighbours' probabilities of the classes [n, classes]. `itself`: an example may be its own neighbour."""
        distances = _distances(features, stored[FEATURES])
        distances = torch.where(stored[CLASSES].sum(dim=-1) > 0, distances, _FAR)
        if not itself:
            distances = distances + _FAR * torch.eye(len(distances), dtype=distances.dtype, device=distances.device)
        near, which = distances.topk(min(self.options.neighbours, distances.shape[1]), largest=False)
        # Of what is at no real distance the share is 0; all may be if there is nobody else.
        shares = torch.where(near < _FAR / 2, (near.amin(dim=-1, keepdim=True) - near).exp(), 0.0)
        shares = shares / shares.sum(dim=-1, keepdim=True).clamp(min=1e-30)
        return (shares.unsqueeze(-1) * stored[CLASSES][which]).sum(dim=1)

    def predict(self, personal: Params, x: Tensor) -> Tensor:
        """Return logits: the logarithms of the mixed probabilities."""
        stored, model = split(personal, (FEATURES, CLASSES, MIXING))
        outputs = self.learner.apply(model, x)
        if not stored[FEATURES].shape[0]:
            return outputs
        return _logits(outputs.softmax(dim=-1), self._votes(stored, self._features(model, x)), stored[MIXING])

    def score(self, personal: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        outputs = self.predict(personal, batch.x)
        losses = cross_entropy(outputs, batch.y)
        return mean_over_examples(losses, batch.weight), mean_over_examples(hits(outputs, batch.y), batch.weight)


def _distances(one: Tensor, other: Tensor) -> Tensor:
    """Return the Euclidean distances [n, m] of rows [n, d] and [m, d]."""
    if torch.compiler.is_compiling():  # ONNX knows no other form
        return (one.unsqueeze(1) - other.unsqueeze(0)).square().sum(dim=-1).sqrt()
    # The differences themselves, [n, m, d], are gigabytes for a task of some thousand examples.
    return torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist")


def _logits(own: Tensor, of_neighbours: Tensor, share: Tensor) -> Tensor:
    # With a share of 1 a class without a neighbour has no probability, and a loss that is not finite.
    return (share * of_neighbours + (1 - share) * own).clamp(min=_LEAST).log()
