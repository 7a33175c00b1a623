"""Writes three small tables to try quickbloom with: hospitals.csv, a new ward's ward.csv, and new-patients.csv.

    python examples/hospitals.py            # into the current directory

Sixteen hospitals with 50 patients each. A patient is ill if a marker is high, but what is high differs from hospital to
hospital, and in half of them the scale runs the other way: no single model fits all. The ward is one more such place.
"""

import csv
import sys
from pathlib import Path

import numpy as np

HEADER = ("hospital", "age", "marker", "sex", "outcome")


def patients(name: str, number: int) -> list[tuple[str | float, ...]]:
    """Rows of one hospital; every twelfth age is missing. Names that sort evenly have the scale the usual way round."""
    rng = np.random.default_rng(list(name.encode()))
    sign, middle = (1 if sum(name.encode()) % 2 else -1), rng.normal(0, 0.25)
    rows: list[tuple[str | float, ...]] = []
    for i in range(number):
        marker = rng.normal()
        age = "" if i % 12 == 0 else round(rng.normal(60, 12), 1)
        ill = sign * (marker - middle) + rng.normal(0, 0.2) > 0
        rows.append((name, age, round(marker, 3), str(rng.choice(["f", "m"])), "ill" if ill else "well"))
    return rows


def write(path: Path, rows: list[tuple[str | float, ...]], header: tuple[str, ...] = HEADER) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    print(f"{path}: {len(rows)} rows")


def write_all(folder: Path) -> None:
    write(folder / "hospitals.csv", [row for letter in "ABCDEFGHIJKLMNOP" for row in patients(f"hospital-{letter}", 50)])
    ward = patients("ward-7", 80)
    write(folder / "ward.csv", ward[:60])
    # What is not known of new patients is the outcome.
    write(folder / "new-patients.csv", [row[:-1] for row in ward[60:]], HEADER[:-1])


if __name__ == "__main__":
    write_all(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
