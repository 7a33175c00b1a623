"""Lake's 20 official runs of one-shot classification, from a file of yours, scored with models that never saw their alphabets.

A run has 20 characters of one evaluation alphabet: one training image each, and 20 test images of another drawer. The file is
an .npz with `train_images` and `test_images`, u8 [20, 20, 28, 28], ink 255 on 0 as in omniglot_28.npz, and `true_class`
[20, 20]: for each test image which training image of its run, 0 to 19, is of the same character. Models are checkpoints that
were trained on background alphabets alone; by default `protonet` of `benchmarks.alphabets` is trained, with three seeds.

Errors are told with each test image by itself, as people saw them; with the 20 of a run together; and with prototypes that
these 20 have moved. Only the first is comparable with the published figures.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.alphabets import PLAN
from benchmarks.runner import measure
from quickbloom.client_app.offline.scoring import EpisodeScores, score
from quickbloom.common.datasets.base import read_npz, require_below
from quickbloom.common.errors import DataError, QuickbloomError

RUNS, WAYS, SIDE = 20, 20, 28
REFINEMENTS = 5
RECALLED = {"people": 0.045, "BPL": 0.033, "ARC": 0.015}
"""Errors in the literature, recalled and not read again: Lake et al. 2015; Shyam, Gupta, Dukkipati 2017 (ARC)."""


def read_runs(path: Path) -> dict[str, Any]:
    """Return the 20 runs as episodes for `score`. Raises DataError for a file of another form."""
    pixels = (RUNS, WAYS, SIDE, SIDE)
    byte = np.dtype(np.uint8)
    images = read_npz(path, {"train_images": (byte, pixels), "test_images": (byte, pixels)})
    for name, values in images.items():
        if values.mean() > 127:
            raise DataError(
                f"`{name}` in '{path}' must be ink of 255 on paper of 0, and most of it is light: take 255 minus it"
            )
    with np.load(path, allow_pickle=False) as archive:
        known = archive["true_class"] if "true_class" in archive.files else None
    if known is None or known.dtype.kind not in "iu" or known.shape != (RUNS, WAYS):
        came = "none" if known is None else f"{known.dtype} {known.shape}"
        raise DataError(f"`true_class` in '{path}' must be whole numbers of shape {(RUNS, WAYS)}, got {came}")
    require_below(path, "true_class", known, WAYS)
    y = np.tile(np.arange(WAYS), (RUNS, 1))
    return {"support_x": images["train_images"], "support_y": y, "query_x": images["test_images"], "query_y": known}


def trained(seeds: Sequence[int]) -> dict[str, Path]:
    """Return the run directories of `protonet` of the alphabets, trained where they are not there yet."""
    variant = next(one for one in PLAN.variants if one.label == "protonet")
    results = measure(PLAN, [(variant, seed) for seed in seeds])
    return {f"seed {seed}": result.run.directory for seed, result in zip(seeds, results, strict=True)}


def table(found: dict[str, EpisodeScores]) -> list[str]:
    """Return the lines of the table: a model in each, then their mean, then what is recalled of the literature."""
    kinds = ("alone", "together", "refined")
    lines = ["| model | one at a time, % | 20 together, % | refined, % |", "|---|---:|---:|---:|"]
    columns: list[list[float]] = [[], [], []]
    for name, scores in found.items():
        each = [getattr(scores, kind) for kind in kinds]
        means = [math.nan if errors is None else 100 * float(np.mean(errors)) for errors in each]
        for column, mean in zip(columns, means, strict=True):
            column.append(mean)
        lines.append(f"| {name} | {' | '.join(_cell(mean) for mean in means)} |")
    if len(found) > 1:
        cells = (f"{_cell(float(np.mean(column)))} ± {_cell(float(np.std(column, ddof=1)))}" for column in columns)
        lines.append(f"| mean ± standard deviation of {len(found)} models | {' | '.join(cells)} |")
    return [*lines, *(f"| {name} (recalled) | {100 * error:.1f} | | |" for name, error in RECALLED.items())]


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lake_runs",
        description="errors on Lake's 20 official runs, from an .npz file of yours",
        epilog="Example: python -m benchmarks.lake_runs --runs lake.npz --checkpoint runs/r",
    )
    parser.add_argument("--runs", type=Path, required=True, help="train_images, test_images and true_class")
    parser.add_argument("--checkpoint", type=Path, nargs="+", default=[], help="models to score; by default they are trained")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the training; default: %(default)s")
    parser.add_argument("--refine", type=int, default=REFINEMENTS, help="for protonet alone, else 0; default: %(default)s")
    chosen = parser.parse_args()
    try:
        runs = read_runs(chosen.runs)
        models = {str(path): path for path in chosen.checkpoint} or trained(chosen.seeds)
        found = {name: score(path, runs, together=True, refine=chosen.refine) for name, path in models.items()}
    except QuickbloomError as error:
        raise SystemExit(str(error)) from None
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
