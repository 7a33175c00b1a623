"""The setting `compile`: when torch.compile compiles a node's rounds.

Compiling for one shape of work takes a minute of CPU, and then saves a third to a half of every
call (docs/performance.md). `Auto` first computes without compiling and measures the cost. It
compiles once the rest of the run would save more than compiling costs, in a separate process at low
priority, while rounds continue. The result arrives through torch's cache on disk. Nothing changes
if there is an obstacle: no compiler, a model that torch.compile does not support, or no gain. A
process that lives for a single message never compiles.
"""

import atexit
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quickbloom.common.algorithms.base import Algorithm
from quickbloom.common.engine.mapping import over_tasks
from quickbloom.common.errors import ConfigError, in_one_line
from quickbloom.common.maths.batch import Episode, Minibatches
from quickbloom.common.maths.fast_paths import has_kernels, is_written_out
from quickbloom.common.maths.params import Params
from quickbloom.common.system import private
from quickbloom.common.system.locks import locked

Contribute = Callable[[Params, Params, Episode, Minibatches], tuple[Params, Tensor, Params]]

COST = 120.0
"""Upper bound on the CPU seconds to compile one shape; five steps of exact MAML on a perceptron took 65."""
SAVED = 0.3
"""Lower bound on the fraction of a call's time that compiling saves; 0.27 to 0.48 were measured."""
SEEN, SHAPES, TRIED = 3, 4, 3
"""Calls before a shape is considered, most shapes to compile, and compiled calls before they are judged."""


_CACHE = "TORCHINDUCTOR_CACHE_DIR"


def mapped(algorithm: Algorithm) -> Contribute:
    """Return `algorithm.contribute` mapped over tasks: every argument but the meta-parameters has a leading task axis."""
    return over_tasks(algorithm.learner, algorithm.contribute, (None, 0, 0, 0))


@lru_cache(maxsize=8)  # torch keeps compiled code per function object, so a new function in every round would recompile
def _compiled(algorithm: Algorithm) -> Contribute:
    use_private_cache()
    # Not dynamic: code for any number of tasks is slower, and rounds usually have one shape.
    # No CUDA graphs (mode="reduce-overhead") either: the next call would overwrite the results of the last.
    return torch.compile(mapped(algorithm), dynamic=False)


def use_private_cache() -> None:
    """Make torch cache compiled code in a folder that only this user can write, since that code is executed.

    Torch's default is a folder in /tmp, which anybody could have created first. A folder set by the
    user is kept. Raises OSError.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # Torch sets the variable to its default on first use.
    if os.environ.get(_CACHE, "") in ("", default_cache_dir()):
        os.environ[_CACHE] = str(private.folder("compiled"))


def compiled(algorithm: Algorithm) -> Contribute:
    """Return `mapped(algorithm)` compiled by torch.compile from the first call on; uncompiled if the kernels do the work,
    and for a model that is computed task by task.

    A call raises ConfigError if compiling fails.
    """
    if not algorithm.learner.maps or (algorithm.first_order and has_kernels(algorithm.learner)):
        return mapped(algorithm)

    def checked(*args: Any) -> tuple[Params, Tensor, Params]:
        from torch._dynamo.exc import TorchDynamoException  # here, because it is slow to import

        try:
            return _compiled(algorithm)(*args)
        except (TorchDynamoException, OSError) as error:
            raise ConfigError(
                "`compile = true` needs a C++ compiler, a private folder and a model that torch.compile takes, but it raised "
                f"{in_one_line(error)}: set `compile = false`"
            ) from error

    return checked


class Auto:
    """The setting `compile = "auto"` for one node in one process, with the measured cost of its calls."""

    def __init__(self, rounds: int) -> None:
        """Start without measurements. `rounds`: training rounds of the run."""
        self._rounds = rounds
        self._first = self._now = 0
        self._shapes: dict[Any, _Shape] = {}

    def round(self, number: int) -> "Auto":
        """Note that round `number` of the run (from 1) is next, and return self. A lower number starts a new run."""
        if number < self._now:
            self._first = number
            for shape in self._shapes.values():
                shape.forget()
        self._first, self._now = self._first or number, number
        return self

    def mapped(self, algorithm: Algorithm) -> Contribute:
        """Return `mapped(algorithm)`, which switches to compiled code once that is ready."""
        if not algorithm.learner.maps or (algorithm.first_order and is_written_out(algorithm.learner)):
            return mapped(algorithm)  # written out, and faster than the compiled general path

        def call(*args: Any) -> tuple[Params, Tensor, Params]:
            shapes = str([tuple(value.shape) for value in torch.utils._pytree.tree_leaves(args)])
            shape = self._shapes.setdefault(shapes, _Shape())
            if not shape.started and shape.calls >= SEEN and self._pays(shape):
                shape.start(algorithm, args)
            return shape(algorithm, args)

        return call

    def _pays(self, shape: "_Shape") -> bool:
        started = sum(other.started for other in self._shapes.values())
        left = shape.seconds / (self._now - self._first + 1) * (self._rounds - self._now)
        return started < SHAPES and SAVED * left > COST


class _Shape:
    """Work of one shape, computed without compiling until compiled code is ready, and again if that is slower."""

    def __init__(self) -> None:
        self.calls, self.seconds = 0, 0.0
        self.started = False
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._tried: list[float] = []

    def forget(self) -> None:
        """Drop the measurements of an earlier run, unless compiled calls are judged by them."""
        if not self.started:
            self.calls, self.seconds = 0, 0.0

    def start(self, algorithm: Algorithm, args: tuple[Any, ...]) -> None:
        """Compile in another process, if there is a compiler and the work can be pickled."""
        self.started = True
        with contextlib.suppress(Exception):  # a user's model may not support pickling
            self._process = compile_elsewhere(algorithm, args)

    def __call__(self, algorithm: Algorithm, args: tuple[Any, ...]) -> tuple[Params, Tensor, Params]:
        if self._process is not None and self._process.poll() is not None:
            self._ready = self._process.returncode == 0
            self._process = None
            if self._ready:
                return self._load(algorithm, args)
        before = time.process_time()
        result = (_compiled if self._ready else mapped)(algorithm)(*args)
        self._note(time.process_time() - before)
        return result

    def _load(self, algorithm: Algorithm, args: tuple[Any, ...]) -> tuple[Params, Tensor, Params]:
        """Make the first compiled call, which takes some seconds to load the code from disk."""
        try:
            return _compiled(algorithm)(*args)
        except Exception:  # the uncompiled path always works
            self._ready = False
            return mapped(algorithm)(*args)

    def _note(self, seconds: float) -> None:
        if not self._ready:
            self.calls, self.seconds = self.calls + 1, self.seconds + seconds
        elif len(self._tried) < TRIED:
            self._tried.append(seconds)
            self._ready = len(self._tried) < TRIED or min(self._tried) < self.seconds / self.calls


def compile_elsewhere(algorithm: Algorithm, args: tuple[Any, ...], nice: int = 10) -> "subprocess.Popen[bytes]":
    """Start a process that computes `_compiled(algorithm)(*args)` once; its exit status is 0 on success.

    `nice`: how much lower its priority is than that of this process.
    """
    handle, name = tempfile.mkstemp(prefix="quickbloom-", suffix=".work")
    os.close(handle)
    try:
        torch.save((algorithm, args), name)
        command = [
            sys.executable,
            "-P",
            "-m",
            "quickbloom.common.engine.compiling",
            name,
            str(torch.get_num_threads()),
            str(nice),
        ]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)}
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(command, env=environment, stdin=quiet, stdout=quiet, stderr=quiet)
    except BaseException:
        Path(name).unlink()
        raise
    atexit.register(_end, process, Path(name))
    return process


def _end(process: "subprocess.Popen[bytes]", file: Path) -> None:
    """Kill the process and remove its input file when the run ends first."""
    process.kill()
    process.wait()
    file.unlink(missing_ok=True)


def _fill_the_cache(file: Path, threads: int, nice: int) -> None:
    """Compile the work in `file`: the entry point of the other process."""
    os.nice(nice)
    torch.set_num_threads(threads)
    algorithm, args = torch.load(file, weights_only=False)
    file.unlink()
    use_private_cache()
    folder = Path(os.environ[_CACHE])
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # One at a time: the others find what the first has compiled.
    with locked(folder / "quickbloom.lock", create=True, wait=True):
        _compiled(algorithm)(*args)


if __name__ == "__main__":
    _fill_the_cache(Path(sys.argv[1]), *map(int, sys.argv[2:]))
