"""Flower's SuperNode and SuperExec with warm workers, short polls and quick reconnects.

Flower starts a new Python process for every message, which costs seconds of CPU for the imports,
and polls every 1 to 3 seconds. Here each process is forked from one that has imported torch and
Flower (the standard library's fork server), so that every message still has its own process. All
other code is Flower's own, called as its commands call it.

A node whose server was away reconnects within seconds: gRPC would wait up to two minutes between
two attempts, and Flower's retries 20 s more. A silent connection is given up. TCP does so only
after a quarter of an hour, while the node would wait for an answer that cannot come.

On a lean node (`common.flower.lean`) workers are forked from one that has not imported torch.

All these are patches of `common.flower.registry`, each with its own guard. Where one is off,
Flower's own code runs, with a warning. Without a fork server (Windows), every message starts a new
process.
"""

import importlib
import importlib.metadata
import math
import multiprocessing
import multiprocessing.util
import os
import select
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from quickbloom.common.errors import ConfigError
from quickbloom.common.flower import callers, killed, lean, message_assembly, registry
from quickbloom.common.system import temporary

PRELOAD = (
    *("torch", "safetensors.torch", "pydantic", "flwr.supernode.cli", "flwr.superlink.cli", "httpcore"),
    "scipy.ndimage",
)
"""Modules that a worker has imported before its message arrives, if they are installed. httpx imports httpcore late."""
_PRELOADED = "quickbloom.common.flower.preloaded_app"
"""The module that a node's fork server imports last: the installed app, for runs that bring the same code."""

SHORTEST, LONGEST = 0.05, 3.0
"""Bounds in seconds of the pause between two looks for work, which is a tenth of the time since the last work."""
PATIENCE, LONGEST_PAUSE = 20.0, 10.0
"""Seconds to pause for each second that a look had to wait for a busy server, and the most that this makes a pause.

A server that was away looks like a busy one, once."""
MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**22)}
"""Environment of SuperLink, SuperExec and SuperNode. Without it, glibc gives each thread a heap and keeps freed memory."""
POLL = "QUICKBLOOM_POLL"
"""Environment variable that replaces LONGEST."""
_WAKE = "QUICKBLOOM_WAKE"
"""Environment variable with the number of the pipe through which a SuperNode notifies its SuperExec of work."""
_STOCK_REPLY = 0.5  # pause of a SuperNode that waits for its ClientApp's reply
FIRST_BACKOFF = 0.05  # seconds; a notified receiver asks for arrays before they have arrived

LONGEST_RETRY = 5  # seconds between two attempts to reach the server
_PULLING = "flwr.supercore.inflatable.inflatable_utils"
_RETRIES = ("flwr.supercore.retry.grpc_retry", "flwr.supercore.retry.http_retry")
CONNECTION = (
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 1000 * LONGEST_RETRY),
    # Only while a call waits, and only after so long a silence: servers refuse clients that ask too often.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)
"""Options of a node's connection to its server."""

NODE = (
    *("connection-options", "quick-retries", "pull-soon", "assembly-by-parts", "look-ups", "node-polling", "killed-workers"),
    "warm-superexec",
)
"""Patches of a SuperNode. The last one forks, if the node is lean, and the fork has what stands before."""
SUPEREXEC = ("quick-retries", "superexec-polling", "worker-forks")
"""Patches of a SuperExec."""
WORKER = ("pull-soon", "quick-retries", "assembly-by-parts", "worker-memory", "preloaded-app")
"""Patches of each worker, whose guards its SuperExec checks."""

# Run in the fork, with the patches that its SuperExec allows. It must not import this package: a run's app brings its own.
_WORK = """
import gc, importlib, os, runpy, sys
gc.freeze()  # else looking through what was imported before would copy it
sys.argv = {arguments!r}
os.environ.update({variables!r})
sys.dont_write_bytecode = False  # else the app would be compiled anew for every message
if {quiet!r}:
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1), os.dup2(nowhere, 2)
patches = {patches!r}
if {lean!r}:
    import ctypes
    ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE: a SuperExec is not, and then a process cannot measure its own memory
    for name in [name for name in sys.modules if name.split(".")[0] == "quickbloom"]:
        del sys.modules[name]
    if "preloaded-app" in patches:
        importlib.import_module({preloaded!r})
if "pull-soon" in patches:
    pulling = importlib.import_module({pulling!r})
    for pull in (pulling.pull_objects, pulling.pull_and_inflate_object_from_tree):
        pull.__kwdefaults__["initial_backoff"] = {backoff!r}
if "quick-retries" in patches:
    for retries in {retries!r}:
        importlib.import_module(retries).MAX_RETRY_DELAY = {longest_retry!r}
memory = runpy.run_path({message_assembly!r})
if "assembly-by-parts" in patches:
    memory["spare"]()
if "worker-memory" in patches:
    memory["give_back"]()
if {preloaded!r} in sys.modules:
    sys.modules[{preloaded!r}].worker()
getattr(importlib.import_module({module!r}), {function!r})()
"""


class Pace:
    """Replaces the module `time` in Flower's loops: sleeps for a tenth of the time since the last work.

    `spares`: of a server that has much to do it asks less: a look that took longer than the quickest one makes the pause
    PATIENCE times as long as it had to wait. So however many nodes there are, most of them pause.

    `told`: a pipe that notifies this process of work. With it, the process rarely looks by itself,
    and every byte ends a sleep.
    """

    def __init__(self, longest: float, told: int | None = None, *, spares: bool = False) -> None:
        self._longest = max(longest, SHORTEST)
        self._spares = spares
        self._told = told
        self._worked = time.monotonic()
        self._woke: float | None = None
        """When the last sleep ended, unless it was for work: then a look followed that was no look alone."""
        self._quickest = math.inf

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def work(self) -> None:
        """Note that there is work, so that the next look is soon."""
        self._worked = time.monotonic()
        self._woke = None

    def pause(self, took: float | None = None) -> float:
        """Return the seconds until the next look, after one that took so many seconds; None: that is not known."""
        passed = time.monotonic() - self._worked
        usual = min(max(passed / 10, SHORTEST), self._longest)
        if took is None or not self._spares:
            return usual
        self._quickest = min(self._quickest, took)
        return max(usual, min(PATIENCE * (took - self._quickest), LONGEST_PAUSE))

    def sleep(self, seconds: float) -> None:
        if seconds == _STOCK_REPLY:
            self.work()
        if self._told is None:
            now, works = time.monotonic(), seconds == _STOCK_REPLY
            time.sleep(self.pause(None if self._woke is None else now - self._woke))
            self._woke = None if works else time.monotonic()
        elif select.select([self._told], [], [], self._longest)[0] and not os.read(self._told, 2**16):
            self._told = None  # the other end is closed


class Connecting:
    """Replaces the module `grpc` where Flower opens its connections: adds CONNECTION to their options."""

    def __init__(self, grpc: Any) -> None:
        self._grpc = grpc

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grpc, name)

    def insecure_channel(self, target: str, options: Sequence[tuple[str, Any]] = ()) -> Any:
        return self._grpc.insecure_channel(target, options=[*options, *CONNECTION])

    def secure_channel(self, target: str, credentials: Any, options: Sequence[tuple[str, Any]] = ()) -> Any:
        return self._grpc.secure_channel(target, credentials, options=[*options, *CONNECTION])


def sparing() -> dict[str, str]:
    """Return MEMORY without the user's own variables; {} if workers cannot be told from the processes that start them."""
    if registry.why_not("warm-superexec"):
        return {}
    return {name: value for name, value in MEMORY.items() if name not in os.environ}


def command(program: str, *arguments: str) -> list[str]:
    """Return the command line that starts `program` (flower-supernode or flower-superexec) with warm workers."""
    # -P: nothing is imported from the working directory. -c: a fork would import a main module again.
    return [sys.executable, "-P", "-c", "from quickbloom.common.flower.workers import main; main()", program, *arguments]


def main() -> None:
    """Run the program that the first argument names, with the arguments that follow."""
    program, *arguments = sys.argv[1:]
    sys.argv = [program, *arguments]
    if program == "flower-supernode":  # the other kind has no effect
        callers.guard()
    # Flower's own processes look for each other on the PATH.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    try:
        longest_pause()
    except ConfigError as error:
        sys.exit(f"error: {error}")
    if program == "flower-supernode" and lean.is_lean():
        registry.apply("no-databases")
    registry.apply(*{"flower-supernode": NODE, "flower-superexec": SUPEREXEC}[program])
    try:
        _entry_point(program).load()()
    finally:
        if program == "flower-supernode":
            _leave()


def _leave() -> None:
    """End this process at once, if it ends in order: gRPC may hold a lock for ever while Python takes itself down."""
    error = sys.exc_info()[1]
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.code)


def longest_pause() -> float:
    """Return the seconds in the environment variable POLL."""
    given = os.environ.get(POLL, str(LONGEST))
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0.01 <= seconds <= 60:
        raise ConfigError(f"{POLL} must be a number of seconds between 0.01 and 60, got '{given}'")
    return seconds


def ask_soon() -> None:
    """Let this process ask again soon for a part of a message that its sender still pushes; Flower waits 1 s."""
    pulling: Any = importlib.import_module(_PULLING)
    for pull in (pulling.pull_objects, pulling.pull_and_inflate_object_from_tree):
        pull.__kwdefaults__["initial_backoff"] = FIRST_BACKOFF


def connect_quickly() -> None:
    """Let this process open its gRPC channels with CONNECTION."""
    connections: Any = importlib.import_module("flwr.supercore.grpc")
    connections.grpc = Connecting(connections.grpc)


def retry_soon() -> None:
    """Let this process retry at least every LONGEST_RETRY s to reach a server that is away.

    The SuperLink takes a run for dead that it has not heard of for a minute, and Flower's pauses
    grow to 20 s.
    """
    for name in _RETRIES:
        retries: Any = importlib.import_module(name)
        retries.MAX_RETRY_DELAY = LONGEST_RETRY


def poll_node_by_pace() -> None:
    """Let this process's SuperNode poll by Pace."""
    _node().time = Pace(longest_pause(), spares=True)


def start_warm_superexec() -> None:
    """Let this process's SuperNode start our SuperExec, and notify it of every message."""
    node = _node()
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    push = node._push_messages

    def tell_and_push(*arguments: Any, **named: Any) -> None:
        with suppress(OSError):  # a SuperExec that has ended or hangs
            os.write(tell, b".")
        push(*arguments, **named)

    node._push_messages = tell_and_push

    def start(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        # Workers compute: they keep freed memory for the next step. The user's own settings stay.
        computing = {name: value for name, value in os.environ.items() if MEMORY.get(name) != value}
        return subprocess.Popen(command(*arguments), env={**computing, _WAKE: str(told)}, pass_fds=[told])

    forked = lean.forked_superexec(lambda arguments: _be_superexec(arguments, told)) if lean.is_lean() else None
    node.subprocess = types.SimpleNamespace(Popen=forked or start)


def _be_superexec(arguments: Sequence[str], told: int) -> None:
    """Run a SuperExec in this fork of a lean SuperNode."""
    for name, value in MEMORY.items():
        if os.environ.get(name) == value:
            del os.environ[name]
    os.environ[_WAKE] = str(told)
    sys.argv = list(arguments)
    registry.apply(*SUPEREXEC)
    _entry_point(arguments[0]).load()()


def _node() -> Any:
    return importlib.import_module("flwr.supernode.start_client_internal")


def poll_superexec_by_pace() -> None:
    """Let this process's SuperExec poll by Pace, or when its SuperNode notifies it."""
    told = os.environ.get(_WAKE)
    _loop().time = Pace(min(longest_pause(), 1.0), told=int(told) if told else None)


def fork_workers() -> None:
    """Let this process's SuperExec fork its tasks from a server that has imported PRELOAD."""
    executor: Any = importlib.import_module("flwr.supercore.superexec.executor.subprocess_executor")
    loop, patches = _loop(), registry.allowed(*WORKER)
    _shorten_sockets()
    context: Any = multiprocessing.get_context("fork" if lean.is_lean() else "forkserver")
    of_node = os.environ.pop(_WAKE, None) is not None
    if not lean.is_lean():
        preload_app = of_node and "preloaded-app" in patches
        context.set_forkserver_preload([*PRELOAD, _PRELOADED] if preload_app else list(PRELOAD))
        forkserver.ensure_running()
    started = killed.Workers()

    def start(arguments: Sequence[str], stdout: int | None = None, stderr: int | None = None) -> None:
        if isinstance(loop.time, Pace):
            loop.time.work()
        entry = _entry_point(arguments[0])
        work = _WORK.format(
            arguments=list(arguments),
            variables=started.variables(),
            lean=lean.is_lean(),
            quiet=stdout == subprocess.DEVNULL,
            patches=patches,
            pulling=_PULLING,
            backoff=FIRST_BACKOFF,
            retries=_RETRIES,
            longest_retry=LONGEST_RETRY,
            message_assembly=message_assembly.__file__,
            preloaded=_PRELOADED,
            module=entry.module,
            function=entry.attr,
        )
        started.start(context.Process(target=exec, args=(work, {"__name__": "__main__"})), arguments)

    executor.SubprocessExecutor.close = lambda self: started.end()
    executor.subprocess = types.SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL)


def _loop() -> Any:
    return importlib.import_module("flwr.supercore.superexec.run_superexec")


def _shorten_sockets() -> None:
    """Put the fork server's sockets where their paths are short enough, for any TMPDIR."""
    before, longest = tempfile.tempdir, temporary.LONGEST_SOCKET - len("/pymp-12345678/listener-12345678")
    tempfile.tempdir = temporary.short(longest)
    try:
        multiprocessing.util.get_temp_dir()  # made at the first call, and kept
    finally:
        tempfile.tempdir = before


def _entry_point(program: str) -> importlib.metadata.EntryPoint:
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name=program)
    return entry
