"""A lean node keeps little in memory between two messages: what a device of 512 MB has room for.

Its SuperExec is a fork of its SuperNode, with which it shares all that both import, and each worker is a fork of that, which
imports torch when there is a message and takes it along when it ends. Flower's SuperNode imports the databases of servers, and
never opens one: here it does without.
"""

import gc
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

LEAN = "QUICKBLOOM_LEAN"
"""Environment variable: 1 makes a node lean."""

_DATABASES = {
    "flwr.supercore.object_store.sql_object_store": "SqlObjectStore",
    "flwr.server.superlink.linkstate.sql_linkstate": "SqlLinkState",
}
"""Modules of Flower with tables in a database, which take 30 MB, and the class in each that others import."""
_OF_BOTH = ("flwr.supernode.cli", "flwr.supercore.cli", "flwr.supernode.runtime.run_clientapp", "httpcore")
"""Modules that a SuperNode imports before its SuperExec is forked, and workers from that."""


def is_lean() -> bool:
    """Return whether this process is of a lean node."""
    return os.environ.get(LEAN) == "1"


def leave_databases_out() -> None:
    """Let this process, which is not a server's, import Flower without its databases."""
    for module, name in _DATABASES.items():
        empty = ModuleType(module)
        setattr(empty, name, type(name, (), {}))
        sys.modules[module] = empty


def forked_superexec(run: Callable[[Sequence[str]], None]) -> Callable[[Sequence[str]], None]:
    """Fork a process that waits for a command line and then calls `run` with it; return what sends it that.

    Call it as long as there is one thread.
    """
    for name in _OF_BOTH:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else the first collection would copy all of it
    asked, ask = os.pipe()
    if not os.fork():
        os.close(ask)
        with os.fdopen(asked) as pipe:
            arguments = json.loads(pipe.read() or "[]")
        if arguments:
            run(arguments)
        sys.exit(0)
    os.close(asked)

    def start(arguments: Sequence[str]) -> None:
        with os.fdopen(ask, "w") as pipe:
            json.dump(list(arguments), pipe)

    return start
