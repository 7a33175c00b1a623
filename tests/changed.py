"""Print the test files that belong to what has changed since the last commit: themselves, and those named like a module.

`common/maths/params.py` has `tests/common/maths/test_params.py`; a module without one has all tests of its room.
"""

import subprocess
from pathlib import Path, PurePosixPath

PACKAGES = ("quickbloom", "common", "server_app", "client_app", "benchmarks", "kernels")


def changed() -> list[str]:
    """Paths of files that differ from the last commit, or are not yet in one."""
    listed = [["git", "diff", "--name-only", "HEAD"], ["git", "ls-files", "--others", "--exclude-standard"]]
    found = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines() for command in listed]
    return sorted({path for paths in found for path in paths if Path(path).exists()})


def tests_of(path: str) -> list[str]:
    """The test files of a changed file."""
    file = PurePosixPath(path)
    if file.suffix not in (".py", ".cpp"):
        return []
    if file.parts[0] == "tests":
        return [path] if file.name.startswith("test_") else []
    if file.parts[0] not in PACKAGES:
        return []
    own = Path("tests") / file.parent / f"test_{file.stem}.py"
    return [str(own)] if own.exists() else sorted(str(test) for test in own.parent.glob("test_*.py"))


def main() -> None:
    """Print the files, one on each line."""
    print("\n".join(dict.fromkeys(test for path in changed() for test in tests_of(path))))


if __name__ == "__main__":
    main()
