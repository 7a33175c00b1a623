"""torch.func without the import of torch._dynamo, which takes more than a second and a hundred megabytes.

`torch.func.grad` switches compiled autograd off while it differentiates, and imports all of torch's compiler for that, also in
a process that never compiles. As long as the compiler is not imported there is nothing to switch off. So until then something
stands in its place that knows this one switch, and imports the compiler for everything else that is asked of it.
"""

import sys
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import torch

_NAME = "torch._dynamo"


class _Lazy:
    """Stands for a module of torch's compiler: imports it for every name that it does not have itself."""

    def __init__(self, module: str, **known: Any) -> None:
        self.__dict__.update(known, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self.__dict__["_module"]), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(import_module(self.__dict__["_module"]), name, value)


def spare_the_compiler() -> None:
    """Let `torch.func` work without torch._dynamo in this process, until something else imports it."""
    if _NAME not in sys.modules:
        # Python replaces it by the module itself when that is imported.
        autograd = _Lazy(f"{_NAME}.compiled_autograd", _disable=nullcontext)
        vars(torch)["_dynamo"] = _Lazy(_NAME, compiled_autograd=autograd)
