"""Next character by role: does one of Shakespeare's roles need its own model?

A device is a role with at least 2,000 characters; rates and steps of fine-tuning are chosen on
validation roles. The baseline to beat is the common model without any adaptation ("before"), and
below that always predicting the commonest character, a space. Needs `shakespeare_by_role.json.gz`
in QUICKBLOOM_DATA_DIR.
"""

from benchmarks.runner import Plan, Variant, finish, parser, run_all, table

SGD = ("inner-lr=3", "inner-steps=10", "adapt-lrs=0.1,0.3,1,3")
GRADIENT = ("inner-lr=0.3", "inner-steps=1", "outer-lr=0.01", "outer-decay=true", "adapt-lrs=0.1,0.3,1")
PLAN = Plan(
    name="shakespeare",
    claim="next-character accuracy on unseen roles, before and after adapting to what the role said before",
    dataset="shakespeare",
    rounds=100,
    variants=(
        Variant("fedavg", "fedavg", SGD),
        Variant("reptile", "reptile", SGD),
        Variant("fomaml", "fomaml", GRADIENT),
        Variant("maml", "maml", GRADIENT),
    ),
    settings=(
        *("shakespeare.support-examples=40", "shakespeare.query-examples=40", "tasks-per-round=50", "chunk-size=25"),
        *("adapt-steps=5", "evaluate-every=0", "checkpoint-every=0"),
    ),
    nodes=1,
    in_process=True,
)


def main() -> None:
    arguments = parser(PLAN.claim, PLAN.name, seeds=(0, 1)).parse_args()
    result = run_all(PLAN, arguments.seeds, fresh=arguments.fresh, jobs=arguments.jobs)
    finish(result, table(result))


if __name__ == "__main__":
    main()
