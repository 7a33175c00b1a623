"""Runs a function in a process of its own, so that the memory of what it imports goes with it."""

import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from quickbloom.common.errors import OneLineError, QuickbloomError
from quickbloom.common.system.processes import end_with_parent

_HEAVY = "torch"
"""Where this is imported already there is nothing to save."""

Result = TypeVar("Result")


def apart(function: Callable[[], Result]) -> Result:
    """Return what `function` returns, or raise what it raises, without keeping what it imports. Linux alone forks safely.

    Result and exception must be picklable. Raises QuickbloomError if the process is killed.
    """
    if _HEAVY in sys.modules or sys.platform != "linux":
        return function()
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(function, sending))
    child.start()
    sending.close()
    try:
        result, error = receiving.recv()
    except EOFError:
        child.join()
        raise QuickbloomError(
            f"a process of this program was ended from outside (exit code {child.exitcode}; -9 most likely means that memory "
            "ran out): give it more memory, or a smaller file"
        ) from None
    finally:
        child.kill()  # after Ctrl-C
        child.join()
    if error is not None:
        raise error
    returned: Result = result
    return returned


def _send(function: Callable[[], Any], sending: Any) -> None:
    end_with_parent(signal.SIGKILL)  # else it would wait for a server for nobody
    with suppress(KeyboardInterrupt):
        try:
            sending.send((function(), None))
        except Exception as error:
            if not isinstance(error, OneLineError):
                error.add_note(traceback.format_exc())
            sending.send((None, error))
