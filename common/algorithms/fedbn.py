"""FedBN (Li, Jiang, Zhang, Kamp, Dou 2021, "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization",
Algorithm 1).

Scale and shift of all normalisations stay on the node, everything else travels; all take k steps together. Tasks weigh the
same, as in the paper. The paper's layers also keep running statistics on the node; models here have none (docs/algorithms.md).
"""

from collections.abc import Collection
from typing import ClassVar

from quickbloom.common.algorithms.base import AlgorithmOptions
from quickbloom.common.algorithms.local_sgd import AveragedOptions
from quickbloom.common.algorithms.part_stays import PartStays
from quickbloom.common.errors import ConfigError
from quickbloom.common.models.norms import norm_parameters


class FedBn(PartStays):
    """g = theta - phi_k without the normalisations, which are kept on the node."""

    name = "fedbn"
    Options: ClassVar[type[AlgorithmOptions]] = AveragedOptions

    def staying(self) -> Collection[str]:
        trained = self.learner.trained
        names = [name for name in norm_parameters(self.learner.module) if name in trained]
        if not 0 < len(names) < len(trained):
            raise ConfigError(
                '`algorithm = "fedbn"` needs a model of which some parameters are those of normalisations, got '
                f'{len(names)} of {len(trained)}: choose `model = "conv4"` or "resnet" for images, or "mlp" with '
                '`mlp.norm = "layer"`'
            )
        return names
