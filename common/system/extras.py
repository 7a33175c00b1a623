"""Optional dependencies (extras), and the error message for a missing one."""

import importlib.util
from types import ModuleType

from quickbloom.common.errors import ConfigError, QuickbloomError

_PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn", "dp_accounting": "dp-accounting", "mlflow": "mlflow-skinny"}
"""Package names of modules whose name differs."""


def needs(
    extra: str, module: str, what: str, *, instead: str = "", error: type[QuickbloomError] = ConfigError, load: bool = True
) -> ModuleType | None:
    """Return the module that `what` needs from the extra. Raises `error` if it is not installed.

    `instead`: an alternative for the user, as the end of the sentence. With `load` false the module
    is only looked up and None is returned, since importing may take seconds.
    """
    try:
        if load:
            return importlib.import_module(module)
        if importlib.util.find_spec(module) is not None:
            return None
    except ImportError as missing:
        # Name the module that is missing, which may be a dependency of the one asked for.
        if missing.name and missing.name.split(".")[0] != module.split(".")[0]:
            module = missing.name
    package = _PACKAGES.get(module.split(".")[0], module.split(".")[0])
    raise error(f"{what} needs {package}, which is not installed: run pip install 'quickbloom[{extra}]'{instead}") from None
