"""The libraries that the tests of the kernels' numbers are run with: compiled here, and those of `quickbloom-kernels`."""

import platform
from collections.abc import Iterator

import pytest
import torch

from quickbloom.common.maths.kernels import prebuilt
from quickbloom.common.maths.kernels.build import library, load
from quickbloom.common.maths.kernels.compiler import find_compiler
from quickbloom.common.maths.kernels.train import layout_of

LEVELS = prebuilt.LEVELS.get(platform.machine(), {})


@pytest.fixture(scope="module", params=["compiled", *LEVELS])
def each_library(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiled on this machine, or prebuilt for a level that it has."""
    level = request.param
    with pytest.MonkeyPatch.context() as patched:
        if level == "compiled":
            if find_compiler() is None:
                pytest.skip("no C++ compiler here")
            patched.setattr(prebuilt, "installed", lambda: None)
        else:
            if not LEVELS[level] <= prebuilt.processor():
                pytest.skip(f"this processor has not all of {level}")
            folder = request.getfixturevalue("prebuilt_kernels")
            patched.setattr(prebuilt, "installed", lambda: folder)
            patched.setattr(prebuilt, "processor", lambda: LEVELS[level])
        forget()
        assert load(torch.float32)[1:] == ("prebuilt", level) if level != "compiled" else load(torch.float32).state == level
        yield
    forget()


def forget() -> None:
    """Forget the library in use, and the layouts with its number of lanes."""
    library.cache_clear()
    layout_of.cache_clear()
