"""A torch module as an encoder of pictures or numbers, shared by `timm` and by a user's own factory."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quickbloom.common.encoders.base import Encoder, Features, digest_of, of_probe, sources
from quickbloom.common.encoders.pictures import Normalising
from quickbloom.common.encoders.pooling import pooled
from quickbloom.common.errors import ConfigError, in_one_line


class ModuleEncoder(Encoder):
    """A module in evaluation mode: dropout is off, batch norm uses its running statistics."""

    def __init__(self, module: nn.Module, what: str, pooling: str, normalising: Normalising | int, factory: Any = None) -> None:
        """`normalising`: how pictures are prepared; a number: it reads so many numbers. Raises ConfigError for a misfit.

        `factory`: the user's function that made the module.
        """
        self._module = module.eval().requires_grad_(False)
        self._normalising = normalising
        self.shorter_side = normalising.resize if isinstance(normalising, Normalising) else 0
        self.kind = "images" if isinstance(normalising, Normalising) else "numbers"
        self._pooling = "mean" if pooling == "auto" else pooling
        pictures = normalising.to_json() if isinstance(normalising, Normalising) else normalising
        facts = {"pooling": self._pooling, "pictures": pictures, "weights": weights_digest(module.state_dict())}
        facts |= {"name": what, "layers": repr(module)}
        self.digest = digest_of(facts, *(sources(factory, type(module)) if factory else ()))
        made_up = np.zeros((8, 8, 3), np.uint8) if isinstance(normalising, Normalising) else np.zeros(normalising, np.float32)
        try:
            found = self.encode([made_up, made_up])
        except Exception as error:  # the module may raise anything
            raise ConfigError(f"the encoder '{what}' cannot encode two examples ({in_one_line(error)})") from error
        if found.ndim != 2 or len(found) != 2:
            raise ConfigError(f"the encoder '{what}' must give features [n, size], got the shape {found.shape} for 2 examples")
        self.size = int(found.shape[1])

    @cached_property
    def stored_as(self) -> str:
        rng = np.random.default_rng(0)
        if isinstance(self._normalising, Normalising):
            return of_probe(self, list(rng.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)))
        return of_probe(self, list(rng.normal(size=(4, self._normalising)).astype(np.float32)))

    @property
    def columns(self) -> int:
        """Numbers of one example, for an encoder of numbers."""
        return self._normalising if isinstance(self._normalising, int) else 0

    def encode(self, examples: Sequence[Any]) -> Features:
        if isinstance(self._normalising, Normalising):
            x = self._normalising.inputs(examples)
        else:
            x = torch.from_numpy(np.stack(examples).astype(np.float32))
        with torch.inference_mode():
            states = self._module(x)
        if not isinstance(states, Tensor):
            raise TypeError(f"it gives a {type(states).__name__}, not a tensor")
        return np.asarray(pooled(states, None, self._pooling).float().cpu().numpy())


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of named tensors."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
