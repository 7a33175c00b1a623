"""A function of one task as a function of many, whose arguments have a leading task axis.

`torch.func.vmap` computes all tasks at once. A model that it cannot map (branches on values, changes in place, some attention
kernels) is computed task by task, which gives the same numbers and takes longer.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.func import vmap
from torch.utils import _pytree as pytree

from quickbloom.common.maths.learner import Learner


def over_tasks(learner: Learner, function: Callable[..., Any], in_dims: tuple[int | None, ...]) -> Callable[..., Any]:
    """Return `function` mapped over the arguments that have the dimension 0 in `in_dims`; the others are shared."""
    if learner.maps:
        return vmap(function, in_dims=in_dims, randomness="error")
    return _one_by_one(function, in_dims)


def _one_by_one(function: Callable[..., Any], in_dims: tuple[int | None, ...]) -> Callable[..., Any]:
    """Return what `vmap` would, computed in a loop."""

    def mapped(*args: Any) -> Any:
        leaves = (leaf for arg, dim in zip(args, in_dims, strict=True) if dim is not None for leaf in pytree.tree_leaves(arg))
        found = []
        for task in range(next(leaves).shape[0]):
            parts = (
                arg if dim is None else pytree.tree_map(lambda leaf, at=task: leaf[at], arg)
                for arg, dim in zip(args, in_dims, strict=True)
            )
            found.append(function(*parts))
        return pytree.tree_map(lambda *values: torch.stack(values), *found)

    return mapped
