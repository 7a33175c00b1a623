"""The identity plus a map that starts at zero: in front of a frozen encoder's features, training starts from what these can do.

A fresh layer would first have to learn again what the encoder knows; this one changes nothing until it is trained (as the
residual adapters of Rebuffi, Bilen, Vedaldi 2017, "Learning multiple visual domains with residual adapters").
"""

from math import prod
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from quickbloom.common.models.base import Model
from quickbloom.common.options import Options


class ResidualOptions(Options):
    rank: int = Field(0, ge=0, le=65_536, description="rank of the map; 0: full")
    hidden: int = Field(
        0, ge=0, le=65_536, description="hidden units with ReLU, which make the map nonlinear; 0: the map is linear, of `rank`"
    )


class Residual(Model):
    """x + map(x), then Linear to the outputs where the algorithm does not take the features themselves."""

    name = "residual"
    Options: ClassVar[type[Options]] = ResidualOptions

    @classmethod
    def build(cls, options: Any, input_shape: tuple[int, ...], outputs: int, tokens: int = 0) -> nn.Module:
        size = prod(input_shape)
        body = nn.Sequential(nn.Flatten(), _Residual(size, options.rank, options.hidden))
        return nn.Sequential(body, nn.Linear(size, outputs)) if outputs else body

    @classmethod
    def embedding(cls, options: Any, input_shape: tuple[int, ...]) -> int:
        return prod(input_shape)


class _Residual(nn.Module):
    def __init__(self, size: int, rank: int, hidden: int) -> None:
        super().__init__()
        between = hidden or rank
        self.down = nn.Linear(size, between, bias=bool(hidden)) if between else nn.Identity()
        self.between = nn.ReLU() if hidden else nn.Identity()
        self.up = nn.Linear(between or size, size, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        moved: Tensor = self.up(self.between(self.down(x)))
        return x + moved
