"""Encodings of a node's update (`update-dtype`): fewer bits per number, or fewer numbers.

`encode` and `decode` are pure functions on named tensors. A tensor of zeros, such as that of an
untrained layer, is sent as an empty one. The encoding error stays on the node and is added to its
next update (error feedback: Seide, Fu, Droppo, Li, Yu 2014; for top-k Stich, Cordonnier, Jaggi
2018, "Sparsified SGD with Memory", Algorithm 1).
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from quickbloom.common.maths.params import Params, add, can_be_squared, subtract

FLOAT32 = "float32"
_SCALE, _INDEX = "#scale", "#index"  # suffixes to a tensor's name, which contains no #


class CodingError(ValueError):
    """An encoded update does not have the form of its kind; the message says what is wrong."""


def encode(update: Params, kind: str, share: float, random: np.random.Generator) -> Params:
    """Return the tensors to send for `update`, on the CPU.

    `share`: share of each tensor's numbers that top-k sends, at least one.
    """
    coded: Params = {}
    for name, tensor in update.items():
        value = tensor.detach().cpu()
        if not value.any():
            coded[name] = value.new_zeros(0)
        else:
            coded |= {name + suffix: part for suffix, part in _ENCODERS[kind](value, share, random).items()}
    return coded


def decode(coded: Mapping[str, Tensor], kind: str, like: Params) -> Params:
    """Return the update, with the keys, shapes and dtypes of `like`.

    Raises CodingError for input that `encode` cannot produce.
    """
    left, update = dict(coded), {}
    for name, reference in like.items():
        if name not in left:
            raise CodingError(f"the tensor `{name}` is missing")
        value = left.pop(name)
        if value.shape == (0,) and value.dtype == reference.dtype:
            update[name] = torch.zeros_like(reference, device="cpu")
            continue
        parts = {suffix: left.pop(name + suffix) for suffix in (_SCALE, _INDEX) if name + suffix in left}
        decoded = _DECODERS[kind](name, {"": value, **parts}, reference)
        if not can_be_squared(decoded):
            raise CodingError(f"the tensor `{name}` holds NaN, infinity or numbers that are too large")
        update[name] = decoded.to(reference.dtype) if kind != FLOAT32 else decoded
    if left:
        raise CodingError(f"there is an unexpected tensor `{sorted(left)[0]}`")
    return update


def with_feedback(
    update: Params, weight: float, lost: Params | None, kind: str, share: float, random: np.random.Generator
) -> tuple[Params, Params | None]:
    """Return (tensors to send, new error) for an update of the given weight, with the error `lost` of earlier updates added.

    The error is stored times the weight, as it is missing in the sum; in units of the mean it would
    return with another round's weight. An update of weight 0 does not count, so the old error
    stays.
    """
    if weight <= 0:
        return encode(update, kind, share, random), lost
    wanted = update if lost is None else add(update, lost, 1 / weight)
    coded = encode(wanted, kind, share, random)
    missing = subtract({name: value.cpu() for name, value in wanted.items()}, decode(coded, kind, wanted))
    return coded, {name: value * weight for name, value in missing.items()}


# ---- one tensor; its parts are named by their suffix

Parts = dict[str, Tensor]


def _as_it_is(value: Tensor, share: float, random: np.random.Generator) -> Parts:
    return {"": value}


def _bfloat16(value: Tensor, share: float, random: np.random.Generator) -> Parts:
    return {"": value.bfloat16().view(torch.int16)}  # Flower's arrays do not support bfloat16


def _float16(value: Tensor, share: float, random: np.random.Generator) -> Parts:
    scale = value.abs().max()  # float16 alone covers only 6e-8 to 65504
    return {"": (value / scale).half(), _SCALE: scale.float()}


def _int8(value: Tensor, share: float, random: np.random.Generator) -> Parts:
    """Round up or down at random, so that the mean over many roundings is the number itself."""
    scale = value.abs().max().float() / 127
    dither = torch.from_numpy(random.random(value.shape, dtype=np.float32))
    return {"": (value / scale + dither).floor().clamp(-127, 127).to(torch.int8), _SCALE: scale}


def _top_k(value: Tensor, share: float, random: np.random.Generator) -> Parts:
    flat = value.flatten()
    index = flat.abs().topk(max(1, math.ceil(share * flat.numel() - 1e-9))).indices.sort().values
    return {"": flat[index], _INDEX: index.to(torch.int32)}


def _from_it_is(name: str, parts: Parts, like: Tensor) -> Tensor:
    return _checked(name, parts, like.shape, like.dtype)


def _from_bfloat16(name: str, parts: Parts, like: Tensor) -> Tensor:
    return _checked(name, parts, like.shape, torch.int16).view(torch.bfloat16).float()


def _from_scaled(dtype: torch.dtype) -> Callable[[str, Parts, Tensor], Tensor]:
    def decoder(name: str, parts: Parts, like: Tensor) -> Tensor:
        scale = parts.pop(_SCALE, None)
        if scale is None or scale.shape != () or scale.dtype != torch.float32:
            raise CodingError(f"the tensor `{name}` needs one float32 as its scale")
        return _checked(name, parts, like.shape, dtype).float() * scale

    return decoder


def _from_top_k(name: str, parts: Parts, like: Tensor) -> Tensor:
    index = parts.pop(_INDEX, None)
    if index is None or index.dtype != torch.int32 or index.ndim != 1 or not len(index):
        raise CodingError(f"the tensor `{name}` needs a list of int32 as its positions")
    value = _checked(name, parts, index.shape, like.dtype)
    rising = bool((index[1:] > index[:-1]).all())
    if not rising or index[0] < 0 or index[-1] >= like.numel():
        raise CodingError(f"the positions of the tensor `{name}` must rise and lie within its {like.numel()} numbers")
    flat = torch.zeros(like.numel(), dtype=like.dtype)
    flat[index.long()] = value
    return flat.view(like.shape)


def _checked(name: str, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    value = parts.pop("")
    if parts:
        raise CodingError(f"there is an unexpected tensor `{name}{sorted(parts)[0]}`")
    if value.shape != shape:
        raise CodingError(f"the tensor `{name}` has shape {tuple(value.shape)}, expected {tuple(shape)}")
    if value.dtype != dtype:
        came, expected = (str(kind).removeprefix("torch.") for kind in (value.dtype, dtype))
        raise CodingError(f"the tensor `{name}` has dtype {came}, expected {expected}")
    return value


_ENCODERS = {FLOAT32: _as_it_is, "bfloat16": _bfloat16, "float16": _float16, "int8": _int8, "top-k": _top_k}
_DECODERS = {
    FLOAT32: _from_it_is,
    "bfloat16": _from_bfloat16,
    "float16": _from_scaled(torch.float16),
    "int8": _from_scaled(torch.int8),
    "top-k": _from_top_k,
}
KINDS = tuple(_ENCODERS)
