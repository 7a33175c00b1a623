"""The functions of somebody's own Flower app, in the form in which `flwr new` writes them, and how they are called.

load_data(partition_id, num_partitions) -> (trainloader, testloader)
train(net, trainloader, epochs, lr, device) -> mean loss, or None
test(net, testloader, device) -> (loss, accuracy); for regression (loss, mean squared error)
"""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quickbloom.common.datasets.base import Kind
from quickbloom.common.errors import ConfigError, as_told, in_one_line
from quickbloom.common.maths.params import Params
from quickbloom.common.wire.messages import LARGEST_LOSS, LOSS_ROUNDING


@dataclass(frozen=True)
class Pull:
    """A pull of weights towards `anchor`: lambda / 2 ||phi - anchor||^2 is added to whatever loss the app's trainer has."""

    anchor: Params
    strength: float


@dataclass(frozen=True)
class Trainer:
    """The functions of the app. `kind`: of what its network predicts; `inputs`: how a batch tells the network's input."""

    load: Callable[..., Any]
    train: Callable[..., Any]
    test: Callable[..., Any]
    kind: Kind = "classification"
    inputs: Callable[[Any], Tensor] | None = None

    def loaders(self, partition_id: int, num_partitions: int) -> tuple[Any, Any]:
        """Return the node's own (trainloader, testloader). Raises ConfigError."""
        found = _called("load_data", self.load, partition_id, num_partitions)
        try:
            train, test = found
        except (TypeError, ValueError):
            raise ConfigError(f"your `load_data` must return (trainloader, testloader), got a {type(found).__name__}") from None
        return train, test

    def input_of(self, loader: Any) -> Tensor:
        """Return the network's input in the first batch of a loader. Raises ConfigError."""
        batch = next(iter(loader), None)
        if batch is None:
            raise ConfigError("your `load_data` must return a trainloader with at least one batch, got an empty one")
        if self.inputs is not None:
            found: Any = _called("inputs", self.inputs, batch)
        else:
            parts = list(batch.values()) if isinstance(batch, dict) else [batch] if isinstance(batch, Tensor) else list(batch)
            found = next((part for part in parts if isinstance(part, Tensor) and part.ndim > 1), None)
        if not isinstance(found, Tensor) or found.ndim < 2:
            raise ConfigError(
                "a batch of your trainloader must hold a tensor [examples, ...] that your network reads, got a "
                f"{type(batch).__name__}: give `inputs=lambda batch: ...`, which returns it"
            )
        return found

    def trained(
        self, net: nn.Module, loader: Any, epochs: int, lr: float, device: torch.device, pull: Pull | None = None
    ) -> float | None:
        """Train `net` in place; return the loss that the app's function tells, None if it tells none. Raises ConfigError."""
        with _pulled(net, pull):
            told = _called("train", self.train, net, loader, epochs, lr, device)
        is_number = isinstance(told, (int, float, np.number, Tensor)) and np.ndim(told) == 0
        return _from_zero(float(told), "loss that your `train` returns") if is_number else None

    def scored(self, net: nn.Module, loader: Any, device: torch.device) -> tuple[float, float]:
        """Return (loss, accuracy or mean squared error) of `net`. Raises ConfigError."""
        told = _called("test", self.test, net, loader, device)
        try:
            loss, metric = (float(value) for value in told)
        except (TypeError, ValueError):
            what = "accuracy" if self.kind == "classification" else "mean squared error"
            shown = as_told(repr(told))  # which may be a user's predictions
            raise ConfigError(f"your `test` must return (loss, {what}), two numbers, got {shown}", shown) from None
        if self.kind == "classification" and not (0 <= metric <= 1 or math.isnan(metric)):
            raise ConfigError(f"the accuracy that your `test` returns must be a share from 0 to 1, got {metric:g}")
        return _from_zero(loss, "loss that your `test` returns"), _from_zero(metric, "error that your `test` returns")


@contextmanager
def seeded(rng: np.random.Generator) -> Iterator[None]:
    """Within this context the global generators of torch, numpy and Python follow `rng`; afterwards they are as before."""
    kept = random.getstate(), np.random.get_state()
    seed = int(rng.integers(2**32))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])


@contextmanager
def _pulled(net: nn.Module, pull: Pull | None) -> Iterator[None]:
    """Within this context every gradient of `net` has the pull in it, whatever loss and optimizer the trainer has."""
    handles = []
    for name, value in net.named_parameters() if pull else ():
        if pull is not None and name in pull.anchor and value.requires_grad:
            hook = _adding(pull.anchor[name], value, pull.strength)
            handles.append(value.register_hook(hook))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(anchor: Tensor, value: Tensor, strength: float) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient + strength * (value.detach() - anchor.to(value.device))


def _from_zero(value: float, what: str) -> float:
    """Return a number of the app as a reply may hold it. Raises ConfigError for one below 0."""
    if value < -LOSS_ROUNDING:
        raise ConfigError(f"the {what} must be 0 or more, got {value:g}: leave out what is subtracted from it")
    return min(max(value, 0.0), LARGEST_LOSS) if math.isfinite(value) else value


def _called(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception as error:  # the app's code may raise anything
        told = in_one_line(error)
        raise ConfigError(f"`{name}` of your Flower app raised {told}: mend it there", told) from error
