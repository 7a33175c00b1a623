"""Finds kernels that were compiled elsewhere: the distribution `quickbloom-kernels`, for machines without a C++ compiler.

It has one library for each number type and each level of a processor's instructions
(kernels/build_wheels.py makes it). A library is used only if it was compiled from the same
`kernels.cpp`, is called in the same form, and needs no instruction that this processor lacks.
"""

import ctypes
import importlib.util
import json
import platform
from contextlib import suppress
from pathlib import Path

from quickbloom.common.maths.kernels import source

ABI = 1
"""Form in which libraries are called and lie in the distribution: raise it with every change of it."""
PACKAGE, DISTRIBUTION = "quickbloom_kernels", "quickbloom-kernels"
MADE_FROM = "made_from.json"
_V3 = frozenset({"avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"})
LEVELS = {
    "x86_64": {"x86-64-v4": _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}, "x86-64-v3": _V3},
    "aarch64": {"armv8-a": frozenset({"asimd"})},
}
"""Levels of each machine, the best one first, and what Linux calls the instructions that they need."""


class UnusableError(Exception):
    """No library can be used; the message says why, as a part of a sentence."""


def load(kind: str) -> tuple[str, ctypes.CDLL]:
    """Return the level and the library for the number type `kind`. Raises UnusableError."""
    level = _level()
    folder = installed()
    if folder is None:
        raise UnusableError(f"{DISTRIBUTION} is not installed (pip install 'quickbloom[fast]')")
    if _made_from(folder) != made_from():
        raise UnusableError(f"the {DISTRIBUTION} that is installed belongs to another release of quickbloom")
    try:
        return level, ctypes.CDLL(str(folder / file_name(kind, level)))
    except OSError as error:
        raise UnusableError(f"a library of {DISTRIBUTION} cannot be loaded ({error})") from None


def file_name(kind: str, level: str) -> str:
    """Return the name of a library in the distribution."""
    return f"{kind}-{level}.so"


def made_from() -> dict[str, object]:
    """Return what libraries must be made from to be used by this quickbloom, as JSON values."""
    return {"abi": ABI, "source": source.digest(), "kinds": source.KINDS}


def installed() -> Path | None:
    """Return the folder of the distribution's libraries; None if it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def processor() -> set[str]:
    """Return what Linux says that the processor can do; empty where there is no /proc/cpuinfo."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, flags = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return set(flags.split())
    return set()


def _level() -> str:
    """Return the best level that this processor has. Raises UnusableError."""
    levels = LEVELS.get(platform.machine(), {}) if platform.system() == "Linux" else {}
    flags, lacking = processor(), frozenset[str]()
    for level, needed in levels.items():
        if needed <= flags:
            return level
        lacking = needed - flags
    why = f"without {', '.join(sorted(lacking))}" if lacking else f"{platform.system()}, {platform.machine()}"
    raise UnusableError(f"{DISTRIBUTION} has nothing for this machine ({why})")


def _made_from(folder: Path) -> object:
    with suppress(OSError, ValueError):
        return json.loads((folder / MADE_FROM).read_text(encoding="utf-8"))
    return None
