"""The `quickbloom` command: its parts put together, and how each ends.

A command's module is imported when it is called. All of them together import torch and Flower, which takes seconds; the help
of the whole needs neither.
"""

import ast
import gc
import signal
import sys
from collections.abc import Callable, Collection
from importlib import import_module
from pathlib import Path
from typing import Any

import typer

from quickbloom.common.system.command import perform
from quickbloom.common.system.processes import ENDINGS

MODULES = {
    "run": "run",
    "compare": "compare",
    "advise": "advise",
    "superlink": "deployment",
    "superexec": "deployment",
    "report": "inspect",
    "settings": "inspect",
    "watch": "inspect",
    "metrics": "deployment",
    "secrets": "deployment",
    "deploy": "deploy",
    "doctor": "doctor",
}
"""The module in this folder of every command, which is its function of that name."""
GROUPS = ("deploy",)
"""Those with commands of their own: the module's `group`."""


def command_line(wanted: Collection[str]) -> typer.Typer:
    """Return the command line. Only the commands `wanted` are imported; of the others there is the help of the whole."""
    cli = typer.Typer(pretty_exceptions_enable=False, no_args_is_help=True, add_completion=False)
    cli.callback()(_commands)
    for name, module in MODULES.items():
        if name in GROUPS:
            cli.add_typer(_group(module) if name in wanted else _described_group(name, module), name=name)
        else:
            cli.command(name)(_imported(name, module) if name in wanted else _described(name, module))
    return cli


def _commands() -> None:
    """Few-shot personalisation for Flower federations: learn a starting point that every device makes its own.

    Example: quickbloom run --algorithm maml --dataset digits
    """


def _imported(name: str, module: str) -> Callable[..., None]:
    function: Callable[..., None] = getattr(import_module(f"{__package__}.{module}"), name)
    return function


def _group(module: str) -> typer.Typer:
    group: typer.Typer = import_module(f"{__package__}.{module}").group
    return group


def _described_group(name: str, module: str) -> typer.Typer:
    """Return a group without its commands, described by its own function."""
    group = typer.Typer()
    group.callback()(_described(name, module))
    return group


def _described(name: str, module: str) -> Callable[[], None]:
    """Return a function with the docstring of a command, read from its source."""

    def described() -> None:
        raise AssertionError(f"`{name}` is called, so it is wanted")

    source = ast.parse(Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8"))
    (function,) = (node for node in source.body if isinstance(node, ast.FunctionDef) and node.name == name)
    described.__doc__ = ast.get_docstring(function)
    return described


def _command_of_this_process() -> typer.Typer:
    """Return the command line for this process. The garbage collector looks through what is imported neither now nor later."""
    gc.disable()
    try:
        return command_line(sys.argv[1:2])
    finally:
        gc.freeze()
        gc.enable()


def __getattr__(name: str) -> Any:
    """`cli`: the command line with all commands, for whoever looks at more than one."""
    if name != "cli":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = command_line(MODULES)
    return globals()[name]


def main() -> None:
    """Entry point of `quickbloom`."""
    # Ended from outside (a time limit, a closed terminal) is like Ctrl-C: what was started must be ended, too.
    for ending in ENDINGS:
        if ending != signal.SIGINT and signal.getsignal(ending) != signal.SIG_IGN:  # as under nohup
            signal.signal(ending, signal.default_int_handler)
    perform(lambda: _command_of_this_process()())


if __name__ == "__main__":
    main()
