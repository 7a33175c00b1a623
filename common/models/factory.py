"""User models: `model = "module:factory"` names a function (input_shape, outputs) -> torch.nn.Module."""

from collections.abc import Callable

from torch import nn

from quickbloom.common.errors import ConfigError, in_one_line
from quickbloom.common.system.user_code import import_own


def is_own_model(name: str) -> bool:
    """Return whether `name` means a user's model and not one of `MODELS`."""
    return ":" in name


def own_factory(name: str) -> Callable[[tuple[int, ...], int], nn.Module]:
    """Return the factory that "module:factory" names. Both it and this function raise ConfigError for any failure."""
    module_name, _, attribute = name.partition(":")
    try:
        module = import_own(module_name)
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(
            f'`model = "{name}"` must name a module that can be imported, but that raised {in_one_line(error)}: start in the '
            "directory that holds it, or install it where the server and the nodes run"
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        found = f"a {type(factory).__name__}" if hasattr(module, attribute) else "nothing of that name"
        raise ConfigError(f'`model = "{name}"` must name a function (input_shape, outputs) -> torch.nn.Module, got {found}')

    def build(input_shape: tuple[int, ...], outputs: int) -> nn.Module:
        asked = f'`model = "{name}"` must return a torch.nn.Module when it is called with {input_shape} and {outputs}'
        try:
            built = factory(input_shape, outputs)
        except Exception as error:  # the user's code may raise anything
            raise ConfigError(f"{asked}, but it raised {in_one_line(error)}") from error
        if not isinstance(built, nn.Module):
            raise ConfigError(f"{asked}, got a {type(built).__name__}")
        return built

    return build
