"""The algorithms by name."""

from common.algorithms.base import Algorithm
from common.algorithms.fedavg import FedAvg
from common.algorithms.fomaml import FoMaml
from common.algorithms.maml import Maml
from common.algorithms.reptile import Reptile

ALGORITHMS: dict[str, type[Algorithm]] = {algorithm.name: algorithm for algorithm in (FedAvg, Reptile, FoMaml, Maml)}

__all__ = ["ALGORITHMS", "Algorithm"]
