"""ALPaCA (Harrison, Sharma, Pavone 2018, "Meta-Learning Priors for Efficient Online Bayesian Regression", Equations 3 to 9).

Bayesian linear regression on the features of a learned body. The head K of a task has the prior
MN(K_0, Lambda_0^-1, Sigma), all of it learned over the tasks. After the support set (F, Y) it has the
posterior MN(K, Lambda^-1, Sigma) with

    Lambda = F^T F + Lambda_0,    K = Lambda^-1 (F^T Y + Lambda_0 K_0)

so a prediction comes with a variance, (1 + f^T Lambda^-1 f) Sigma. With a body that changes nothing
(`model = "linear"`) this is a linear mixed model whose slopes and intercepts vary over users. g is the
gradient of the negative log likelihood of the query set under that prediction. The reported loss is the
squared error.
"""

from collections.abc import Iterator
from math import log
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.func import grad

from quickbloom.common.algorithms.base import Algorithm, AlgorithmOptions, ClosedFormOptions
from quickbloom.common.maths.batch import Batch, Episode, Minibatches
from quickbloom.common.maths.inner_loop import last
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.linear_head import STRETCH, LinearHead, solved
from quickbloom.common.maths.params import Params

FACTOR, NOISE = "alpaca/factor", "alpaca/noise"
"""Names of what is learned beside the model: the Cholesky factor of Lambda_0, whose diagonal is the logarithm over STRETCH
[features + 1, features + 1], and the logarithm of the noise's deviation over STRETCH [outputs]."""
SPREAD = "alpaca/spread"
"""Name of a personal tensor: Lambda^-1 [features + 1, features + 1]; the last row and column are the intercept's."""


class AlpacaOptions(ClosedFormOptions):
    precision: float = Field(1.0, gt=0, description="Lambda_0 before the first round is this number on the diagonal")
    noise: float = Field(0.5, gt=0, description="deviation of the noise before the first round, in units of the target")


class Alpaca(Algorithm):
    """g = gradient of the negative log likelihood of the query set under the posterior that the support set gives."""

    name = "alpaca"
    Options: ClassVar[type[AlgorithmOptions]] = AlpacaOptions
    kinds = ("regression",)
    tunes_inner_lr = False
    uses_adapt_lr = False
    model_for_tables = "linear"

    def __init__(self, options: Any, learner: Learner) -> None:
        super().__init__(options, learner)
        self._head = LinearHead(learner, self.name)
        self.options = options.with_rate(one_layer=self._head.is_all)

    def init(self) -> Params:
        """Return the model with a head of zeros, the prior's factor and the noise."""
        zero = self._head.zeroed(self.initial())
        ones = torch.ones_like(zero[self._head.bias])
        factor = torch.eye(self._head.size, dtype=ones.dtype, device=ones.device) * (log(self.options.precision) / 2 / STRETCH)
        return zero | {FACTOR: factor, NOISE: ones * (log(self.options.noise) / STRETCH)}

    def meta_gradient(self, meta: Params, episode: Episode, minibatches: Minibatches) -> tuple[Params, Tensor]:
        def objective(meta: Params) -> tuple[Tensor, Tensor]:
            personal = last(self.adaptation_path(meta, episode.support, 0.0, 1))
            return self.negative_log_likelihood(personal, episode.query), self.score(personal, episode.query)[0]

        gradient, loss = grad(objective, has_aux=True)(meta)
        return gradient, loss

    def adaptation_path(self, meta: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """Yield the prior, then the posterior after the support set; `lr` is not used, further steps change nothing."""
        model = {name: value for name, value in meta.items() if name != FACTOR}
        diagonal = (STRETCH * meta[FACTOR].diagonal().double()).exp()
        factor = meta[FACTOR].double().tril(-1) + torch.diag_embed(diagonal)
        precision = factor @ factor.mT
        ones = torch.eye(self._head.size, dtype=torch.float64, device=precision.device)
        dtype = meta[FACTOR].dtype
        yield model | {SPREAD: solved(precision, ones).to(dtype)}
        if steps:
            features = self._head.features(model, support.x).double()
            shared = self._head.matrix(model).double()
            weighted = features * support.weight.double().unsqueeze(-1)
            spread = solved(precision + weighted.mT @ features, ones)
            posterior = shared + spread @ (weighted.mT @ (support.y.double() - features @ shared))
            personal = self._head.replaced(model, posterior.to(dtype)) | {SPREAD: spread.to(dtype)}
            yield from [personal] * steps

    def predict(self, personal: Params, x: Tensor) -> Tensor:
        """Return the means of the predictions [n, outputs]."""
        return self.learner.apply(_model(personal), x)

    def deviation(self, personal: Params, x: Tensor) -> Tensor:
        """Return the standard deviations of the predictions [n, outputs]: of the noise and of what is not known of the head."""
        factors, noise = self._variance(personal, x)
        return factors.sqrt().unsqueeze(-1) * noise.sqrt()

    def score(self, personal: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.learner.score(_model(personal), batch)

    def negative_log_likelihood(self, personal: Params, batch: Batch) -> Tensor:
        """Return the mean over examples of -log p(y), but for a constant; a scalar."""
        factors, noise = self._variance(personal, batch.x)
        squares = ((batch.y - self.predict(personal, batch.x)).square() / noise).sum(dim=-1)
        each = 0.5 * (squares / factors + self._head.outputs * factors.log() + noise.log().sum())
        return (each * batch.weight).sum() / batch.weight.sum()

    def _variance(self, personal: Params, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return 1 + f^T Lambda^-1 f for each example [n], and Sigma's diagonal [outputs]."""
        features = self._head.features(personal, x)
        factors = 1 + ((features @ personal[SPREAD]) * features).sum(dim=-1)
        return factors, (2 * STRETCH * personal[NOISE]).exp()


def _model(personal: Params) -> Params:
    return {name: value for name, value in personal.items() if name not in (NOISE, SPREAD)}
