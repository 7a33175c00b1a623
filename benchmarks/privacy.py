"""Cost of task-level differential privacy: FedAvg on 2,000 clients of the tutorial's generated data.

1,700 clients train, about 100 in a round by Poisson sampling; 100 choose the rate and steps of
adaptation; 200 are the new users. The noise is new in every run, so a repeated run gives other
figures within the spread.
"""

from benchmarks.runner import Plan, Variant, by_label, finish, goal, parser, percent, run_all, table

PLAN = Plan(
    name="privacy",
    claim="with 1,700 training tasks, epsilon below 4 at delta 1e-5 costs less than 2 points of accuracy",
    dataset="gaussian",
    rounds=50,
    variants=(
        Variant("no privacy", "fedavg"),
        Variant("noise 1, clip 1", "fedavg", ("privacy.noise-multiplier=1", "privacy.clip=1")),
        Variant(
            "noise 1, clip at the median",
            "fedavg",
            ("privacy.noise-multiplier=1", "privacy.clip=1", "privacy.clip-quantile=0.5"),
        ),
        Variant("noise 3, clip 1", "fedavg", ("privacy.noise-multiplier=3", "privacy.clip=1")),
    ),
    settings=(
        *("gaussian.clients=2000", "tasks-per-round=100", "validation-tasks=100", "test-tasks=200"),
        # The same split with and without privacy, so that only the noise differs.
        *("split=exact", "adapt-steps=5", "evaluate-every=0"),
    ),
    nodes=1,
    in_process=True,
)


def main() -> None:
    arguments = parser(PLAN.claim, PLAN.name, seeds=range(3)).parse_args()
    result = run_all(PLAN, arguments.seeds, fresh=arguments.fresh, jobs=arguments.jobs)
    clean, private = (by_label(result, label) for label in ("no privacy", "noise 1, clip 1"))
    epsilon = max(run["privacy"]["epsilon"] for run in private["runs"])
    lost = clean["mean"]["after"] - private["mean"]["after"]
    goal(result, "noise 1, clip 1: epsilon at delta 1e-5 below 4", epsilon, met=epsilon < 4)
    goal(result, "noise 1, clip 1: costs at most 0.02 of accuracy", lost, met=lost <= 0.02)
    spent = [f"| {v['label']} | {epsilon_of(v)} | {percent(v['mean']['after'])} |" for v in result["variants"]]
    finish(result, "\n".join([table(result), "", "| variant | epsilon at delta 1e-5 | after, % |", "|---|---:|---:|", *spent]))


def epsilon_of(variant: dict[str, object]) -> str:
    runs = variant["runs"]
    assert isinstance(runs, list)
    return f"{runs[0]['privacy']['epsilon']:.2f}" if runs[0]["privacy"] else "unbounded"


if __name__ == "__main__":
    main()
