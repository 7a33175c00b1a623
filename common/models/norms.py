"""Normalisations without running state, which could not be averaged over tasks, and the parameters of any."""

from typing import Literal

from torch import nn

Norm = Literal["group", "batch", "none"]
NORM = "normalisation; `batch`: by the batch in training, by the support set for predictions (see `transductive`)"


def norm_layers(norm: Norm, channels: int) -> list[nn.Module]:
    """Return the layer that normalises `channels` channels, in a list; an empty list for "none"."""
    if norm == "group":
        return [nn.GroupNorm(_groups(channels), channels)]
    return [nn.BatchNorm2d(channels, track_running_stats=False)] if norm == "batch" else []


def norm_parameters(module: nn.Module) -> list[str]:
    """Return the names of scale and shift of all normalisations, of torch or of a library with its own classes."""
    layers = [name for name, one in module.named_modules() if _is_norm(one)]
    return [name for name, _ in module.named_parameters() if name.rpartition(".")[0] in layers]


def _is_norm(module: nn.Module) -> bool:
    """Return whether a layer is a normalisation, of torch or of a library with its own classes (LlamaRMSNorm)."""
    return "norm" in type(module).__name__.lower() and next(module.children(), None) is None


def _groups(channels: int) -> int:
    # At least 4 channels per group: small images shrink to 1 x 1, where a group of one channel is normalised to zero.
    return max(groups for groups in (8, 4, 2, 1) if channels % groups == 0 and (channels // groups >= 4 or groups == 1))
