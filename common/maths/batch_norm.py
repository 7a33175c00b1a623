"""Batch norm without running statistics: those of some examples, recorded to normalise others by them.

By itself such a layer normalises by the batch at hand, so that the prediction for one example depends on which others are
predicted beside it ("transductive"). With the statistics of a task's support set among the parameters, under the names of
torch's own buffers, it does not ("inductive").
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quickbloom.common.maths.params import Params

_MEAN, _VARIANCE = "running_mean", "running_var"
"""Names of torch's buffers, which are None in a layer without running statistics."""


def without_statistics(module: nn.Module) -> dict[str, nn.Module]:
    """Return the batch norm layers that have no running statistics, by name."""
    return {
        name: one
        for name, one in module.named_modules()
        if isinstance(one, nn.modules.batchnorm._BatchNorm) and one.running_mean is None
    }


def names_of(layers: Mapping[str, nn.Module]) -> list[str]:
    """Return the names of the statistics of these layers: a mean and a variance [channels] each."""
    return [f"{name}{'.' if name else ''}{buffer}" for name in layers for buffer in (_MEAN, _VARIANCE)]


def shapes_of(layers: Mapping[str, nn.Module], dtype: torch.dtype) -> Params:
    """Return zeros in the shapes of the statistics, by name."""
    channels = [int(layer.num_features) for layer in layers.values() for _ in range(2)]  # type: ignore[arg-type]
    return {name: torch.zeros(size, dtype=dtype) for name, size in zip(names_of(layers), channels, strict=True)}


def recorded(layers: Mapping[str, nn.Module], run: Callable[[], Any], dtype: torch.dtype) -> Params:
    """Return the statistics of what enters each layer while `run` computes the model without any.

    A layer that runs several times gets those of all its inputs together, each time weighing the same. A layer that does not
    run gets none. Works under `torch.func.vmap`.
    """
    moments: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def note(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].to(dtype)
        mean = x.mean(dim=[0, *range(2, x.dim())])
        # The mean of squared gaps, since a difference of two large moments would lose its digits.
        gaps = (x - mean.reshape(1, -1, *[1] * (x.dim() - 2))).square().mean(dim=[0, *range(2, x.dim())])
        moments.setdefault(name, []).append((mean, gaps))

    handles = [layer.register_forward_pre_hook(partial(note, name)) for name, layer in layers.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    found: Params = {}
    for name, passes in moments.items():
        means, gaps = (torch.stack(list(values)) for values in zip(*passes, strict=True))
        mean = means.mean(dim=0)
        variance = (gaps + (means - mean).square()).mean(dim=0)
        found |= dict(zip(names_of({name: layers[name]}), (mean, variance), strict=True))
    return found
