"""Normalisations without running state, which could not be averaged over tasks."""

from typing import Literal

from torch import nn

Norm = Literal["group", "batch", "none"]
NORM = "normalisation; `batch` uses the statistics of the batch at hand, so scores with it are transductive"


def norm_layers(norm: Norm, channels: int) -> list[nn.Module]:
    """Return the layer that normalises `channels` channels, in a list; an empty list for "none"."""
    if norm == "group":
        return [nn.GroupNorm(_groups(channels), channels)]
    return [nn.BatchNorm2d(channels, track_running_stats=False)] if norm == "batch" else []


def _groups(channels: int) -> int:
    # At least 4 channels per group: small images shrink to 1 x 1, where a group of one channel is normalised to zero.
    return max(groups for groups in (8, 4, 2, 1) if channels % groups == 0 and (channels // groups >= 4 or groups == 1))
