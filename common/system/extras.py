"""The extras of this package, and the sentence for whoever lacks what one of them installs."""

import importlib.util
from types import ModuleType

from quickbloom.common.errors import ConfigError, QuickbloomError

_PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn", "dp_accounting": "dp-accounting", "mlflow": "mlflow-skinny"}
"""What pip calls a module, where that is not its name."""


def needs(
    extra: str, module: str, what: str, *, instead: str = "", error: type[QuickbloomError] = ConfigError, load: bool = True
) -> ModuleType | None:
    """The module that `what` needs and that the extra installs. Raises `error` where it is not installed.

    `instead`: what else the user can do, as the end of the sentence. With `load` false it is looked for and not imported, which
    may take seconds.
    """
    try:
        if load:
            return importlib.import_module(module)
        if importlib.util.find_spec(module) is not None:
            return None
    except ImportError as missing:
        # Not a module of this package, which is a defect, nor one whose own needs are broken.
        if missing.name and missing.name.split(".")[0] != module.split(".")[0]:
            module = missing.name
    package = _PACKAGES.get(module.split(".")[0], module.split(".")[0])
    raise error(f"{what} needs {package}, which is not installed: run pip install 'quickbloom[{extra}]'{instead}") from None
