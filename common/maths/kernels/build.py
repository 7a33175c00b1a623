"""Loads the kernels with ctypes: those of `quickbloom-kernels`, else compiled for this machine, once, and cached for the user.

`library` returns None without an error if `quickbloom-kernels` does not fit and there is no C++
compiler, if the source is missing or if compiling fails, since torch can compute everything as
well. The commands report that there are none, and a node a missing source. QUICKBLOOM_KERNELS=0 in
the environment turns the kernels off.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import signal
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from quickbloom.common.errors import in_one_line
from quickbloom.common.maths.kernels import prebuilt, source
from quickbloom.common.maths.kernels.compiler import SWITCH, find_compiler, remark
from quickbloom.common.system import private
from quickbloom.common.system.locks import locked

SECONDS, DAY = 120, 86_400
"""Time limit of the compiler in seconds (a small device needs a dozen), and how long a failed build is not retried."""

_LOG = logging.getLogger(__name__)


class Kernels(NamedTuple):
    """The kernels for one number type: their library, if there is one, where it comes from, and details or the reason."""

    library: ctypes.CDLL | None
    state: Literal["prebuilt", "compiled", "none", "off"]
    detail: str


@cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """Return the kernels for numbers of `dtype`; None if there are none."""
    return load(dtype).library


def load(dtype: torch.dtype) -> Kernels:
    """Return the kernels for numbers of `dtype` and how they were found; raises nothing."""
    kind = str(dtype).removeprefix("torch.")
    if os.environ.get(SWITCH) == "0":
        return Kernels(None, "off", f"{SWITCH}=0")
    if kind not in source.KINDS:
        return Kernels(None, "none", f"there are kernels for {' and '.join(source.KINDS)}, not for {kind}")
    try:
        level, found = prebuilt.load(kind)
        return Kernels(found, "prebuilt", level)
    except prebuilt.UnusableError as error:
        reason = str(error)
    compiler, text = find_compiler(), source.read()
    if compiler is None or text is None:
        return Kernels(None, "none", remark())
    try:
        return Kernels(ctypes.CDLL(str(_built(compiler, source.KINDS[kind], text))), "compiled", f"by {compiler}: {reason}")
    except Exception as error:  # torch computes everything as well
        _LOG.debug("no compiled kernels: %s", error)
        return Kernels(None, "none", f"{compiler} did not compile them ({in_one_line(error)}), and {reason}")


def _built(compiler: str, kind: str, text: str) -> Path:
    """Return the path of the library for the C++ in `text`, compiled if it does not exist yet. Raises BuildError or OSError."""
    native = "-mcpu=native" if platform.machine().startswith(("aarch64", "arm")) else "-march=native"
    command = [compiler, *source.FLAGS, native, *kind.split()]
    made = Path(compiler).resolve().stat()  # stands for the version, which every process would have to ask the compiler for
    # Machines with different processors may share a home directory.
    parts = [*command, str(made.st_mtime_ns), str(made.st_size), _processor(), text]
    file = private.folder("kernels") / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:20]}.so"
    if not file.exists():
        # The other processes of a simulation wait for this one's result.
        with locked(file.parent / "lock", create=True, wait=True):
            if not file.exists():
                _compile(command, text, file)
    return file


class BuildError(Exception):
    """The compiler did not produce a library."""


def _compile(command: list[str], text: str, file: Path) -> None:
    """Compile `text` to `file`. A failure is not retried for a day: on a device every message has its own process."""
    failed = file.with_suffix(".failed")
    with contextlib.suppress(FileNotFoundError):
        if time.time() - failed.stat().st_mtime < DAY:
            raise BuildError(failed.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        written, made = Path(folder) / "kernels.cpp", Path(folder) / file.name
        written.write_text(text, encoding="utf-8")
        try:
            _run([*command, str(written), "-o", str(made), "-lm"])
            ctypes.CDLL(str(made))
        except (BuildError, OSError) as error:
            failed.write_text(str(error), encoding="utf-8")
            raise
        made.replace(file)


def _run(command: list[str]) -> None:
    """Run the compiler, and kill its process group after SECONDS. Raises BuildError or OSError."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, start_new_session=True)
    try:
        _, said = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise BuildError(f"the compiler took more than {SECONDS} s") from None
    if process.returncode:
        raise BuildError(said.decode(errors="replace")[-2000:])


def _processor() -> str:
    """Return text that identifies the processor's instruction set."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))
    return platform.processor() + platform.node()
