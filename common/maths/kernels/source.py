"""Finds `kernels.cpp`, the C++ of the kernels, and names the options that it is compiled with.

It lies beside this module in a source tree and in an installed package. A Flower bundle carries no
C++, so a node that imports this module from a bundle reads the file of the quickbloom that is
installed there, if it is the same release's: its SHA-256 must be the one below.
"""

import hashlib
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

SHA256 = "3e950671e692daf20f84f6a3913779ff0542f5719a8f97fd839400c0b38c725c"
"""Of `kernels.cpp`; a test compares, and says what to write here after a change."""
FLAGS = ("-O3", "-std=c++14", "-shared", "-fPIC", "-ffp-contract=fast", "-w")
KINDS = {"float32": "-DREAL=float -DBITS=int32_t", "float64": "-DREAL=double -DBITS=int64_t -DDOUBLE"}
"""What the compiler is told of each number type."""

_NAME = "kernels.cpp"
_FOLDERS = ("quickbloom/common/maths/kernels", "common/maths/kernels")
"""Its folder, relative to an entry of sys.path: in an installed package, and in a source tree (an editable install)."""


@cache
def read() -> str | None:
    """Return the text of `kernels.cpp`; None if this module comes from a bundle and no equal file is installed."""
    with suppress(FileNotFoundError):
        return _beside().read_text(encoding="utf-8")
    return next((found.decode() for found in _installed() if hashlib.sha256(found).hexdigest() == SHA256), None)


def digest() -> str:
    """Return the SHA-256 of the `kernels.cpp` that belongs to this module, also where a bundle came without it."""
    with suppress(FileNotFoundError):
        return hashlib.sha256(_beside().read_bytes()).hexdigest()
    return SHA256


def _beside() -> Path:
    return Path(__file__).with_name(_NAME)


def _installed() -> Iterator[bytes]:
    for entry in sys.path:
        for folder in _FOLDERS:
            with suppress(OSError, ValueError):
                yield Path(entry, folder, _NAME).read_bytes()


def remark() -> str:
    """Return the message for a node without `kernels.cpp`; "" if it is there."""
    if read() is not None:
        return ""
    return (
        f"the compiled kernels are off: a Flower bundle carries no C++, and no quickbloom with the same {_NAME} is installed "
        "here, so training takes the slower way through torch, with the same result; install the release of quickbloom that "
        "starts the run"
    )
