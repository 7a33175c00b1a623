"""Prototypical networks (Snell, Swersky, Zemel 2017, "Prototypical Networks for Few-shot Learning", Algorithm 1).

There is no inner loop: the prototype of a class is the mean embedding of its support examples. An example is
classified by a softmax over the negative squared Euclidean distances to the prototypes, divided by
`temperature`. The model is the embedding, built with `embedding` outputs. The personal parameters are the
embedding and the prototypes. The first "step" computes the prototypes; further steps change nothing.

With `refine` every further step is a step of soft k-means (Ren et al. 2018, "Meta-Learning for
Semi-Supervised Few-Shot Classification"), except in training. A prototype becomes the mean of its support
examples and of all examples predicted together, each weighted by its probability of that class.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from quickbloom.common.algorithms.base import AlgorithmOptions, EmbeddingAlgorithm
from quickbloom.common.maths.batch import Batch, Episode
from quickbloom.common.maths.embedding import Embedding
from quickbloom.common.maths.learner import cross_entropy, hits, mean_over_examples
from quickbloom.common.maths.params import Params
from quickbloom.common.maths.prototypes import prototypes_of, within_reach

PROTOTYPES, KNOWN, MOVES = "prototypes", "known", "moves"
"""Names of personal tensors: prototypes [classes, embedding], and whether a class has one, 1 or 0 [classes].

With `refine` also the number of support examples per class, repeated for every time the prototypes move
[times, classes].
"""


class ProtoNetOptions(AlgorithmOptions):
    embedding: int = Field(
        64,
        ge=1,
        le=65_536,
        description="dimension of the embedding: the number of outputs of the model, unless that has an embedding of its own",
    )
    temperature: float = Field(1.0, gt=0, description="divides the squared distances; above 1 predictions are less confident")
    refine: bool = Field(
        False,
        description="steps of adaptation after the first move the prototypes towards the examples predicted together "
        "(transductive)",
    )
    pairs: bool = Field(
        False,
        description="in training, compare every pair of examples of a class against the examples of all other classes",
    )


class ProtoNet(EmbeddingAlgorithm):
    """Prototypical network: g = gradient of the cross-entropy over negative squared distances of Q to the prototypes of S."""

    name = "protonet"
    Options: ClassVar[type[AlgorithmOptions]] = ProtoNetOptions
    kinds = ("classification",)
    tunes_inner_lr = False
    uses_adapt_lr = False
    takes_new_classes = True
    embeds = True
    per_step = (MOVES,)

    @classmethod
    def model_outputs(cls, options: Any, outputs: int) -> int:
        return int(options.embedding)

    @property
    def mixes_examples(self) -> bool:
        return bool(self.options.refine) or super().mixes_examples

    def mixes(self, personal: Params) -> bool:
        return len(personal.get(MOVES, ())) > 0 or super().mixes(personal)

    def settled(self, personal: Params, support: Batch) -> Params:
        return personal if isinstance(personal, _Unadapted) else super().settled(personal, support)

    def is_of_embeddings(self) -> bool:
        return self.options.pairs or super().is_of_embeddings()

    def embedding(self) -> Embedding:
        return Embedding(self.learner, self.learner.module, list(self.learner.trained), self.learner.apply)

    def objective_on(self, meta: Params, embedded: Episode) -> Tensor:
        if self.options.pairs:
            return self._pairs(embedded)
        prototypes, counts = prototypes_of(embedded.support.x, embedded.support, self.learner.outputs)
        known, query = (counts > 0).to(counts.dtype), embedded.query
        return self._loss(self._distances(prototypes, known, query.x), query, known)

    def _pairs(self, embedded: Episode) -> Tensor:
        """Return the N-pair loss over the examples of support and query together; a scalar.

        It is the mean of -log(e^-d(i, j) / (e^-d(i, j) + sum over n of e^-d(i, n))) over all pairs
        of examples i, j of the same class. Here n is every example of another class and d the
        squared distance over the temperature (Sohn 2016, "Improved Deep Metric Learning with
        Multi-class N-pair Loss Objective"). Each pair is a one-shot episode whose prototypes are j
        and every n.
        """
        # Embedded separately, as in adaptation, so that batch norm sees the same batches as there.
        x, y, weight = (torch.cat(parts) for parts in zip(*embedded, strict=True))
        x = x - x.mean(dim=0)  # see `_distances`
        squares = x.square().sum(dim=-1)
        logits = (2 * x @ x.T - squares.unsqueeze(-1) - squares) / self.options.temperature
        alike = y.unsqueeze(-1) == y
        others = torch.where(alike | (weight == 0), -1e30, logits).logsumexp(dim=-1, keepdim=True)
        itself = torch.eye(len(y), dtype=torch.bool, device=y.device)
        weights = torch.where(alike & ~itself, weight.unsqueeze(-1) * weight, 0.0)
        return (functional.softplus(others - logits) * weights).sum() / weights.sum().clamp(min=1)

    def adaptation_path(self, meta: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """Yield the embedding without prototypes, then with those of the support set; `lr` is not used."""
        nothing = next(iter(meta.values())).new_zeros
        none = {PROTOTYPES: nothing(self.learner.outputs, self.options.embedding), KNOWN: nothing(self.learner.outputs)}
        yield _Unadapted({**meta, **none})
        if steps:
            prototypes, counts = prototypes_of(self.learner.apply(meta, support.x), support, self.learner.outputs)
            personal = {**meta, PROTOTYPES: prototypes, KNOWN: (counts > 0).to(counts.dtype)}
            for step in range(steps):
                yield {**personal, MOVES: counts.expand(step, -1)} if step and self.options.refine else personal

    def predict(self, personal: Params, x: Tensor) -> Tensor:
        """Return negative squared distances to the prototypes over the temperature, up to a constant shared by all classes.

        The value is -1e30 for a class without a prototype.
        """
        return self._logits(personal, x, x.new_ones(x.shape[0], dtype=personal[PROTOTYPES].dtype))

    def _logits(self, personal: Params, x: Tensor, weight: Tensor) -> Tensor:
        """Return the logits of `predict`; with `refine` an example of weight 0 moves no prototype."""
        if isinstance(personal, _Unadapted):
            return personal[PROTOTYPES].new_zeros(x.shape[0], self.learner.outputs)
        theta = {name: value for name, value in personal.items() if name not in (PROTOTYPES, KNOWN, MOVES)}
        prototypes, known, embedded = personal[PROTOTYPES], personal[KNOWN], self.learner.apply(theta, x)
        found = self._distances(prototypes, known, embedded)
        for counts in personal.get(MOVES, ()):
            shares = found.softmax(dim=-1) * weight.unsqueeze(-1)
            totals = (counts + shares.sum(dim=0)).clamp(min=1e-30)  # 0 for a class without a prototype
            moved = (counts.unsqueeze(-1) * prototypes + shares.T @ embedded) / totals.unsqueeze(-1)
            found = self._distances(moved, known, embedded)
        return found

    def _distances(self, prototypes: Tensor, known: Tensor, embedded: Tensor) -> Tensor:
        """Return the logits of embeddings; -1e30 for a class without a prototype."""
        # A common shift leaves distances unchanged, and near zero the products below lose fewer digits.
        middle = prototypes.mean(dim=0)
        x, prototypes = embedded - middle, prototypes - middle
        # -||x - p||^2 without ||x||^2, which is the same for all classes and cancels in the softmax.
        distances = 2 * x @ prototypes.T - prototypes.square().sum(dim=-1)
        return torch.where(within_reach(known), distances / self.options.temperature, -1e30)

    def predictable(self, personal: Params) -> Tensor:
        """Return the classes with a prototype; all before there is any."""
        return within_reach(personal[KNOWN])

    def score(self, personal: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (loss, accuracy). Examples of a class without support count as errors and are left out of the loss."""
        logits = self._logits(personal, batch.x, batch.weight)
        return self._loss(logits, batch, personal[KNOWN]), mean_over_examples(hits(logits, batch.y), batch.weight)

    def _loss(self, logits: Tensor, batch: Batch, known: Tensor) -> Tensor:
        weight = torch.where(within_reach(known)[batch.y], batch.weight, 0.0)
        return (cross_entropy(logits, batch.y) * weight).sum() / weight.sum().clamp(min=1)


class _Unadapted(dict[str, Tensor]):
    """Personal parameters before there is any prototype: all classes tie, so that no example need be embedded."""
