"""Prototypes: the mean embedding of each class in a support set (Snell, Swersky, Zemel 2017, Equation 1)."""

import torch
from torch import Tensor

from quickbloom.common.maths.batch import Batch


def prototypes_of(embedded: Tensor, support: Batch, classes: int) -> tuple[Tensor, Tensor]:
    """Return (prototypes [classes, embedding], examples of each class [classes]) of embeddings [n, embedding].

    The prototype of a class without examples is 0.
    """
    # functional.one_hot does not work inside vmap.
    every = torch.arange(classes, device=support.y.device)
    members = (support.y.unsqueeze(-1) == every).to(support.weight.dtype) * support.weight.unsqueeze(-1)
    counts = members.sum(dim=0)
    return members.T @ embedded / counts.clamp(min=1).unsqueeze(-1), counts


def within_reach(known: Tensor) -> Tensor:
    """Return which classes can be recognised, bool [classes]: those that are `known` (1 or 0); all before any is."""
    return (known > 0) | (known.sum() == 0)
