"""Time and memory of `quickbloom-edge check-data` to read, split and describe a file with many users.

Python's start, with torch, is included; it is also measured alone, on a file of 8 users.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SIZES = {"start": (8, 20), "4,000 users of 40 rows": (4_000, 40), "100,000 users of 20 rows": (100_000, 20)}
"""Users, and rows of each."""
LIMITS = {"4,000 users of 40 rows": (3.0, 2000.0), "100,000 users of 20 rows": (30.0, 2000.0)}
"""Processor seconds beyond those of the start, and megabytes, at most."""
CLAIM = "reading 4,000 users takes at most 3 s, and 100,000 users at most 30 s and 2 GB"


def write(path: Path, users: int, rows: int) -> None:
    """Write a file with two numbers and one of five classes in every row."""
    rng = np.random.default_rng(0)
    total = users * rows
    columns = {"user": np.repeat(np.arange(users), rows), "a": rng.normal(size=total), "b": rng.normal(size=total)}
    columns |= {"y": rng.integers(1, 6, total)}
    if path.suffix == ".npz":
        np.savez(path, **columns)  # type: ignore[arg-type]
        return
    with path.open("w", encoding="utf-8") as file:
        file.write(",".join(columns) + "\n")
        file.writelines(f"{u},{a:.4f},{b:.4f},{y}\n" for u, a, b, y in zip(*columns.values(), strict=True))


def measure(path: Path) -> dict[str, float]:
    """Return wall and processor seconds of the command, and its peak memory."""
    command = [sys.executable, "-m", "quickbloom.client_app.cli", "check-data", str(path), "--task", "user", "--target", "y"]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    worked = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    # The maximum over all children so far, so sizes are measured in ascending order.
    return {"seconds": round(seconds, 2), "processor_seconds": round(worked, 2), "megabytes": round(after.ru_maxrss / 1024, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=CLAIM)
    parser.add_argument("--kind", choices=["npz", "csv"], default="npz", help="the container of the table")
    kind = parser.parse_args().kind
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (users, rows) in SIZES.items():
            path = Path(folder) / f"{users}.{kind}"
            write(path, users, rows)
            found[name] = measure(path)
            print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    start = found["start"]["processor_seconds"]
    misses = [
        name
        for name, (seconds, megabytes) in LIMITS.items()
        if found[name]["processor_seconds"] - start > seconds or found[name]["megabytes"] > megabytes
    ]
    print(json.dumps({"claim": CLAIM, "kind": kind, "measured": found, "missed": misses}))
    sys.exit(1 if misses else 0)


if __name__ == "__main__":
    main()
