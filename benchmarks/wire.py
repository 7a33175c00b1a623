"""Cost of smaller updates: the same run with every `update-dtype`, on `uji` and on Omniglot, and the bytes sent up.

`uji`: MAML and prototypical networks on writers as in benchmarks/uji.py, ten seeds. Omniglot: 5-way
1-shot prototypical networks as in benchmarks/omniglot.py, for a tenth of its rounds. The server
still sends float32, so only the bytes up shrink.

Scores differ between two runs of equal quality as well, since every rounding changes the course of
training. A seed has the same split and draws with every kind, so differences are taken seed by
seed, and their standard error shows the part of chance. A control for MAML, which is most sensitive
to rounding, sends float32 and takes steps that are 0.1 % longer.
"""

import json
import math
import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks import omniglot, uji
from benchmarks.runner import RESULTS, Plan, Variant, finish, goal, parser, percent, run_all

MOST = 0.005
"""Largest acceptable loss of accuracy, as a fraction."""
HELD_TO_IT = ("bfloat16", "int8")
KINDS = ("float32", *HELD_TO_IT)
FEW_SEEDS, MANY_SEEDS = (0, 1), tuple(range(10))
CONTROL = "float32, `outer-lr` 0.1 % larger", "outer-lr=0.003003"
"""A change as small as rounding that loses nothing: its difference from float32 is chance."""


def plan(name: str, of: Plan, label: str, rounds: int, kinds: tuple[str, ...], *controls: tuple[str, str]) -> Plan:
    """Return one variant of another benchmark's plan with each `update-dtype` of `kinds` and each setting of `controls`."""
    like = next(variant for variant in of.variants if variant.label == label)
    changes = [(kind, f"update-dtype={kind}") for kind in kinds]
    changes[1:1] = controls
    variants = tuple(Variant(label, like.algorithm, (*like.settings, setting)) for label, setting in changes)
    claim = "bfloat16 and int8 cost at most half a point of accuracy"
    return Plan(name, claim, of.dataset, rounds, variants, of.settings, of.nodes, of.in_process)


def loss(plain: Mapping[str, Any], variant: Mapping[str, Any]) -> tuple[float, float]:
    """Return the fraction by which the accuracy falls, mean over seeds, and its standard error."""
    after = {run["seed"]: run["after"] for run in plain["runs"]}
    lost = [after[run["seed"]] - run["after"] for run in variant["runs"]]
    return statistics.mean(lost), statistics.stdev(lost) / math.sqrt(len(lost)) if len(lost) > 1 else 0.0


PLANS = {
    "uji, protonet": (
        plan("wire-uji-protonet", uji.PLAN, "protonet", uji.PLAN.rounds, (*KINDS, "float16", "top-k")),
        MANY_SEEDS,
    ),
    "uji, maml": (plan("wire-uji", uji.PLAN, "maml", uji.PLAN.rounds, KINDS, CONTROL), MANY_SEEDS),
    "omniglot, protonet": (plan("wire-omniglot", omniglot.plan(5, 1), "protonet", 1600, KINDS), FEW_SEEDS),
}


def main() -> None:
    arguments = parser("what smaller updates cost in accuracy, and what they save", "wire", seeds=MANY_SEEDS)
    arguments.add_argument("--part", choices=sorted(PLANS), help="measure one part, the others stay as they were measured last")
    chosen = arguments.parse_args()
    file = RESULTS / "wire.json"
    before = json.loads(file.read_text(encoding="utf-8")) if chosen.part and file.is_file() else {}
    result: dict[str, Any] = {"schema": 1, "benchmark": "wire", "goals": []}
    lines = ["| data | update-dtype | seeds | after, % | against float32, points | up, bytes per round | times fewer |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|")
    for name, (of, seeds) in PLANS.items():
        some = [seed for seed in seeds if seed in chosen.seeds]
        if some and chosen.part in (None, name):
            result[name] = run_all(of, some, fresh=chosen.fresh, jobs=chosen.jobs)
        elif name in before:
            result[name] = before[name]
        if name in result:
            lines += rows(result, name)
    finish(result, "\n".join(lines))


def rows(result: dict[str, Any], name: str) -> list[str]:
    """Return the lines of one part, and add its goals to the result."""
    lines = []
    plain = result[name]["variants"][0]
    for variant in result[name]["variants"]:
        rounds = variant["configuration"]["rounds"]
        up, most = (sum(run["bytes"]["up"] for run in side["runs"]) / len(side["runs"]) / rounds for side in (variant, plain))
        lost, error = loss(plain, variant)
        variant["lost"] = {"mean": lost, "standard_error": error}
        score = f"{percent(variant['mean']['after'])} ± {percent(variant['sd']['after'])}"
        against = f"{-100 * lost:+.1f} ± {100 * error:.1f}" if variant is not plain else ""
        seeds = len(variant["runs"])
        lines.append(f"| {name} | {variant['label']} | {seeds} | {score} | {against} | {up:.0f} | {most / up:.1f} |")
        if variant["label"] in HELD_TO_IT:
            goal(result, f"{name}, {variant['label']}: loses at most {100 * MOST:g} points", 100 * lost, met=lost <= MOST)
    return lines


if __name__ == "__main__":
    main()
