"""What smaller updates cost: the same run with every `update-dtype`, on `uji` and on Omniglot, and the bytes that went up.

`uji`: MAML on writers as in benchmarks/uji.py, and prototypical networks, which cost so little that there are many seeds of
them. Omniglot: 5-way 1-shot prototypical networks as in benchmarks/omniglot.py, for a tenth of its rounds. What the server
sends stays float32, so only the bytes up get fewer. Scores differ between two runs of the same accuracy as well, since every
rounding sends the training another way; a seed has the same split and draws with every kind, so differences are taken seed by
seed, and their standard error says how much of them is chance.
"""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks import omniglot, uji
from benchmarks.runner import Plan, Variant, finish, goal, parser, percent, run_all

MOST = 0.005
"""By which fraction the accuracy may fall."""
HELD_TO_IT = ("bfloat16", "int8")
KINDS = ("float32", *HELD_TO_IT)
FEW_SEEDS, MANY_SEEDS = (0, 1), tuple(range(10))


def plan(name: str, of: Plan, label: str, rounds: int, kinds: tuple[str, ...]) -> Plan:
    """One variant of another benchmark's plan with each `update-dtype` of `kinds`."""
    like = next(variant for variant in of.variants if variant.label == label)
    variants = tuple(Variant(kind, like.algorithm, (*like.settings, f"update-dtype={kind}")) for kind in kinds)
    claim = "bfloat16 and int8 cost at most half a point of accuracy"
    return Plan(name, claim, of.dataset, rounds, variants, of.settings, of.nodes, of.in_process)


def loss(plain: Mapping[str, Any], variant: Mapping[str, Any]) -> tuple[float, float]:
    """By which fraction the accuracy falls, mean over seeds, and its standard error."""
    after = {run["seed"]: run["after"] for run in plain["runs"]}
    lost = [after[run["seed"]] - run["after"] for run in variant["runs"]]
    return statistics.mean(lost), statistics.stdev(lost) / math.sqrt(len(lost)) if len(lost) > 1 else math.nan


def main() -> None:
    arguments = parser("what smaller updates cost in accuracy, and what they save", "wire").parse_args()
    plans = {
        "uji, maml": (plan("wire-uji", uji.PLAN, "maml", uji.PLAN.rounds, (*KINDS, "float16", "top-k")), arguments.seeds),
        "uji, protonet": (plan("wire-uji-protonet", uji.PLAN, "protonet", uji.PLAN.rounds, KINDS), MANY_SEEDS),
        "omniglot, protonet": (plan("wire-omniglot", omniglot.plan(5, 1), "protonet", 1600, KINDS), FEW_SEEDS),
    }
    result: dict[str, Any] = {"schema": 1, "benchmark": "wire", "goals": []}
    lines = ["| data | update-dtype | seeds | after, % | against float32, points | up, bytes per round | times fewer |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|")
    for name, (of, seeds) in plans.items():
        part = run_all(of, seeds, fresh=arguments.fresh, jobs=arguments.jobs)
        result[name] = part
        result |= {fact: part[fact] for fact in ("machine", "versions", "commit", "date")}
        plain = part["variants"][0]
        for variant in part["variants"]:
            rounds = variant["configuration"]["rounds"]
            up, most = (
                sum(run["bytes"]["up"] for run in side["runs"]) / len(side["runs"]) / rounds for side in (variant, plain)
            )
            lost, error = loss(plain, variant)
            variant["lost"] = {"mean": lost, "standard_error": error}
            score = f"{percent(variant['mean']['after'])} ± {percent(variant['sd']['after'])}"
            against = f"{-100 * lost:+.1f} ± {100 * error:.1f}" if variant is not plain else ""
            lines.append(f"| {name} | {variant['label']} | {len(seeds)} | {score} | {against} | {up:.0f} | {most / up:.1f} |")
            if variant["label"] in HELD_TO_IT:
                goal(result, f"{name}, {variant['label']}: loses at most {100 * MOST:g} points", 100 * lost, met=lost <= MOST)
    finish(result, "\n".join(lines))


if __name__ == "__main__":
    main()
