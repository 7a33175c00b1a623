"""The run directory: config.json, history.jsonl (a line per round, as it ends), summary.json, per_task.csv."""

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.intervals import half_width
from quickbloom.common.metric import Metric
from quickbloom.common.spreadsheets import write_csv
from quickbloom.common.system import locks
from quickbloom.common.system.temporary import make_writable
from quickbloom.common.system.whole_files import whole
from quickbloom.server_app.events.channel import Warn, warn_in_log
from quickbloom.server_app.events.kinds import finite

MEASURED = ("seconds", "phases", "memory")
"""Keys of a line of history.jsonl that differ between two runs with the same result."""
_SMALL = 0.01


class RunDirectory:
    """Directory of a run's results. Everything but history.jsonl is written whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._synced = -math.inf

    @classmethod
    def create(cls, setting: str, name: str, *, again: bool = False) -> "RunDirectory":
        """Return the directory `output-dir`, or a new one in ~/quickbloom-runs. Raises ConfigError if it cannot be used.

        `again`: the directory may hold a run, which is to be continued.
        """
        path = (
            Path(setting) if setting else unused(Path.home() / "quickbloom-runs" / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
        )
        try:
            make_writable(path)
            if not again and (path / "history.jsonl").exists():
                raise ConfigError(f"`output-dir` '{path}' already holds a run: choose another directory")
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"`output-dir` must be a directory that can be written, got '{path}' ({reason})") from None
        return cls(path)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Lock this directory for this process within the context. Raises ConfigError if another process holds it."""
        with ExitStack() as stack:
            try:
                stack.enter_context(locks.locked(self.path))
            except BlockingIOError:
                raise ConfigError(
                    f"a run is going on in '{self.path}': wait for its end, or choose another directory"
                ) from None
            yield

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def write_json(self, name: str, content: Any) -> None:
        """Write `content` as `name`, atomically."""
        self.write_text(name, to_json(content, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write `text` as `name`, atomically."""
        with whole(self.path / name) as file:
            file.write(text)

    def append_round(self, record: dict[str, Any]) -> None:
        """Add one line to history.jsonl. It can be read at once; a power failure loses at most a second of rounds."""
        with (self.path / "history.jsonl").open("a", encoding="utf-8") as file:
            file.write(to_json(record) + "\n")
            file.flush()
            if time.monotonic() - self._synced > 1:  # a sync costs milliseconds, as much as a small round
                os.fsync(file.fileno())
                self._synced = time.monotonic()

    def write_rounds(self, records: list[dict[str, Any]]) -> None:
        """Replace history.jsonl by these lines, atomically."""
        self.write_text("history.jsonl", "".join(to_json(record) + "\n" for record in records))

    def write_per_task(self, rows: list[dict[str, Any]]) -> None:
        """Write one line per scored task: its scores after every step."""
        if not rows:
            return
        with whole(self.path / "per_task.csv", newline="") as file:
            write_csv(file, list(dict.fromkeys(name for row in rows for name in row)), rows)


def to_json(content: Any, indent: int | None = None) -> str:
    """Return JSON with null for NaN and infinity (from a run that diverged), as the standard requires."""
    return json.dumps(finite(content), indent=indent, allow_nan=False)


def read_history(path: Path) -> list[dict[str, Any]]:
    """Return the rounds so far of a run directory, without a last line that is still being written."""
    file = path / "history.jsonl"
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def history_until(path: Path, last_round: int, warn: Warn = warn_in_log) -> list[dict[str, Any]]:
    """Return the lines of rounds 1..last_round of an interrupted run. An unreadable line is left out, with a warning."""
    file = path / "history.jsonl"
    records: dict[int, dict[str, Any]] = {}
    for line in file.read_bytes().split(b"\n") if file.exists() else []:
        try:
            record = json.loads(line)
            records[int(record["round"])] = record
        except (ValueError, KeyError, TypeError):  # the end of a line that a crash cut off
            continue
    if missing := [str(number) for number in range(1, last_round + 1) if number not in records]:
        warn(f"{file} lacks rounds that are part of the model: {', '.join(missing[:10])}")
    return [records[number] for number in sorted(records) if 1 <= number <= last_round]


def spread(values: np.ndarray[Any, Any], metric: Metric, sizes: Sequence[int] = ()) -> dict[str, list[float]]:
    """Return mean, 95 % half-width, deviation and mean of the worst tenth over tasks, one entry per step.

    `values` [tasks, steps + 1]; `sizes`: test examples of every task, for the mean in which each example counts alike. The
    half-width is that of Student's t (`intervals.half_width`), the deviation has n - 1; both are NaN for a single task, which
    has no known spread.
    """
    tasks = len(values)
    ordered = np.sort(values, axis=0) if metric.higher_is_better else -np.sort(-values, axis=0)
    worst = ordered[: max(1, tasks // 10)].mean(axis=0)
    deviation = values.std(axis=0, ddof=1) if tasks > 1 else np.full(values.shape[1:], np.nan)
    parts = {"mean": values.mean(axis=0), "ci95": half_width(values), "worst10": worst, "sd": deviation}
    if len(sizes):
        parts["weighted"] = np.average(values, axis=0, weights=sizes)
    # Scores travel as float32: more digits would be noise.
    return {name: [_rounded(float(value)) for value in part] for name, part in parts.items()}


def _rounded(value: float) -> float:
    """Return a number with seven decimals, or seven digits if it is small: a target may be of 1e-9."""
    return round(value, 7) if abs(value) >= _SMALL or not math.isfinite(value) else float(f"{value:.7g}")


def unused(path: Path) -> Path:
    """Return `path`, or the first of path-2, path-3, .. that does not exist."""
    number, candidate = 1, path
    while candidate.exists():
        number, candidate = number + 1, path.with_name(f"{path.name}-{number}")
    return candidate
