"""Learning where the tutorial's own code fails: Reptile and FO-MAML on the tutorial's shifted Gaussians.

30 clients follow the same rule: there is nothing to personalise, so this is a plumbing test. The
Bayes-optimal rule reaches 67.3 %. The code printed in Flower's federated meta-learning tutorial
ends at 7.4 % (Reptile) and 5.5 % (FO-MAML) after its 50 rounds. Scores are on the test rows of
clients that took no part in training.
"""

from benchmarks.runner import Plan, Variant, by_label, finish, goal, parser, run_all, table

BAYES = 0.673
OTHERS = ("fedavg", "maml", "protonet", "heads", "local")
PLAN = Plan(
    name="gaussian",
    claim="in 50 rounds reptile and fomaml reach 61 % on held-out clients of the tutorial's data (best possible: 67.3 %)",
    dataset="gaussian",
    rounds=50,
    variants=(
        Variant("reptile", "reptile", (), {"tutorial's code": 0.074, "Bayes-optimal": BAYES}),
        Variant("fomaml", "fomaml", ("inner-lr=0.05", "inner-steps=1"), {"tutorial's code": 0.055, "Bayes-optimal": BAYES}),
        *(Variant(name, name, (), {"Bayes-optimal": BAYES}) for name in OTHERS),
    ),
    nodes=1,
    in_process=True,
)


def main() -> None:
    arguments = parser(PLAN.claim, PLAN.name, seeds=range(5)).parse_args()
    result = run_all(PLAN, arguments.seeds, fresh=arguments.fresh, jobs=arguments.jobs)
    for label in ("reptile", "fomaml"):
        reached = by_label(result, label)["mean"]["after"]
        goal(result, f"{label} after adaptation >= 0.61 on held-out clients", reached, met=reached >= 0.61)
    finish(result, table(result))


if __name__ == "__main__":
    main()
