"""A function of one task as a function of many, whose arguments have a leading task axis.

`torch.func.vmap` computes all tasks at once. A model that it cannot map (branches on values, changes in place, some attention
kernels) is computed task by task, which gives the same numbers and takes longer. A single task is not mapped either: a mapped
convolution took three times as long as a plain one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.func import vmap
from torch.utils import _pytree as pytree

from quickbloom.common.maths.learner import Learner


def over_tasks(learner: Learner, function: Callable[..., Any], in_dims: tuple[int | None, ...]) -> Callable[..., Any]:
    """Return `function` mapped over the arguments that have the dimension 0 in `in_dims`; the others are shared."""
    one_by_one = _one_by_one(function, in_dims)
    if not learner.maps:
        return one_by_one
    at_once = vmap(function, in_dims=in_dims, randomness="error")

    def mapped(*args: Any) -> Any:
        return (one_by_one if _tasks(args, in_dims) == 1 else at_once)(*args)

    return mapped


def _one_by_one(function: Callable[..., Any], in_dims: tuple[int | None, ...]) -> Callable[..., Any]:
    """Return what `vmap` would, computed in a loop."""

    def mapped(*args: Any) -> Any:
        found = []
        for task in range(_tasks(args, in_dims)):
            parts = (
                arg if dim is None else pytree.tree_map(lambda leaf, at=task: leaf[at], arg)
                for arg, dim in zip(args, in_dims, strict=True)
            )
            found.append(function(*parts))
        return pytree.tree_map(lambda *values: torch.stack(values), *found)

    return mapped


def _tasks(args: tuple[Any, ...], in_dims: tuple[int | None, ...]) -> int:
    """Return the length of the task axis."""
    leaves = (leaf for arg, dim in zip(args, in_dims, strict=True) if dim is not None for leaf in pytree.tree_leaves(arg))
    return int(next(leaves).shape[0])
