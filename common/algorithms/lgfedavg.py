"""LG-FedAvg (Liang, Liu, Ziyin, Allen, Auerbach, Brent, Salakhutdinov, Morency 2020, "Think Locally, Act Globally: Federated
Learning with Local and Global Representations", Algorithm 1).

The reverse of `heads`: the body stays on the node, where it learns a representation of its own, and the head travels. Both
take k steps together; g = head of theta - phi_k, weighted by the number of examples. A new task starts from a fresh body, which
has learned nothing: this is an algorithm for the users that train.
"""

from collections.abc import Collection
from typing import ClassVar

from pydantic import Field

from quickbloom.common.algorithms.base import AlgorithmOptions
from quickbloom.common.algorithms.local_sgd import AveragedOptions
from quickbloom.common.algorithms.part_stays import PartStays
from quickbloom.common.options import Text


class LgFedAvgOptions(AveragedOptions):
    head: Text = Field(
        "auto", description='comma-separated name prefixes of the parameters that travel; "auto": the last layer'
    )


class LgFedAvg(PartStays):
    """g = head of theta - phi_k; the body of phi_k is kept on the node; tasks weigh by their number of examples."""

    name = "lgfedavg"
    Options: ClassVar[type[AlgorithmOptions]] = LgFedAvgOptions

    def staying(self) -> Collection[str]:
        head = self.learner.head("lgfedavg.head", self.options.head)
        return [name for name in self.learner.trained if name not in head]

    def weight(self, num_examples: int) -> float:
        return float(num_examples)
