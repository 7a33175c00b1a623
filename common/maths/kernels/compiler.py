"""The C++ compiler of this machine, and the line for one that has none."""

import os
import shutil

SWITCH = "QUICKBLOOM_KERNELS"


def find_compiler() -> str | None:
    """The C++ compiler that CXX names, or the usual ones; None if there is none."""
    names = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    return next(filter(None, (shutil.which(name) for name in names if name)), None)


def remark() -> str:
    """What to tell whoever computes without kernels for want of a compiler; "" where there is one, or none is wanted."""
    if os.environ.get(SWITCH) == "0" or find_compiler():
        return ""
    return (
        "there is no C++ compiler here (c++, g++, clang++, or what CXX names), so training takes the slower way through torch, "
        f"with the same result; {SWITCH}=0 says that this is meant"
    )
