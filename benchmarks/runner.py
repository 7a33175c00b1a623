"""Shared by the benchmarks: run the real command once per (variant, seed), collect the summaries, average over seeds.

Every run is `quickbloom run ... --json` in its own process (`server_app.comparing.batch`). Its
output is stored in runs/benchmarks; a run stored there with the same effective settings (defaults
included) is not repeated.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from quickbloom.common.metric import metric_of
from quickbloom.common.system.whole_files import whole
from quickbloom.server_app.comparing.batch import Result, Run, Setup, perform, today

ROOT = Path(__file__).resolve().parent.parent
RAW = ROOT / "runs" / "benchmarks"
RESULTS = ROOT / "benchmarks" / "results"
AVERAGED = ("before", "after", "worst10", "round_median", "round_p90", "total", "wall", "cpu")


class BenchmarkError(Exception):
    """A run of the command failed; the message says which and why."""


@dataclass(frozen=True)
class Variant:
    """One line of the table: an algorithm with its settings. `reference`: published values, in words and as a fraction.

    `rounds`: of this variant alone; 0: as many as the plan has.
    """

    label: str
    algorithm: str
    settings: tuple[str, ...] = ()
    reference: Mapping[str, float] = field(default_factory=dict)
    rounds: int = 0


@dataclass(frozen=True)
class Plan:
    """One benchmark, with data, rounds and settings shared by all its variants."""

    name: str
    claim: str
    dataset: str
    rounds: int
    variants: tuple[Variant, ...]
    settings: tuple[str, ...] = ()
    nodes: int = 2
    in_process: bool = False

    def setup(self, variant: Variant) -> Setup:
        """Return the command of a variant, for any seed."""
        # The published figures are of a fixed number of steps.
        settings = ("adapt-steps=10", *self.settings, *variant.settings)
        rounds = variant.rounds or self.rounds
        return Setup(variant.algorithm, self.dataset, rounds, settings, self.nodes, self.in_process)


def parser(description: str, name: str, seeds: Sequence[int] = (0, 1, 2), *, has_only: bool = False) -> argparse.ArgumentParser:
    """Return the command line shared by all benchmarks; `has_only`: whether variants can be run one by one."""
    result = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        epilog=f"Example: python -m benchmarks.{name} --seeds {' '.join(map(str, seeds))}. Runs that are finished are kept in "
        "runs/benchmarks and not repeated; --fresh repeats them.",
    )
    result.add_argument("--seeds", type=int, nargs="+", default=list(seeds), metavar="SEED", help="default: %(default)s")
    result.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once; default: %(default)s")
    if has_only:
        result.add_argument(
            "--only", nargs="+", default=[], metavar="LABEL", help="do only these variants, and write no result"
        )
    result.add_argument("--fresh", action="store_true", help="repeat runs that are finished as well")
    return result


def run_all(plan: Plan, seeds: Sequence[int], *, fresh: bool = False, jobs: int = 1) -> dict[str, Any]:
    """Run the missing runs of a plan, `jobs` at once, and return its result (see `assemble`)."""
    results = measure(plan, [(variant, seed) for seed in seeds for variant in plan.variants], fresh=fresh, jobs=jobs)
    ordered = iter(results)
    by_variant: dict[str, list[Result]] = {variant.label: [] for variant in plan.variants}
    for _ in seeds:
        for variant in plan.variants:
            by_variant[variant.label].append(next(ordered))
    return assemble(plan, by_variant)


def run_only(plan: Plan, labels: Sequence[str], seeds: Sequence[int], *, fresh: bool = False, jobs: int = 1) -> None:
    """Run the missing runs of some variants, for a result that is assembled later."""
    if unknown := sorted(set(labels) - {variant.label for variant in plan.variants}):
        known = ", ".join(variant.label for variant in plan.variants)
        raise SystemExit(f"`--only` must name variants of this benchmark ({known}), got {unknown[0]}")
    measure(plan, [(v, seed) for seed in seeds for v in plan.variants if v.label in labels], fresh=fresh, jobs=jobs)


def measure(plan: Plan, wanted: Sequence[tuple[Variant, int]], *, fresh: bool = False, jobs: int = 1) -> list[Result]:
    """Return the results of (variant, seed): from runs/benchmarks if finished there, else from running the command."""
    runs = [Run(plan.setup(variant), seed, RAW / plan.name) for variant, seed in wanted]
    for run in runs if fresh else ():
        shutil.rmtree(run.directory, ignore_errors=True)

    def on_start(run: Run) -> None:
        say(f"{time.strftime('%H:%M:%S')} {' '.join(run.setup.command(run.seed))}")

    def on_end(result: Result, kept: bool) -> None:
        if result.code:
            command = " ".join(result.run.setup.command(result.run.seed))
            raise BenchmarkError(f"`{command}` ended with code {result.code}: {result.failure[-600:]}")
        label = wanted[runs.index(result.run)][0].label
        run = figures(result)
        say(f"{label}, seed {run['seed']}: {run['after']:.4g} in {run['wall']:.0f} s{' (kept)' * kept}")

    done = perform(runs, jobs, facts={"commit": commit()}, on_start=on_start, on_end=on_end)
    return [done[run] for run in runs]


def figures(result: Result) -> dict[str, Any]:
    """Return the figures of one run: scores as fractions at the step chosen on the validation tasks, times in seconds."""
    summary, seconds = result.summary, [line["seconds"] for line in result.rounds]
    scores, step = summary["test"][metric_of(summary["test"]).name], summary["chosen"]["adapt_steps"]
    # The first round includes the start of the nodes' processes.
    later = seconds[1:] or seconds
    return {
        "seed": summary["seed"],
        "before": scores["mean"][0],
        "after": scores["mean"][step],
        "worst10": scores["worst10"][step],
        "curve": scores["mean"],
        "ci95_over_tasks": scores["ci95"][step],
        "tasks": summary["tasks"],
        "chosen": summary["chosen"],
        "round_first": seconds[0],
        "round_median": float(np.median(later)),
        "round_p90": float(np.quantile(later, 0.9)),
        "total": summary["seconds"]["total"],
        "cpu": summary["seconds"]["cpu"],
        "wall": result.facts["wall"],
        "bytes": summary["bytes"],
        "failures": summary["failures"],
        "privacy": summary.get("privacy"),
        "commit": result.facts["commit"],
        "date": result.facts["date"],
    }


def average(runs: Sequence[Mapping[str, Any]], names: Sequence[str] = AVERAGED) -> dict[str, dict[str, float | None]]:
    """Return mean and standard deviation (n - 1) over seeds of each named figure; a single seed has no deviation."""
    columns = {name: [run[name] for run in runs] for name in names}
    return {
        "mean": {name: float(np.mean(values)) for name, values in columns.items()},
        "sd": {name: float(np.std(values, ddof=1)) if len(values) > 1 else None for name, values in columns.items()},
    }


def assemble(plan: Plan, results: Mapping[str, Sequence[Result]]) -> dict[str, Any]:
    """Return the result file of a benchmark, without the additions of a script."""
    variants = []
    for variant in plan.variants:
        runs = [figures(result) for result in results[variant.label]]
        entry: dict[str, Any] = {"label": variant.label, "algorithm": variant.algorithm}
        entry["set"] = [*plan.settings, *variant.settings]
        setup = plan.setup(variant)
        entry |= {"command": " ".join(setup.command("SEED")), "configuration": setup.effective()}
        entry |= {"runs": runs, **average(runs), "curve": np.mean([run["curve"] for run in runs], axis=0).tolist()}
        variants.append({**entry, "reference": dict(variant.reference)})
    # Usually one commit; several are listed, since finished runs are reused after the code has changed.
    commits = sorted({run["commit"] for variant in variants for run in variant["runs"]})
    facts: dict[str, Any] = {"schema": 1, "benchmark": plan.name, "claim": plan.claim, "nodes": plan.nodes}
    facts |= {"seeds": [run["seed"] for run in variants[0]["runs"]], "variants": variants, "floors": {}, "goals": []}
    versions = results[plan.variants[0].label][0].summary["versions"]
    return {**facts, "machine": machine(), "versions": versions, "commit": ", ".join(commits), "date": today()}


def by_label(result: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Return the entry of one variant."""
    return next(variant for variant in result["variants"] if variant["label"] == label)


def goal(result: dict[str, Any], text: str, measured: float, *, met: bool) -> None:
    """Add one goal and its measured value to the result."""
    result["goals"].append({"goal": text, "measured": measured, "met": bool(met)})


def finish(result: Mapping[str, Any], text: str) -> None:
    """Write benchmarks/results/NAME.json, and print the table and the goals."""
    store(result)
    print(text)
    for entry in result["goals"]:
        print(f"\n{'met' if entry['met'] else 'NOT MET'}: {entry['goal']} (measured {entry['measured']:.4g})")


def store(result: Mapping[str, Any]) -> None:
    """Write benchmarks/results/NAME.json."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    with whole(RESULTS / f"{result['benchmark']}.json") as file:
        file.write(json.dumps(result, indent=1) + "\n")


def table(result: Mapping[str, Any]) -> str:
    """Return accuracy before and after, worst tenth and seconds per round, as a Markdown table."""
    lines = ["| variant | before, % | after, % | worst 10 %, % | rounds | CPU s | reference, % |"]
    lines.append("|---|---:|---:|---:|---:|---:|---|")
    for variant in result["variants"]:
        mean, sd = variant["mean"], variant["sd"]
        cells = [f"{percent(mean[name])} ± {percent(sd[name])}" for name in ("before", "after", "worst10")]
        known = "; ".join(f"{name} {percent(value)}" for name, value in variant["reference"].items())
        spent = f"{variant['configuration']['rounds']} | {mean['cpu']:.0f}"
        lines.append(f"| {variant['label']} | {' | '.join(cells)} | {spent} | {known} |")
    for name, floor in result["floors"].items():
        lines.append(f"| {name} | | {percent(floor['mean']['after'])} ± {percent(floor['sd']['after'])} | | | | |")
    return "\n".join(lines)


def percent(value: float | None) -> str:
    """Return 0.8234 as "82.3"; "-" for None."""
    return "-" if value is None else f"{100 * value:.1f}"


def machine() -> dict[str, Any]:
    """Return the cores and the processor of this machine."""
    info = Path("/proc/cpuinfo")
    names = (
        [line for line in info.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    cpu = names[0].partition(":")[2].strip() if names else platform.processor()
    return {"cores": os.cpu_count(), "cpu": cpu, "os": platform.system()}


def commit() -> str:
    """Return the commit of the code under test, with "-dirty" if that code differs from it; "unknown" outside of git."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "common", "server_app", "client_app", "pyproject.toml")
        return git("rev-parse", "--short=12", "HEAD") + "-dirty" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def say(line: str) -> None:
    """Print progress to stderr: stdout holds the table alone."""
    print(line, file=sys.stderr, flush=True)
