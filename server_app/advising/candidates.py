"""What `quickbloom advise` tries, the simplest first."""

from dataclasses import dataclass

from quickbloom.common.config.run import Scalar
from quickbloom.common.datasets.base import DataSpec


@dataclass(frozen=True)
class Candidate:
    """An algorithm with a model. `name`: for people."""

    algorithm: str
    model: str

    @property
    def name(self) -> str:
        return f"{self.algorithm}, {self.model}"

    @property
    def settings(self) -> dict[str, Scalar]:
        return {"algorithm": self.algorithm, "model": self.model}

    @property
    def words(self) -> list[str]:
        """What a user types for it after `quickbloom run`."""
        return ["--algorithm", self.algorithm, "--set", f"model={self.model}"]


_FOR_CLASSES = (("fedavg", "linear"), ("ridge", "linear"), ("ridge", "mlp"), ("protonet", "mlp"), ("maml", "mlp"))
_FOR_NUMBERS = (
    ("fedavg", "linear"), ("ridge", "linear"), ("alpaca", "linear"), ("ridge", "mlp"), ("alpaca", "mlp"), ("maml", "mlp"),
)  # fmt: skip
_FOR_IMAGES = (("ridge", "conv4"), ("protonet", "conv4"), ("fomaml", "conv4"))


def candidates_for(spec: DataSpec) -> list[Candidate]:
    """Return what is tried on data of this form."""
    if len(spec.input_shape) == 3:
        found = [one for one in _FOR_IMAGES if spec.kind == "classification" or one[0] != "protonet"]
    else:
        found = list(_FOR_CLASSES if spec.kind == "classification" else _FOR_NUMBERS)
    return [Candidate(*one) for one in found]
