"""Prototypes: the mean embedding of each class in a support set (Snell, Swersky, Zemel 2017, Equation 1)."""

import torch
from torch import Tensor

from quickbloom.common.maths.batch import Batch


def prototypes_of(embedded: Tensor, support: Batch, classes: int) -> tuple[Tensor, Tensor]:
    """Return (prototypes [classes, embedding], examples of each class [classes]) of embeddings [n, embedding].

    The prototype of a class without examples is 0.
    """
    members = members_of(support, classes)
    counts = members.sum(dim=0)
    return members.T @ embedded / counts.clamp(min=1).unsqueeze(-1), counts


def members_of(batch: Batch, classes: int) -> Tensor:
    """Return the weight of every example at its class and 0 elsewhere: [n, classes]."""
    # functional.one_hot does not work inside vmap.
    every = torch.arange(classes, device=batch.y.device)
    return (batch.y.unsqueeze(-1) == every).to(batch.weight.dtype) * batch.weight.unsqueeze(-1)


def within_reach(known: Tensor) -> Tensor:
    """Return which classes can be recognised, bool [classes]: those that are `known` (1 or 0); all before any is."""
    return (known > 0) | (known.sum() == 0)
