"""Weights from a file to start from, and which parameters are trained: the settings `weights` and `trainable`."""

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from quickbloom.common.errors import ConfigError, as_told, in_one_line
from quickbloom.common.models.norms import norm_parameters

ALL, HEAD, NORM, BIAS = "all", "head", "norm", "bias"
"""Words for `trainable`: what the model leaves trainable by itself, its last layer, normalisations, biases."""

_COUNTER = "num_batches_tracked"
"""End of the name of a buffer of batch norm that older files lack, and that nothing here uses."""


def load_weights(module: nn.Module, path: str, last: str) -> str:
    """Copy the tensors of the file `path` into `module`, and return a sentence on what was left as it is, or "".

    The file is in safetensors format, or one of torch with tensors alone, as `torch.save(module.state_dict(), path)` writes
    it; nothing is unpickled. It must hold the module's parameters and buffers under their names. Those of the layer `last`
    may be missing or of another shape, since a pretrained model usually had other classes: then they stay freshly made.
    Raises ConfigError.
    """
    found, wanted = _read(path), module.state_dict()
    start = f"{last}." if last else ""
    of_head = {name for name in found.keys() | wanted.keys() if name.startswith(start)} if last else set()
    skipped = {
        name for name in of_head if name not in wanted or name not in found or _shape(found[name]) != _shape(wanted[name])
    }
    if skipped:  # the whole layer, since half of it would be of no use
        skipped = of_head
    said = f"`weights` must be a file with the tensors of the model, and '{as_told(path, 200)}'"
    if missing := sorted(name for name in wanted.keys() - found.keys() - skipped if not name.endswith(_COUNTER)):
        raise ConfigError(f"{said} lacks `{as_told(missing[0], 100)}`{_and_more(missing)}: use the file of the same model")
    if extra := sorted(found.keys() - wanted.keys() - skipped):
        raise ConfigError(f"{said} also has `{as_told(extra[0], 100)}`{_and_more(extra)}: use the file of the same model")
    used = {name: value for name, value in found.items() if name not in skipped}
    for name, value in used.items():
        if _shape(value) != _shape(wanted[name]):
            raise ConfigError(
                f"{said} has `{as_told(name, 100)}` in the shape {_shape(value)}, expected {_shape(wanted[name])}: use the "
                "file of the same model"
            )
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ConfigError(f"{said} has numbers in `{as_told(name, 100)}` that are not finite: train it again")
    module.load_state_dict(used, strict=False)
    if not skipped:
        return ""
    return f"The layer `{last}` starts afresh: the file of `weights` has it for other outputs, or not at all"


def _read(path: str) -> Mapping[str, Tensor]:
    """Return the tensors of a file by name. Raises ConfigError."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"`weights` must be a file, and there is none at '{as_told(path, 200)}': name a .safetensors file")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(
            f"`weights` must be a file that can be read, and '{as_told(path, 200)}' is not ({in_one_line(error)})"
        ) from None
    except Exception as error:  # torch raises a dozen types for what is no file of tensors
        raise ConfigError(
            f"`weights` must be a file of tensors alone, and '{as_told(path, 200)}' is not ({type(error).__name__}): nothing "
            "is unpickled, so save the model's state_dict(), best with safetensors.torch.save_file"
        ) from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        raise ConfigError(
            f"`weights` must be a file of tensors by name, and '{as_told(path, 200)}' holds something else: save the model's "
            "state_dict()"
        )
    return content


def chosen(module: nn.Module, trainable: str, last: str) -> set[str]:
    """Return the names of the parameters to train. `last`: the layer that runs last. Raises ConfigError.

    `trainable`: words and patterns with commas between them, such as "norm,head" or "encoder.layer.5.*,head.*". Words are
    "all" (what the module leaves trainable by itself), "head" (the layer `last`), "norm" (scale and shift of all
    normalisations) and "bias"; patterns are those of a shell, over whole names.
    """
    parameters = {name: value for name, value in module.named_parameters() if value.is_floating_point()}
    found: set[str] = set()
    for part in (one.strip() for one in trainable.split(",")):
        of_part = _of_part(module, parameters, part, last)
        if not of_part:
            some = ", ".join(list(parameters)[:10]) + (", .." if len(parameters) > 10 else "")
            raise ConfigError(
                f"`trainable` must be all, head, norm, bias or patterns that fit parameters of the model ({some}), with commas "
                f"between them, and '{as_told(part, 100)}' fits none"
            )
        found |= of_part
    return found


def _of_part(module: nn.Module, parameters: Mapping[str, nn.Parameter], part: str, last: str) -> set[str]:
    if part == ALL:
        return {name for name, value in parameters.items() if value.requires_grad}
    if part == HEAD:
        return {name for name in parameters if name.startswith(f"{last}." if last else "")}
    if part == NORM:
        return set(norm_parameters(module)) & parameters.keys()
    if part == BIAS:
        return {name for name in parameters if name.rpartition(".")[2] == "bias"}
    return {name for name in parameters if fnmatchcase(name, part)}


def _shape(value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape)


def _and_more(names: Collection[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
