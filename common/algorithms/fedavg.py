"""Federated averaging (McMahan et al. 2017, Algorithm 1), the baseline: one model for all, fine-tuned at evaluation.

w <- sum over tasks of (n_t / n) w_t is SGD with rate 1 on g = theta - phi_k, weighted by the number of
examples n_t. The fine-tuning rate is chosen on validation tasks, as for every algorithm.
"""

from typing import ClassVar

from quickbloom.common.algorithms.base import AlgorithmOptions, ZeroHeadOptions
from quickbloom.common.algorithms.local_sgd import AveragedOptions, LocalSgd


class FedAvgOptions(AveragedOptions, ZeroHeadOptions):
    """Settings of FedAvg."""


class FedAvg(LocalSgd):
    """k SGD steps on minibatches of support and query; g = theta - phi_k; tasks weigh by their number of examples."""

    name = "fedavg"
    Options: ClassVar[type[AlgorithmOptions]] = FedAvgOptions
    plain_steps = False

    def weight(self, num_examples: int) -> float:
        return float(num_examples)
