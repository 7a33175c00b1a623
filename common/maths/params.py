"""Named parameters as plain dictionaries, and the arithmetic that meta-learning needs on them."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

Params = dict[str, Tensor]

LARGE = 2**25
"""Size in bytes from which sums of a float32 tensor stay in float32, to save memory."""
_BLOCK = 2**20  # numbers


def add(a: Params, b: Params, scale: float | Tensor = 1.0) -> Params:
    """Return a + scale * b, key by key."""
    if isinstance(scale, Tensor):
        return {name: value + scale * b[name] for name, value in a.items()}
    # One pass over memory instead of two.
    return {name: torch.add(value, b[name], alpha=scale) for name, value in a.items()}


def subtract(a: Params, b: Params) -> Params:
    """Return a - b, key by key."""
    return {name: value - b[name] for name, value in a.items()}


def split(params: Params, names: Collection[str]) -> tuple[Params, Params]:
    """Return (the tensors in `names`, all others)."""
    return {k: v for k, v in params.items() if k in names}, {k: v for k, v in params.items() if k not in names}


def dot(a: Params, b: Params) -> Tensor:
    """Return the inner product over all keys; a scalar."""
    return torch.stack([(value * b[name]).sum() for name, value in a.items()]).sum()


def norm(params: Mapping[str, Tensor]) -> float:
    """Return the Euclidean norm over all keys, summed in float64."""
    parts = (part for value in params.values() for part in torch.split(value.reshape(-1), _BLOCK))
    return math.sqrt(sum(float(part.double().square().sum()) for part in parts))


def all_finite(params: Params) -> bool:
    """Return whether every number of every tensor is finite."""
    return all(bool(torch.isfinite(part).all()) for value in params.values() for part in torch.split(value.reshape(-1), _BLOCK))


def can_be_squared(value: Tensor) -> bool:
    """Return whether all numbers and the sum of their squares are finite, since optimizers square gradients.

    With Adam a gradient of 1e30 would stop the weights for good.
    """
    flat = value.reshape(-1)
    if flat.dtype == torch.float16:  # squares of ordinary numbers exceed its maximum, 65504
        flat = flat.float()
    # A dot product, since a tensor of squares would take as much memory again.
    return not value.is_floating_point() or bool(torch.isfinite(flat @ flat))


def mismatch(params: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> str | None:
    """Return in words why `params` cannot replace `reference` (keys, shapes, dtypes); None if it can."""
    if missing := sorted(reference.keys() - params.keys()):
        return f"the tensor `{missing[0]}` is missing"
    if extra := sorted(params.keys() - reference.keys()):
        return f"there is an unexpected tensor `{extra[0]}`"
    for name, value in reference.items():
        if params[name].shape != value.shape:
            return f"the tensor `{name}` has shape {tuple(params[name].shape)}, expected {tuple(value.shape)}"
        if params[name].dtype != value.dtype:
            came, expected = (str(dtype).removeprefix("torch.") for dtype in (params[name].dtype, value.dtype))
            return f"the tensor `{name}` has dtype {came}, expected {expected}"
    return None


def weighted_mean(items: Iterable[tuple[Mapping[str, Tensor], float]]) -> Params:
    """Return sum(weight * params) / sum(weight), summed in float64 so that the order hardly matters.

    Computed block by block, since float64 sums of a whole model would take twice its memory. Raises
    ValueError unless the weights add up to more than 0.
    """
    listed = list(items)
    weights = [weight for _, weight in listed]
    if sum(weights) <= 0:
        raise ValueError("a weighted mean needs at least one item with a positive weight")
    return {name: _mean([params[name] for params, _ in listed], weights) for name in listed[0][0]}


def _mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    result = torch.empty(values[0].shape, dtype=values[0].dtype, device=values[0].device)
    flat, out, total = [value.reshape(-1) for value in values], result.view(-1), sum(weights)
    for start in range(0, out.numel(), _BLOCK):
        part = slice(start, start + _BLOCK)
        block = torch.zeros_like(out[part], dtype=torch.float64)
        for value, weight in zip(flat, weights, strict=True):
            block += weight * value[part].double()
        out[part] = block / total
    return result


def zeros(like: Params) -> Params:
    """Return contiguous zeros in the shapes of `like`, as the start of sums by `add_weighted`.

    They are float64, but float32 for a float32 tensor of at least LARGE bytes, whose float64 sums
    would take twice its memory.
    """
    return {name: torch.zeros(value.shape, dtype=_type_of_sums(value), device=value.device) for name, value in like.items()}


def _type_of_sums(value: Tensor) -> torch.dtype:
    return torch.float32 if value.dtype == torch.float32 and value.nbytes >= LARGE else torch.float64


def add_weighted(total: Tensor, values: Tensor, weights: Tensor) -> None:
    """Add sum over i of weights[i] * values[i] to `total` in place; `total` is from `zeros`, `weights` [n] float64.

    Computed in pieces, so that `values` [n, ...] of a large model are never copied to float64 as a
    whole.
    """
    flat = total.view(-1)
    for part, piece in _weighted_pieces(values, weights):
        flat[part] += piece


def weighted_quotient(values: Tensor, weights: Tensor, divisor: float, dtype: torch.dtype) -> Tensor:
    """Return (sum over i of weights[i] * values[i]) / divisor in `dtype`.

    Equal bit for bit to `add_weighted` on zeros followed by division, but needs no float64 sum
    beside the result.
    """
    result = torch.empty(values.shape[1:], dtype=dtype, device=values.device)
    flat = result.view(-1)
    for part, piece in _weighted_pieces(values, weights):
        flat[part] = (piece + 0.0) / divisor  # + 0.0 turns -0 into 0, as a sum that starts at 0 does
    return result


def _weighted_pieces(values: Tensor, weights: Tensor) -> Iterator[tuple[slice, Tensor]]:
    rows = values.reshape(len(weights), -1)
    width = max(1, _BLOCK // max(1, len(weights)))
    for start in range(0, rows.shape[1], width):
        part = slice(start, start + width)
        yield part, weights @ rows[:, part].double()
