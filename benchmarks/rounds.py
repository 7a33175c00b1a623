"""Time per round and for the whole command: `quickbloom run --runtime simulation`, two simulated nodes on one machine.

Seconds per round are those of history.jsonl from the second round on, since the first one starts
the nodes' processes; every tenth round also evaluates the validation tasks. "Whole command" is the
wall time from the shell, Flower's start included. Seeds serve as repetitions. Finished runs are
reused: use --fresh to measure again.
"""

from typing import Any

from benchmarks.runner import Plan, Variant, finish, goal, parser, run_all
from quickbloom.common.config.run import RunConfig

DEFAULT = RunConfig()
PLAN = Plan(
    name="rounds",
    claim="a round of `digits` on two nodes takes less than 0.3 s, and the whole command less than 60 s in Flower's simulation",
    dataset=DEFAULT.dataset,
    rounds=DEFAULT.rounds,
    variants=(Variant(f"{DEFAULT.algorithm} (the default)", DEFAULT.algorithm), Variant("maml", "maml")),
    nodes=DEFAULT.min_nodes,
)


def main() -> None:
    arguments = parser(PLAN.claim, PLAN.name).parse_args()
    result = run_all(PLAN, arguments.seeds, fresh=arguments.fresh)
    for variant in result["variants"]:
        median = variant["mean"]["round_median"]
        goal(result, f"{variant['label']}: median seconds per round < 0.3", median, met=median < 0.3)
    slowest = max(run["wall"] for run in result["variants"][0]["runs"])
    goal(result, "wall time of `quickbloom run --runtime simulation` < 60 s, slowest run", slowest, met=slowest < 60)
    finish(result, times(result))


def times(result: dict[str, Any]) -> str:
    """Return the median over the repetitions' own figures, with their range: times have outliers upwards only."""
    lines = ["| variant | round, median, s | round, 90 %, s | first round, s | training, s | whole command, s |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for variant in result["variants"]:
        names = ("round_median", "round_p90", "round_first", "total", "wall")
        cells = [_range([run[name] for run in variant["runs"]], 1 if name in ("total", "wall") else 3) for name in names]
        lines.append(f"| {variant['label']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _range(values: list[float], digits: int) -> str:
    middle = sorted(values)[len(values) // 2]
    return f"{middle:.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


if __name__ == "__main__":
    main()
