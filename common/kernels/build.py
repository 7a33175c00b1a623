"""The kernels as a library of this machine: compiled once, kept in the user's cache, loaded by ctypes.

Where there is no C++ compiler, or it fails, `library` is None and nothing is said: everything has a way
in torch. QUICKBLOOM_KERNELS=0 in the environment asks for that.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from common.kernels.source import SOURCE

SWITCH = "QUICKBLOOM_KERNELS"
SECONDS = 120
"""How long a compiler may take; a small device needs a dozen."""
FLAGS = ("-O3", "-std=c++14", "-shared", "-fPIC", "-ffp-contract=fast", "-w")
KINDS = {
    torch.float32: ("-DREAL=float", "-DBITS=int32_t"),
    torch.float64: ("-DREAL=double", "-DBITS=int64_t", "-DDOUBLE"),
}


@cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels for numbers of `dtype`; None where there are none."""
    if os.environ.get(SWITCH) == "0" or dtype not in KINDS:
        return None
    compiler = next(
        (found for name in (os.environ.get("CXX") or "", "c++", "g++", "clang++") if (found := shutil.which(name))), None
    )
    if compiler is None:
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return ctypes.CDLL(str(_built(compiler, KINDS[dtype])))
    return None


def _built(compiler: str, kind: tuple[str, ...]) -> Path:
    """The file of the library, made if it is not there yet. Raises OSError or SubprocessError."""
    native = "-mcpu=native" if platform.machine().startswith(("aarch64", "arm")) else "-march=native"
    command = [compiler, *FLAGS, native, *kind]
    made = Path(compiler).resolve().stat()  # instead of its version, for which it would have to be run in every process
    # A home directory may be shared by machines whose processors know different instructions.
    parts = [*command, str(made.st_mtime_ns), str(made.st_size), _processor(), SOURCE]
    file = _folder() / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:20]}.so"
    if not file.exists():
        with (file.parent / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the other processes of a simulation wait, and find it
            if not file.exists():
                _compile(command, file)
    return file


def _compile(command: list[str], file: Path) -> None:
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        source, made = Path(folder) / "kernels.cpp", Path(folder) / file.name
        source.write_text(SOURCE)
        subprocess.run([*command, str(source), "-o", str(made), "-lm"], capture_output=True, check=True, timeout=SECONDS)
        made.replace(file)


def _processor() -> str:
    """What tells processors apart that a compiler makes different code for."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))
    return platform.processor() + platform.node()


def _folder() -> Path:
    """The user's cache, or where that cannot be written a folder for temporary files.

    Raises OSError where others could put something there: what lies there is run.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quickbloom" / "kernels"
    for folder in (home, Path(tempfile.gettempdir()) / f"quickbloom-kernels-{os.getuid()}"):
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = folder.stat()
            if status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(folder, os.W_OK):
                return folder
    raise OSError("no folder for what is compiled")
