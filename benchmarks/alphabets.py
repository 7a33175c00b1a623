"""Omniglot within alphabets: 20-way one-shot on alphabets unseen in training, as in Lake et al. 2015.

A device is an alphabet. The 30 background alphabets train and choose (those with fewer than 20
characters are left out); the 20 evaluation alphabets are the unseen devices. The 20 characters of
an episode come from one alphabet, which makes it far harder than the unstructured benchmark. In
training, characters are rotated by quarter turns. Batch norm uses the batch at hand, so scores are
transductive. Every image is moved and scaled so that its ink fills the frame (`fit`). Adaptation of
`protonet` is scored after one step, which computes the prototypes, and after five more that move
them by the query images at hand (`refine`).
"""

from benchmarks.floor import NAME, floor
from benchmarks.runner import Plan, Variant, finish, goal, parser, run_all, run_only, table

KNOWN = {"people": 0.955, "simple ConvNet": 0.865, "modified Hausdorff distance": 0.612}
"""Accuracies in Lake et al. 2015, on trials chosen by its authors."""

# One alphabet in a round, for many rounds; its characters are rotated and mirrored together, which makes more alphabets.
PROTONET = (
    *("protonet.pairs=true", "protonet.embedding=128", "protonet.temperature=10", "outer-lr=0.002", "outer-decay=true"),
    *(
        "adapt-steps=6",
        "protonet.refine=true",
        "validation-tasks=4",  # two are too few: one of those that seed 0 draws is Braille
        "tasks-per-round=1",
        "chunk-size=1",
        "omniglot.rotations=together",
        "omniglot.warp=true",
    ),
    *("model=resnet", "resnet.channels=32,48,96,128", "resnet.norm=batch"),
)
# Local rate and downsampling were chosen on validation alphabets; fine-tuning has up to 10 steps to choose from.
FEDAVG = (
    *("zero-head=true", "inner-lr=0.3", "inner-steps=5", "batch-size=20", "adapt-steps=10", "adapt-lrs=0.1,0.3,1"),
    *("tasks-per-round=4", "chunk-size=4", "conv4.filters=32", "conv4.downsample=max-pool", "conv4.norm=batch"),
    *("omniglot.rotations=together", "omniglot.distort=true"),
)
PLAN = Plan(
    name="alphabets",
    claim="20-way one-shot within unseen alphabets: at most 8 % errors",
    dataset="omniglot",
    rounds=1_200,
    variants=(
        Variant("protonet", "protonet", PROTONET, KNOWN, 9_000),
        Variant("fedavg", "fedavg", FEDAVG, {}, 600),
    ),
    settings=(
        *("omniglot.clients=alphabet", "omniglot.official-split=true", "omniglot.leave-out-small=true"),
        *("omniglot.ways=20", "omniglot.query-shots=3", "omniglot.test-episodes=20", "omniglot.fit=true"),
        *("validation-tasks=2", "evaluate-every=1000", "checkpoint-every=500", "transductive=true"),
    ),
    nodes=1,
    in_process=True,
)


def main() -> None:
    arguments = parser(PLAN.claim, PLAN.name, seeds=(0,), has_only=True).parse_args()
    if arguments.only:
        run_only(PLAN, arguments.only, arguments.seeds, fresh=arguments.fresh, jobs=arguments.jobs)
        return
    result = run_all(PLAN, arguments.seeds, fresh=arguments.fresh, jobs=arguments.jobs)
    result["floors"][NAME] = floor(PLAN, arguments.seeds)
    best = max(result["variants"], key=lambda variant: variant["mean"]["after"])
    error = 1 - best["mean"]["after"]
    goal(result, f"error of {best['label']}, the best algorithm: at most 0.08", error, met=error <= 0.08)
    finish(result, table(result))


if __name__ == "__main__":
    main()
