"""Proto-MAML (Triantafillou et al. 2020, "Meta-Dataset: A Dataset of Datasets for Learning to Learn from Few Examples", s. 4).

A task's head starts at the prototypes, the mean embeddings c of each class in the support: with the weights 2 c and the
intercepts -||c||^2 a linear layer gives the logits of a prototypical network (Snell et al. 2017, Equation 8). From there the
inner loop takes gradient steps on embedding and head. The head does not travel, so labels may mean something else for every
task. The first "step" of adaptation computes the prototypes; each further one is a gradient step, so the validation tasks
decide whether gradient steps help at all.

The gradient of the query loss flows through the prototypes. Through the inner steps it is taken as for first-order MAML, as
the authors did for large models, unless `second-order`.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.func import grad

from quickbloom.common.algorithms.base import AlgorithmOptions, InnerLoopOptions, ObjectiveAlgorithm
from quickbloom.common.maths.batch import Batch, Episode
from quickbloom.common.maths.inner_loop import last
from quickbloom.common.maths.learner import cross_entropy, hits, mean_over_examples
from quickbloom.common.maths.params import Params, add
from quickbloom.common.maths.prototypes import prototypes_of, within_reach

WEIGHT, BIAS, KNOWN = "protomaml/weight", "protomaml/bias", "protomaml/known"
"""Names of personal tensors: the head, [classes, embedding] and [classes], and whether the support shows a class, 1 or 0."""
_NEVER = -1e30


class ProtoMamlOptions(InnerLoopOptions):
    embedding: int = Field(
        64, ge=1, le=65_536, description="dimension of the embedding, unless the model has an embedding of its own"
    )
    temperature: float = Field(1.0, gt=0, description="divides the logits of the prototypes; above 1 the head starts unsure")
    second_order: bool = Field(False, description="take the gradient through the inner steps, at several times the cost")


class ProtoMaml(ObjectiveAlgorithm):
    """g = gradient of the query loss after k steps from a head of prototypes."""

    name = "protomaml"
    Options: ClassVar[type[AlgorithmOptions]] = ProtoMamlOptions
    kinds = ("classification",)
    embeds = True
    takes_new_classes = True

    @classmethod
    def model_outputs(cls, options: Any, outputs: int) -> int:
        return int(options.embedding)

    def objective(self, meta: Params, episode: Episode) -> Tensor:
        steps, lr = self.options.inner_steps + 1, self.options.inner_lr
        path = self._path(meta, episode.support, lr, steps, through=self.options.second_order)
        return self._loss(last(path), episode.query)

    def adaptation_path(self, meta: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """Yield the embedding with a head of zeros, then with that of the prototypes, then after each gradient step."""
        return self._path(meta, support, lr, steps, through=True)

    def _path(self, meta: Params, support: Batch, lr: float | Tensor, steps: int, *, through: bool) -> Iterator[Params]:
        nothing = next(iter(meta.values())).new_zeros
        outputs = self.learner.outputs
        head = {WEIGHT: nothing(outputs, self.options.embedding), BIAS: nothing(outputs), KNOWN: nothing(outputs)}
        yield {**meta, **head}
        if steps:
            phi, known = self._with_prototypes(meta, support)
            yield {**phi, KNOWN: known}
            for _ in range(steps - 1):
                slope = grad(lambda at: self._loss({**at, KNOWN: known}, support))(phi)
                phi = add(phi, slope if through else {name: value.detach() for name, value in slope.items()}, -lr)
                yield {**phi, KNOWN: known}

    def _with_prototypes(self, meta: Params, support: Batch) -> tuple[Params, Tensor]:
        """Return (embedding and head of the prototypes, which classes have one)."""
        prototypes, counts = prototypes_of(self.learner.apply(meta, support.x), support, self.learner.outputs)
        heat = self.options.temperature
        head = {WEIGHT: 2 * prototypes / heat, BIAS: -prototypes.square().sum(dim=-1) / heat}
        return {**meta, **head}, (counts > 0).to(counts.dtype)

    def predict(self, personal: Params, x: Tensor) -> Tensor:
        """Return logits; -1e30 for a class that the support does not show."""
        theta = {name: value for name, value in personal.items() if name not in (WEIGHT, BIAS, KNOWN)}
        logits = self.learner.apply(theta, x) @ personal[WEIGHT].T + personal[BIAS]
        return torch.where(within_reach(personal[KNOWN]), logits, _NEVER)

    def predictable(self, personal: Params) -> Tensor:
        """Return the classes that the support shows; all before there is any."""
        return within_reach(personal[KNOWN])

    def _loss(self, personal: Params, batch: Batch) -> Tensor:
        """Return the mean cross-entropy over the examples whose class is within reach; a scalar."""
        weight = torch.where(within_reach(personal[KNOWN])[batch.y], batch.weight, 0.0)
        losses = cross_entropy(self.predict(personal, batch.x), batch.y)
        return (torch.where(weight > 0, losses, 0.0) * weight).sum() / weight.sum().clamp(min=1)

    def score(self, personal: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (loss, accuracy). Examples of a class without support count as errors and are left out of the loss."""
        return self._loss(personal, batch), mean_over_examples(hits(self.predict(personal, batch.x), batch.y), batch.weight)
