"""Interface of a model file: settings, and a function from shapes to a torch module."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import nn

from quickbloom.common.errors import ConfigError
from quickbloom.common.options import Options


class Model(ABC):
    """One model family. A new one is a file with a subclass, and one line in `MODELS`."""

    name: ClassVar[str]
    Options: ClassVar[type[Options]]
    tokens: ClassVar[bool] = False
    """True if the model reads int64 token ids instead of numbers."""
    pretrained: ClassVar[bool] = False
    """True if the model has constants, which it reads from files of its own."""
    own_trainer: ClassVar[bool] = False
    """True if a Flower app trains the model with code of its own: then it needs no derivatives of `torch.func`."""

    @classmethod
    @abstractmethod
    def build(cls, options: Any, input_shape: tuple[int, ...], outputs: int, tokens: int = 0) -> nn.Module:
        """Return a freshly initialised module from inputs [n, *input_shape] to outputs [n, outputs].

        `tokens` is the number of token ids, for a model that reads tokens; 0 means as many as
        outputs. `outputs` is 0 for the embedding of `embedding`, without a layer after it. Raises
        ConfigError if the model does not fit these shapes.
        """

    @classmethod
    def embedding(cls, options: Any, input_shape: tuple[int, ...]) -> int:
        """Return the size of the embedding that the model gives without a layer to its outputs; 0: it gives none.

        Raises ConfigError if the model's files cannot be used.
        """
        return 0


def parse_sizes(setting: str, text: str) -> tuple[int, ...]:
    """Return the layer sizes of a comma-separated setting: "64,64" -> (64, 64); "" -> (). Raises ConfigError."""
    try:
        sizes = tuple(int(part) for part in text.split(",")) if text.strip() else ()
    except ValueError:
        sizes = (0,)
    if any(size < 1 for size in sizes):
        raise ConfigError(f"`{setting}` must be positive whole numbers with commas between them, such as '64,64', got '{text}'")
    return sizes
