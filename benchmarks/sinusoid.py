"""Sinusoid regression, MAML's table: mean squared error of unseen waves after 1, 5 and 10 steps on 5 points.

Every training episode is a new wave, 25 in a round, with 5 support and 10 query points; 600 waves are the test. MAML adapts
with rate 0.01, as in the paper; the rate of the two baselines is chosen on validation waves. "Pretraining" is the paper's
baseline, one model for all waves: FedAvg with a single full step and the server's Adam on its gradient.
"""

from typing import Any

from benchmarks.runner import Plan, Variant, by_label, finish, goal, parser, run_all

STEPS = (0, 1, 5, 10)
PAPER = {"maml": (0.67, 0.38, 0.35), "pretraining": (2.41, 2.23, 2.19)}
"""Finn et al. 2017, figure 3 and appendix: after 1, 5 and 10 steps."""

ADAM = ("outer-optimizer=adam", "outer-lr=0.003", "outer-decay=true")
FIXED = ("adapt-lrs=0.01",)
TUNED = ("adapt-lrs=0.001,0.003,0.01,0.03,0.1",)
PLAN = Plan(
    name="sinusoid",
    claim="MAML reaches its published error on unseen sine waves, less than half of pretraining's",
    dataset="sinusoid",
    rounds=12_000,
    variants=(
        Variant("maml", "maml", (*ADAM, *FIXED, "inner-steps=1")),
        Variant("fedavg", "fedavg", (*TUNED, "inner-lr=0.01")),
        Variant("pretraining", "fedavg", (*ADAM, *TUNED, "inner-steps=1", "batch-size=0")),
    ),
    settings=(
        *("sinusoid.fresh-tasks=true", "sinusoid.shots=5", "sinusoid.query-shots=10", "sinusoid.clients=800"),
        *("tasks-per-round=25", "validation-tasks=100", "test-tasks=600", "evaluate-every=2000", "checkpoint-every=0"),
    ),
    nodes=1,
    in_process=True,
)


def main() -> None:
    arguments = parser(PLAN.claim, PLAN.name, seeds=(0,)).parse_args()
    result = run_all(PLAN, arguments.seeds, fresh=arguments.fresh, jobs=arguments.jobs)
    curves = {variant["label"]: variant["curve"] for variant in result["variants"]}
    seconds = by_label(result, "maml")["mean"]["cpu"]
    for step, most in ((1, 0.75), (10, 0.40)):
        reached = curves["maml"][step]
        goal(result, f"maml, {step} steps: at most {most} within a CPU hour ({seconds:.0f} s)", reached, met=reached <= most)
        goal(
            result,
            f"maml, {step} steps: less than half of pretraining's error",
            reached / curves["pretraining"][step],
            met=reached < curves["pretraining"][step] / 2,
        )
    finish(result, table(result))


def table(result: dict[str, Any]) -> str:
    """Return the mean squared error at a few steps, as a Markdown table."""
    lines = ["| variant | before | 1 step | 5 steps | 10 steps | chosen rate x steps | there | CPU s | paper, 1 / 5 / 10 |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|---|")
    for variant in result["variants"]:
        # A rate that suits few steps may be too large for many.
        errors = " | ".join(f"{error:.3f}" if (error := variant["curve"][step]) < 1000 else "diverges" for step in STEPS)
        chosen = variant["runs"][0]["chosen"]
        rate = f"{chosen['adapt_lr']:g} x {chosen['adapt_steps']} | {variant['mean']['after']:.3f}"
        known = " / ".join(map(str, PAPER.get(variant["label"], ())))
        lines.append(f"| {variant['label']} | {errors} | {rate} | {variant['mean']['cpu']:.0f} | {known} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
