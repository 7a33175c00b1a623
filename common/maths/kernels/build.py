"""The kernels as a library of this machine: compiled once, kept in the user's cache, loaded by ctypes.

Where there is no C++ compiler, or it fails, `library` is None and nothing is said here: everything has a way in torch. The
commands tell of a compiler that is missing. QUICKBLOOM_KERNELS=0 in the environment asks to do without.
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

import torch

from quickbloom.common.maths.kernels.compiler import SWITCH, find_compiler
from quickbloom.common.maths.kernels.source import SOURCE
from quickbloom.common.system import private
from quickbloom.common.system.locks import locked

SECONDS, DAY = 120, 86_400
"""How long a compiler may take, a small device needs a dozen; and how long one that failed is not tried again."""
FLAGS = ("-O3", "-std=c++14", "-shared", "-fPIC", "-ffp-contract=fast", "-w")
KINDS = {
    torch.float32: ("-DREAL=float", "-DBITS=int32_t"),
    torch.float64: ("-DREAL=double", "-DBITS=int64_t", "-DDOUBLE"),
}


_LOG = logging.getLogger(__name__)


@cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels for numbers of `dtype`; None where there are none."""
    if os.environ.get(SWITCH) == "0" or dtype not in KINDS or (compiler := find_compiler()) is None:
        return None
    try:
        return ctypes.CDLL(str(_built(compiler, KINDS[dtype])))
    except Exception as error:  # whatever it is, there is another way
        _LOG.debug("no compiled kernels: %s", error)
        return None


def _built(compiler: str, kind: tuple[str, ...]) -> Path:
    """The file of the library, made if it is not there yet. Raises BuildError or OSError."""
    native = "-mcpu=native" if platform.machine().startswith(("aarch64", "arm")) else "-march=native"
    command = [compiler, *FLAGS, native, *kind]
    made = Path(compiler).resolve().stat()  # instead of its version, for which it would have to be run in every process
    # A home directory may be shared by machines whose processors know different instructions.
    parts = [*command, str(made.st_mtime_ns), str(made.st_size), _processor(), SOURCE]
    file = private.folder("kernels") / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:20]}.so"
    if not file.exists():
        with locked(file.parent / "lock", create=True, wait=True):  # the other processes of a simulation wait, and find it
            if not file.exists():
                _compile(command, file)
    return file


class BuildError(Exception):
    """The compiler did not make a library."""


def _compile(command: list[str], file: Path) -> None:
    """Make `file`. What failed is not tried again for a day: on a device every message has a process of its own."""
    failed = file.with_suffix(".failed")
    with contextlib.suppress(FileNotFoundError):
        if time.time() - failed.stat().st_mtime < DAY:
            raise BuildError(failed.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        source, made = Path(folder) / "kernels.cpp", Path(folder) / file.name
        source.write_text(SOURCE, encoding="utf-8")
        try:
            _run([*command, str(source), "-o", str(made), "-lm"])
            ctypes.CDLL(str(made))
        except (BuildError, OSError) as error:
            failed.write_text(str(error), encoding="utf-8")
            raise
        made.replace(file)


def _run(command: list[str]) -> None:
    """Run the compiler, and end all that it started if it takes too long. Raises BuildError or OSError."""
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
    """What tells processors apart that a compiler makes different code for."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))
    return platform.processor() + platform.node()
