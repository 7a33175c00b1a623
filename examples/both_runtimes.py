"""One federation twice, in process and in Flower's simulation: do the learning curves agree? `make demo` runs this.

    python examples/both_runtimes.py
    python examples/both_runtimes.py --algorithm maml --rounds 20

What follows the file's name goes to `quickbloom run`. Exit code: 0 the curves agree, 1 they do not, or a run failed.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

AGREE = 1e-4
"""Largest difference of a loss or a score: both runtimes compute the same, up to the order of some sums."""


def main() -> None:
    folder = Path("runs") / f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    here, simulated = folder / "in-process", folder / "simulation"
    run("--output", str(here))
    print("\nThe same once more in Flower's simulation (`--runtime simulation`):", flush=True)
    run("--runtime", "simulation", "--output", str(simulated), "--no-report", "--json")
    largest, rounds = difference(here, simulated)
    seconds = [json.loads((place / "summary.json").read_text())["seconds"]["total"] for place in (here, simulated)]
    agree = largest <= AGREE
    print(
        f"The two learning curves {'agree' if agree else 'differ'}: over {rounds} rounds, losses and scores differ by "
        f"{largest:.1g} at most. In process the run took {seconds[0]:.1f} s, in the simulation {seconds[1]:.1f} s."
    )
    sys.exit(0 if agree else 1)


def run(*options: str) -> None:
    """`quickbloom run` of this environment, with what follows this file's name; the JSON of the second run is not shown."""
    quickbloom = Path(sys.executable).with_name("quickbloom")
    shown = subprocess.DEVNULL if "--json" in options else None
    if subprocess.run([quickbloom, "run", *sys.argv[1:], *options], stdout=shown, check=False).returncode:
        sys.exit(1)


def difference(one: Path, other: Path) -> tuple[float, int]:
    """(The largest difference of any number in two learning curves, how many rounds they have.)"""
    here, there = curve(one), curve(other)
    if [len(line) for line in here] != [len(line) for line in there]:
        return float("inf"), min(len(here), len(there))
    pairs = ((a, b) for x, y in zip(here, there, strict=True) for a, b in zip(x, y, strict=True))
    return max(abs(a - b) for a, b in pairs), len(here)


def curve(run_dir: Path) -> list[list[float]]:
    """The losses and scores of every round."""
    lines = [json.loads(line) for line in (run_dir / "history.jsonl").read_text().splitlines()]
    return [numbers([line.get("train"), line.get("validation")]) for line in lines]


def numbers(value: Any) -> list[float]:
    """All numbers in nested dictionaries and lists, in order."""
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [] if value is None else [float(value)]


if __name__ == "__main__":
    main()
