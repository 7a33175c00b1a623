"""Registry of the algorithms by name. A new one is a file with a subclass of `Algorithm`, and one line here."""

from quickbloom.common import registries
from quickbloom.common.algorithms.base import Algorithm

ALGORITHMS: dict[str, type[Algorithm]] = registries.load(
    __name__,
    "fedavg",
    "fedprox",
    "fedbabu",
    "ditto",
    "apfl",
    "fedbn",
    "lgfedavg",
    "fedrod",
    "fedala",
    "knnper",
    "scaffold",
    "feddyn",
    "fedproto",
    "fedpac",
    "reptile",
    "fomaml",
    "maml",
    "anil",
    "metasgd",
    "perfedavg",
    "imaml",
    "pfedme",
    "protonet",
    "protomaml",
    "heads",
    "local",
    "ridge",
    "alpaca",
)

__all__ = ["ALGORITHMS", "Algorithm"]
