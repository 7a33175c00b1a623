"""Search for this machine's C++ compiler, and the message for a machine without kernels."""

import os
import shutil

from quickbloom.common.maths.kernels import prebuilt, source

SWITCH = "QUICKBLOOM_KERNELS"


def find_compiler() -> str | None:
    """Return the path of the C++ compiler in CXX, else of c++, g++ or clang++; None if there is none."""
    names = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    return next(filter(None, (shutil.which(name) for name in names if name)), None)


def remark() -> str:
    """Return what the kernels lack on this machine and how to mend it; "" if nothing or if they are turned off."""
    if os.environ.get(SWITCH) == "0":
        return ""
    try:
        prebuilt.load("float32")
    except prebuilt.UnusableError as reason:
        if find_compiler():
            return source.remark()
        return (
            f"there is no C++ compiler here (c++, g++, clang++, or what CXX names), and {reason}, so training takes the slower "
            f"way through torch, with the same result; {SWITCH}=0 says that this is meant"
        )
    return ""
