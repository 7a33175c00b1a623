"""Registry of the algorithms by name."""

from quickbloom.common.algorithms.anil import Anil
from quickbloom.common.algorithms.base import Algorithm
from quickbloom.common.algorithms.fedavg import FedAvg
from quickbloom.common.algorithms.fomaml import FoMaml
from quickbloom.common.algorithms.heads import Heads
from quickbloom.common.algorithms.imaml import Imaml
from quickbloom.common.algorithms.local import Local
from quickbloom.common.algorithms.maml import Maml
from quickbloom.common.algorithms.metasgd import MetaSgd
from quickbloom.common.algorithms.perfedavg import PerFedAvg
from quickbloom.common.algorithms.pfedme import PFedMe
from quickbloom.common.algorithms.protonet import ProtoNet
from quickbloom.common.algorithms.reptile import Reptile

ALGORITHMS: dict[str, type[Algorithm]] = {
    algorithm.name: algorithm
    for algorithm in (
        FedAvg,
        Reptile,
        FoMaml,
        Maml,
        Anil,
        MetaSgd,
        PerFedAvg,
        Imaml,
        PFedMe,
        ProtoNet,
        Heads,
        Local,
    )
}


def is_own_algorithm(algorithm: type[Algorithm]) -> bool:
    """Return whether the algorithm comes from user code, which exists only in the process that imported it."""
    return not algorithm.__module__.startswith("quickbloom.common.algorithms.")


__all__ = ["ALGORITHMS", "Algorithm", "is_own_algorithm"]
