"""The setting `compile`: when a node's rounds are compiled by torch.compile, and when they are not.

Compiling one shape of work takes a minute of CPU, and then saves a third to a half of every call (docs/performance.md). `Auto`
therefore computes as ever, measures what that costs, and starts to compile once what is left of the run would save more than
compiling costs; that happens in a process of its own at low priority, whose result comes through torch's cache on disk. Rounds
go on meanwhile. Where anything is in the way (no compiler, a model that torch.compile does not take, no gain) it stays as it
was. A process that lives for one message only never gets there.
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
from torch.func import vmap

from quickbloom.common.algorithms.base import Algorithm
from quickbloom.common.errors import ConfigError, in_one_line
from quickbloom.common.maths.batch import Episode, Minibatches
from quickbloom.common.maths.fast_paths import has_kernels, is_written_out
from quickbloom.common.maths.params import Params
from quickbloom.common.system import private
from quickbloom.common.system.locks import locked

Contribute = Callable[[Params, Params, Episode, Minibatches], tuple[Params, Tensor, Params]]

COST = 120.0
"""Seconds of CPU, at the most, that a shape of work needs: 65 were measured for five steps of exact MAML on a perceptron."""
SAVED = 0.3
"""Part of the time of a call that compiling saves, at the least: 0.27 to 0.48 were measured."""
SEEN, SHAPES, TRIED = 3, 4, 3
"""Calls before a shape is thought of, shapes that are compiled at most, and compiled calls before they are judged."""


_CACHE = "TORCHINDUCTOR_CACHE_DIR"


def mapped(algorithm: Algorithm) -> Contribute:
    """`algorithm.contribute` of many tasks at once: what is of one task has a leading task axis, the meta-parameters do not."""
    return vmap(algorithm.contribute, in_dims=(None, 0, 0, 0), randomness="error")


@lru_cache(maxsize=8)  # what is compiled is kept by the function that it came from: a new one in every round would start anew
def _compiled(algorithm: Algorithm) -> Contribute:
    use_private_cache()
    # Not dynamic: code for any number of tasks is slower, and rounds usually have one shape.
    # On CUDA no graphs (mode="reduce-overhead") either: what one call returns would be overwritten by the next.
    return torch.compile(mapped(algorithm), dynamic=False)


def use_private_cache() -> None:
    """Let torch keep what it compiles in a folder that is this user's alone: what lies there is run.

    Torch's own is one in /tmp that anybody may have made first. One that the user has set stays. Raises OSError.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # Torch writes its own into the environment once it has used it.
    if os.environ.get(_CACHE, "") in ("", default_cache_dir()):
        os.environ[_CACHE] = str(private.folder("compiled"))


def compiled(algorithm: Algorithm) -> Contribute:
    """The same by torch.compile, from the first call on; where kernels do the work there is nothing to compile.

    Raises ConfigError where that does not work.
    """
    if algorithm.first_order and has_kernels(algorithm.learner):
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
    """`compile = "auto"` for one node in one process: it remembers what its calls have cost."""

    def __init__(self, rounds: int) -> None:
        """`rounds`: training rounds of the run."""
        self._rounds = rounds
        self._first = self._now = 0
        self._shapes: dict[Any, _Shape] = {}

    def round(self, number: int) -> "Auto":
        """The same, told that round `number` of the run (from 1) is next; a lower one than before is of another run."""
        if number < self._now:
            self._first = number
            for shape in self._shapes.values():
                shape.forget()
        self._first, self._now = self._first or number, number
        return self

    def mapped(self, algorithm: Algorithm) -> Contribute:
        """`mapped(algorithm)`, or from some call on what was compiled of it."""
        if algorithm.first_order and is_written_out(algorithm.learner):
            return mapped(algorithm)  # written out, and faster than what a compiler makes of the general way

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
    """Work of one shape: computed as ever until its code is there and as long as that is faster."""

    def __init__(self) -> None:
        self.calls, self.seconds = 0, 0.0
        self.started = False
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._tried: list[float] = []

    def forget(self) -> None:
        """What calls have cost was in another run, unless it is what compiled ones are judged by."""
        if not self.started:
            self.calls, self.seconds = 0, 0.0

    def start(self, algorithm: Algorithm, args: tuple[Any, ...]) -> None:
        """Compile in another process, if there is a compiler and the work can be sent there."""
        self.started = True
        with contextlib.suppress(Exception):  # the user's model may not be one that can be pickled
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
        """The first compiled call, which takes some seconds: what was compiled comes from the disk."""
        try:
            return _compiled(algorithm)(*args)
        except Exception:  # whatever it is, there is another way
            self._ready = False
            return mapped(algorithm)(*args)

    def _note(self, seconds: float) -> None:
        if not self._ready:
            self.calls, self.seconds = self.calls + 1, self.seconds + seconds
        elif len(self._tried) < TRIED:
            self._tried.append(seconds)
            self._ready = len(self._tried) < TRIED or min(self._tried) < self.seconds / self.calls


def compile_elsewhere(algorithm: Algorithm, args: tuple[Any, ...], nice: int = 10) -> "subprocess.Popen[bytes]":
    """Start a process that computes `_compiled(algorithm)(*args)` once; its exit status is 0 if that worked.

    `nice`: by how much its priority is below that of this process.
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
    """Leave nothing behind when the run is over first."""
    process.kill()
    process.wait()
    file.unlink(missing_ok=True)


def _fill_the_cache(file: Path, threads: int, nice: int) -> None:
    """What the other process does."""
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
