"""What the benchmarks share: run the real command once per (variant, seed), collect the summaries, average over seeds.

Every run is `quickbloom run ... --json` in a process of its own with one thread. What it leaves is kept in runs/benchmarks; a
run that is there with the same effective settings (defaults included) is not repeated.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from common.config import parse_run_config
from server_app.cli import parse_assignments
from server_app.history import read_history

ROOT = Path(__file__).resolve().parent.parent
RAW = ROOT / "runs" / "benchmarks"
RESULTS = ROOT / "benchmarks" / "results"
AVERAGED = ("before", "after", "worst10", "round_median", "round_p90", "total", "wall")
_NOT_COMPARED = ("output-dir", "data-dir", "resume-from", "seed")

Record = dict[str, Any]


class BenchmarkError(Exception):
    """A run of the command failed; the text says which and why."""


@dataclass(frozen=True)
class Variant:
    """One line of the table: an algorithm with its settings. `reference`: what others reach, in words and as a fraction."""

    label: str
    algorithm: str
    settings: tuple[str, ...] = ()
    reference: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """One benchmark: the same data, rounds and common settings for all its variants."""

    name: str
    claim: str
    dataset: str
    rounds: int
    variants: tuple[Variant, ...]
    settings: tuple[str, ...] = ()
    nodes: int = 2

    def command(self, variant: Variant, seed: int | str) -> list[str]:
        """What a user would type to repeat one run."""
        command = ["quickbloom", "run", "--algorithm", variant.algorithm, "--dataset", self.dataset]
        command += ["--rounds", str(self.rounds), "--nodes", str(self.nodes), "--seed", str(seed)]
        for text in (*self.settings, *variant.settings):
            command += ["--set", text]
        return [*command, "--json"]

    def effective(self, variant: Variant) -> dict[str, Any]:
        """Every setting that can matter, defaults included, and nothing that belongs to a machine or to one seed."""
        named: dict[str, Any] = {"algorithm": variant.algorithm, "dataset": self.dataset, "rounds": self.rounds}
        named["min-nodes"] = self.nodes
        named |= parse_assignments([*self.settings, *variant.settings], variant.algorithm)
        config = parse_run_config(named).resolved()
        tables = ("", config.algorithm, config.dataset, config.model)
        flat = config.flat().items()
        return {key: value for key, value in flat if key.rpartition(".")[0] in tables and key not in _NOT_COMPARED}


def parser(description: str, name: str, seeds: Sequence[int] = (0, 1, 2)) -> argparse.ArgumentParser:
    """The command line that all benchmarks share."""
    result = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        epilog=f"Example: python -m benchmarks.{name} --seeds {' '.join(map(str, seeds))}. Runs that are finished are kept in "
        "runs/benchmarks and not repeated; --fresh repeats them.",
    )
    result.add_argument("--seeds", type=int, nargs="+", default=list(seeds), metavar="SEED", help="default: %(default)s")
    result.add_argument("--fresh", action="store_true", help="repeat runs that are finished as well")
    return result


def run_all(plan: Plan, seeds: Sequence[int], *, fresh: bool = False) -> dict[str, Any]:
    """Do what is missing of a plan, and return its result (see `assemble`)."""
    jobs = [(variant, seed) for seed in seeds for variant in plan.variants]
    records: dict[str, list[Record]] = {variant.label: [] for variant in plan.variants}
    for number, (variant, seed) in enumerate(jobs, 1):
        record = measure(plan, variant, seed, fresh=fresh)
        records[variant.label].append(record)
        after = figures(record)["after"]
        say(f"[{number}/{len(jobs)}] {variant.label}, seed {seed}: {percent(after)} % in {record['wall']:.0f} s")
    return assemble(plan, records)


def measure(plan: Plan, variant: Variant, seed: int, *, fresh: bool = False) -> Record:
    """The record of one run: from runs/benchmarks if it is finished there, else from running the command."""
    settings = plan.effective(variant)
    key = hashlib.sha256(json.dumps([settings, plan.nodes, seed], sort_keys=True).encode()).hexdigest()[:10]
    directory = RAW / plan.name / f"{variant.algorithm}-seed{seed}-{key}"
    file = directory / "record.json"
    if file.exists() and not fresh:
        return json.loads(file.read_text())  # type: ignore[no-any-return]
    shutil.rmtree(directory, ignore_errors=True)  # what a run that was interrupted has left
    command = plan.command(variant, seed)
    say(f"{time.strftime('%H:%M:%S')} {' '.join(command)}")
    started = time.perf_counter()
    # This Python's own script, so that the command under test is the one of this environment.
    done = subprocess.run(
        [str(Path(sys.executable).parent / command[0]), *command[1:], "--output", str(directory)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    wall = time.perf_counter() - started
    if done.returncode:
        raise BenchmarkError(f"`{' '.join(command)}` ended with code {done.returncode}: {done.stderr.strip()[-600:]}")
    summary = json.loads(done.stdout)
    del summary["run_dir"]
    seconds = [line["seconds"] for line in read_history(directory)]
    record = {"wall": wall, "round_seconds": seconds, "commit": commit(), "date": today(), "summary": summary}
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(record))
    partial.replace(file)
    return record


def figures(record: Record) -> dict[str, Any]:
    """What a benchmark reports of one run. Scores are fractions at the step that the validation tasks chose; times seconds."""
    summary = record["summary"]
    scores, step = summary["test"]["accuracy"], summary["chosen"]["adapt_steps"]
    # The first round pays for starting the nodes' processes.
    later = record["round_seconds"][1:] or record["round_seconds"]
    return {
        "seed": summary["seed"],
        "before": scores["mean"][0],
        "after": scores["mean"][step],
        "worst10": scores["worst10"][step],
        "curve": scores["mean"],
        "ci95_over_tasks": scores["ci95"][step],
        "tasks": summary["tasks"],
        "chosen": summary["chosen"],
        "round_first": record["round_seconds"][0],
        "round_median": float(np.median(later)),
        "round_p90": float(np.quantile(later, 0.9)),
        "total": summary["seconds"]["total"],
        "wall": record["wall"],
        "bytes": summary["bytes"],
        "failures": summary["failures"],
        "commit": record["commit"],
        "date": record["date"],
    }


def average(runs: Sequence[Mapping[str, Any]], names: Sequence[str] = AVERAGED) -> dict[str, dict[str, float | None]]:
    """Mean and standard deviation (n - 1) over seeds of each named figure; a single seed has no deviation."""
    columns = {name: [run[name] for run in runs] for name in names}
    return {
        "mean": {name: float(np.mean(values)) for name, values in columns.items()},
        "sd": {name: float(np.std(values, ddof=1)) if len(values) > 1 else None for name, values in columns.items()},
    }


def assemble(plan: Plan, records: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
    """The result file of a benchmark, without what a script adds of its own."""
    variants = []
    for variant in plan.variants:
        runs = [figures(record) for record in records[variant.label]]
        entry: dict[str, Any] = {"label": variant.label, "algorithm": variant.algorithm}
        entry["set"] = [*plan.settings, *variant.settings]
        entry |= {"command": " ".join(plan.command(variant, "SEED")), "configuration": plan.effective(variant)}
        entry |= {"runs": runs, **average(runs), "curve": np.mean([run["curve"] for run in runs], axis=0).tolist()}
        variants.append({**entry, "reference": dict(variant.reference)})
    some = records[plan.variants[0].label]
    # Usually one; several are told, since finished runs are kept when the code goes on.
    commits = sorted({record["commit"] for runs in records.values() for record in runs})
    facts: dict[str, Any] = {"schema": 1, "benchmark": plan.name, "claim": plan.claim, "nodes": plan.nodes}
    facts |= {"seeds": [record["summary"]["seed"] for record in some], "variants": variants, "floors": {}, "goals": []}
    versions = some[0]["summary"]["versions"]
    return {**facts, "machine": machine(), "versions": versions, "commit": ", ".join(commits), "date": today()}


def by_label(result: Mapping[str, Any], label: str) -> dict[str, Any]:
    """The entry of one variant."""
    return next(variant for variant in result["variants"] if variant["label"] == label)


def goal(result: dict[str, Any], text: str, measured: float, *, met: bool) -> None:
    """Put one goal and what was measured into the result."""
    result["goals"].append({"goal": text, "measured": measured, "met": bool(met)})


def finish(result: Mapping[str, Any], text: str) -> None:
    """Write benchmarks/results/NAME.json, print the table and the goals."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"{result['benchmark']}.json"
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(file)
    print(text)
    for entry in result["goals"]:
        print(f"\n{'met' if entry['met'] else 'NOT MET'}: {entry['goal']} (measured {entry['measured']:.4g})")


def table(result: Mapping[str, Any]) -> str:
    """Accuracy before and after, worst tenth and seconds per round, as a Markdown table."""
    lines = ["| variant | before, % | after, % | worst 10 %, % | s per round | reference, % |", "|---|---:|---:|---:|---:|---|"]
    for variant in result["variants"]:
        mean, sd = variant["mean"], variant["sd"]
        cells = [f"{percent(mean[name])} ± {percent(sd[name])}" for name in ("before", "after", "worst10")]
        known = "; ".join(f"{name} {percent(value)}" for name, value in variant["reference"].items())
        lines.append(f"| {variant['label']} | {' | '.join(cells)} | {mean['round_median']:.3f} | {known} |")
    for name, floor in result["floors"].items():
        lines.append(f"| {name} | | {percent(floor['mean']['after'])} ± {percent(floor['sd']['after'])} | | | |")
    return "\n".join(lines)


def percent(value: float | None) -> str:
    """0.8234 -> "82.3"; "-" for what is not known."""
    return "-" if value is None else f"{100 * value:.1f}"


def machine() -> dict[str, Any]:
    """Cores and processor."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    cpu = names[0].partition(":")[2].strip() if names else platform.processor()
    return {"cores": os.cpu_count(), "cpu": cpu, "os": platform.system()}


def commit() -> str:
    """The commit of the code under test, with "-dirty" where that code differs from it; "unknown" outside of git."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "common", "server_app", "client_app", "pyproject.toml")
        return git("rev-parse", "--short=12", "HEAD") + "-dirty" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def today() -> str:
    return datetime.now(UTC).date().isoformat()


def say(line: str) -> None:
    """Progress goes to stderr: stdout holds the table alone."""
    print(line, file=sys.stderr, flush=True)
