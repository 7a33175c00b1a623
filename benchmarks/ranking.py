"""Which algorithm is better on users whom training never saw, and is it more than luck? Ten seeds, rates tuned alike, tests.

For each data set the real `quickbloom compare`: every algorithm chooses its inner rate among three, and the rate and number of
steps of adaptation, on the validation users of each seed; test users are scored once, by that choice. All rows of a seed have
the same users, so that rows are compared seed by seed: Wilcoxon's signed-rank test (exact), Holm's correction, and the
matched-pairs rank biserial correlation as the effect. Two families of tests are corrected by themselves: the best row against
each other one, and each row against fine-tuned FedAvg. What needs no training stands below, scored on the same users.

    python -m benchmarks.ranking
    python -m benchmarks.ranking --only digits --seeds 10 --jobs 2

`uji` and `shakespeare` need their files in QUICKBLOOM_DATA_DIR. A comparison that was stopped goes on.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.runner import RAW, commit, finish, goal, machine, percent
from quickbloom.common.metric import named
from quickbloom.server_app.comparing.batch import today
from quickbloom.server_app.comparing.paired import LEVEL, holm, seeds_needed, signed_rank

TUNED = "fedavg"
"""The row that fine-tunes one common model: what personalised training has to beat."""
SHARED = ("fedavg", "reptile", "fomaml", "maml", "ridge", "protonet")
SMALL = (*SHARED, "anil", "metasgd", "protomaml", "perfedavg", "imaml", "pfedme", "heads", "fedprox", "ditto", "fedbabu")
CASES: Mapping[str, tuple[Sequence[str], int, Sequence[str]]] = {
    "digits": (SMALL, 100, ()),
    "uji": (
        SHARED,
        60,
        ("model=conv4", "conv4.filters=32", "uji.augment=true", "validation-tasks=5", "test-tasks=15", "adapt-steps=10"),
    ),
    "shakespeare": (
        ("fedavg", "reptile", "fomaml", "maml"),
        100,
        ("shakespeare.support-examples=40", "shakespeare.query-examples=40", "tasks-per-round=50", "adapt-steps=5"),
    ),
}
"""Algorithms, rounds and settings for each data set."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ranking",
        description="algorithms on unseen users, tuned alike, with paired tests over seeds",
        epilog="Example: python -m benchmarks.ranking --only digits --seeds 10 --jobs 2. Runs that are finished are kept.",
    )
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), help="default: all")
    parser.add_argument("--seeds", type=int, default=10, metavar="N", help="how many, from 0 on; default: %(default)s")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at once; default: %(default)s")
    chosen = parser.parse_args()
    for name in chosen.only:
        result = ranking(comparison(name, chosen.seeds, chosen.jobs))
        finish(result, table(result))


def comparison(name: str, seeds: int, jobs: int) -> dict[str, Any]:
    """Return the comparison.json of a data set."""
    algorithms, rounds, settings = CASES[name]
    words = ["compare", "--dataset", name, "--algorithms", ",".join(algorithms), "--rounds", str(rounds)]
    words += ["--seeds", str(seeds), "--jobs", str(jobs), "--output", str(RAW / f"ranking-{name}"), "--json"]
    words += [word for setting in (*settings, "evaluate-every=0", "checkpoint-every=0") for word in ("--set", setting)]
    done = subprocess.run([Path(sys.executable).parent / "quickbloom", *words], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"`quickbloom {' '.join(words)}` ended with code {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def ranking(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the result file of a comparison: rows from the best to the worst, and two families of tests over seeds.

    Runs that failed are left out, and counted.
    """
    if not named(found["metric"]).higher_is_better:
        raise SystemExit(f"a ranking is of scores of which more is better, got {found['metric']}")
    rows = [
        {
            **{"label": row["name"], "mean": row["mean"], "sd": row["sd"], "mean_rank": row["mean_rank"], "edge": row["edge"]},
            "failed": row["failed"],
            "runs": [
                {key: run[key] for key in ("seed", "after", "worst10", "inner_lr", "adapt_lr", "adapt_steps")}
                for run in row["runs"]
                if not run["failure"]
            ],
        }
        for row in found["algorithms"]
        if row["failed"] < len(row["runs"])
    ]
    rows.sort(key=lambda row: -row["mean"]["after"])
    for row in rows:
        row["mean"], row["sd"] = ({name: row[part][name] for name in ("before", "after", "worst10")} for part in ("mean", "sd"))
    by_seed = {row["label"]: {run["seed"]: run["after"] for run in row["runs"]} for row in rows}
    result: dict[str, Any] = {"schema": 1, "benchmark": f"ranking-{found['dataset']}", "metric": found["metric"]}
    result |= {
        "claim": "algorithms on users whom training never saw, tuned alike",
        "seeds": found["seeds"],
        "tasks": found["tasks"],
    }
    result |= {"rows": rows, "baselines": found["baselines"], "tests": tests(by_seed, rows[0]["label"]), "goals": []}
    result |= {"command": found["command"].partition(" --output")[0], "data_sha256": found["data_sha256"]}
    result |= {"versions": found["versions"], "machine": machine(), "commit": commit(), "date": today()}
    for test in result["tests"]["best"]:
        settled = test["holm"] < LEVEL and test["effect"] > 0
        text = f"{rows[0]['label']} is better than {test['other']} (Holm's p below {LEVEL:g})"
        goal(result, text, test["holm"], met=settled)
    return result


def tests(by_seed: Mapping[str, Mapping[int, float]], best: str) -> dict[str, list[dict[str, Any]]]:
    """Return the tests of the best row against each other one, and of each row against fine-tuned FedAvg, over seeds.

    "difference": by how much the first of a pair is better, the row itself in the second family. "holm": p, corrected within
    its family.
    """
    families = {"best": [(best, other) for other in by_seed if other != best]}
    if TUNED in by_seed:
        families["fedavg"] = [(other, TUNED) for other in by_seed if other != TUNED]
    found: dict[str, list[dict[str, Any]]] = {}
    for family, pairs in families.items():
        entries: list[dict[str, Any]] = []
        for one, other in pairs:
            # Scores have seven digits: what differs less is equal, and rounding makes no ranks.
            apart = [round(by_seed[one][seed] - by_seed[other][seed], 7) for seed in by_seed[one] if seed in by_seed[other]]
            p, effect = signed_rank(apart)
            entry: dict[str, Any] = {
                "first": one,
                "other": other,
                "difference": sum(apart) / len(apart) if apart else math.nan,
                "p": p,
                "effect": effect,
            }
            entries.append(entry | {"seeds_needed": seeds_needed(apart, len(pairs)), "differences": apart})
        for entry, corrected in zip(entries, holm([entry["p"] for entry in entries]), strict=True):
            entry["holm"] = corrected
        found[family] = entries
    return found


def table(result: Mapping[str, Any]) -> str:
    """Return the rows with both families of tests, as a Markdown table."""
    best = {test["other"]: test for test in result["tests"]["best"]}
    tuned = {test["first"]: test for test in result["tests"].get("fedavg", [])}
    headings = ["algorithm", "after, %", "worst 10 %, %", f"{result['rows'][0]['label']} is better by", "p, effect"]
    headings += ["better than fedavg by", "p, effect"]
    lines = [f"| {' | '.join(headings)} |", "|---|---:|---:|---:|---:|---:|---:|"]
    for row in result["rows"]:
        after = f"{percent(row['mean']['after'])} ± {percent(row['sd']['after'])}"
        cells = [row["label"], after, percent(row["mean"]["worst10"])]
        for test in (best.get(row["label"]), tuned.get(row["label"])):
            cells += (
                ["", ""] if test is None else [f"{100 * test['difference']:+.1f}", f"{test['holm']:.2g}, {test['effect']:+.2f}"]
            )
        lines.append(f"| {' | '.join(cells)} |")
    for row in result["baselines"]:
        scores = f"{percent(row['mean']['after'])} | {percent(row['mean'].get('worst10'))}"
        lines.append(f"| {row['baseline']} (no training) | {scores} | | | | |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
