"""The algorithms by name."""

from common.algorithms.anil import Anil
from common.algorithms.base import Algorithm
from common.algorithms.fedavg import FedAvg
from common.algorithms.fomaml import FoMaml
from common.algorithms.heads import Heads
from common.algorithms.imaml import Imaml
from common.algorithms.local import Local
from common.algorithms.maml import Maml
from common.algorithms.metasgd import MetaSgd
from common.algorithms.perfedavg import PerFedAvg
from common.algorithms.pfedme import PFedMe
from common.algorithms.protonet import ProtoNet
from common.algorithms.reptile import Reptile

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
    """Whether it comes from a user's own code, which only the process knows that has imported it."""
    return not algorithm.__module__.startswith("common.algorithms.")


__all__ = ["ALGORITHMS", "Algorithm", "is_own_algorithm"]
