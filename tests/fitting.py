"""What an algorithm needs of its model, for tests that run over all algorithms."""

from torch import nn

SETTINGS: dict[str, dict[str, str]] = {"fedbn": {"model": "mlp", "mlp.norm": "layer"}}
"""Settings of the model, by algorithm, where the usual one is refused."""


def activation(name: str, units: int) -> nn.Module:
    """tanh, after a normalisation for an algorithm that needs one."""
    return nn.Sequential(nn.LayerNorm(units), nn.Tanh()) if name in SETTINGS else nn.Tanh()
