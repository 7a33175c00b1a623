"""New writers from one example per digit: 10-way 1-shot on the UJI pen digits with a small convolutional network.

40 writers train, 5 choose the rate and the steps of adaptation, 15 are held out. MAML's server
keeps a constant rate, since the default, which falls to 0, did not suffice in so few rounds in
earlier runs on these writers. FedAvg takes part with two local rates. Needs
`uji_digits_by_writer_28.npz` in QUICKBLOOM_DATA_DIR.
"""

from benchmarks.floor import NAME, floor
from benchmarks.runner import Plan, Variant, by_label, finish, goal, parser, percent, run_all, table

PIXELS = {"pixel 1-NN, all 60 writers": 0.793}
PLAN = Plan(
    name="uji",
    claim="from one example per digit a new writer's digits are read with 97.5 % accuracy after at most 10 steps",
    dataset="uji",
    rounds=60,
    variants=(
        Variant("maml", "maml", ("inner-lr=0.3", "outer-lr=0.003", "outer-decay=false"), PIXELS),
        Variant("protonet", "protonet", (), PIXELS),
        Variant("fedavg", "fedavg", ("inner-lr=0.3",), PIXELS),
        Variant("fedavg, lr 0.1", "fedavg", ("inner-lr=0.1",), PIXELS),
    ),
    settings=(
        *("model=conv4", "conv4.filters=32", "uji.augment=true", "chunk-size=16"),
        *("validation-tasks=5", "test-tasks=15", "adapt-steps=10", "evaluate-every=0"),
    ),
    nodes=1,
    in_process=True,
)


def main() -> None:
    arguments = parser(PLAN.claim, PLAN.name, seeds=range(3)).parse_args()
    result = run_all(PLAN, arguments.seeds, fresh=arguments.fresh, jobs=arguments.jobs)
    result["floors"][NAME] = floor(PLAN, arguments.seeds)
    for variant in result["variants"]:
        mean = by_label(result, variant["label"])["mean"]["after"]
        text = f"{variant['label']}: accuracy on held-out writers >= 0.975 (± {percent(variant['sd']['after'])})"
        goal(result, text, mean, met=mean >= 0.975)
    finish(result, table(result))


if __name__ == "__main__":
    main()
