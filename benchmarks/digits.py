"""Meta-learning on `digits`: the whole family and FedAvg + fine-tuning, with the defaults.

56 devices, each with five of ten digits under its own labels and 8x8 pixels rotated by its own
angle. FedAvg takes part twice: with the local rate that the data set recommends (0.3), which suits
it better, and with a usual one (0.1). The rate and the number of steps of fine-tuning are chosen on
validation tasks for every algorithm alike. All variants of a seed share their split, so differences
are taken within a seed.
"""

from typing import Any

from benchmarks.floor import NAME, floor
from benchmarks.runner import Plan, Variant, average, by_label, finish, goal, parser, run_all, table

USUAL = "fedavg, lr 0.1"
OTHERS = ("protonet", "metasgd", "anil", "perfedavg", "imaml", "pfedme", "heads", "local")
PLAN = Plan(
    name="digits",
    claim="after adaptation maml reaches 82 % on devices it never saw, 8 points more than fedavg with tuned fine-tuning",
    dataset="digits",
    rounds=100,
    variants=(
        Variant("maml", "maml"),
        Variant("reptile", "reptile"),
        Variant("fomaml", "fomaml"),
        Variant("fedavg", "fedavg"),
        Variant(USUAL, "fedavg", ("inner-lr=0.1",)),
        *(Variant(name, name) for name in OTHERS),
    ),
    nodes=1,
    in_process=True,
)


def main() -> None:
    arguments = parser(PLAN.claim, PLAN.name, seeds=range(5)).parse_args()
    result = run_all(PLAN, arguments.seeds, fresh=arguments.fresh, jobs=arguments.jobs)
    result["floors"][NAME] = floor(PLAN, arguments.seeds)
    result["differences"] = {other["label"]: difference(result, "maml", other["label"]) for other in result["variants"][1:]}
    reached = by_label(result, "maml")["mean"]["after"]
    goal(result, "maml after adaptation >= 0.82", reached, met=reached >= 0.82)
    for label in ("fedavg", USUAL):
        gained = result["differences"][label]["mean"]["after"]
        goal(
            result,
            f"maml at least 0.08 above {label}, fine-tuned with the rate chosen on validation tasks",
            gained,
            met=gained >= 0.08,
        )
    lines = [f"| {label} | {100 * d['mean']['after']:+.1f} ± {_sd(d)} |" for label, d in result["differences"].items()]
    finish(result, "\n".join([table(result), "", "| maml minus | points, same seed |", "|---|---:|", *lines]))


def difference(result: dict[str, Any], one: str, other: str) -> dict[str, Any]:
    """Return the accuracy of `one` minus that of `other` after adaptation, seed by seed."""
    pairs = zip(by_label(result, one)["runs"], by_label(result, other)["runs"], strict=True)
    runs = [{"seed": a["seed"], "after": a["after"] - b["after"]} for a, b in pairs]
    return {"runs": runs, **average(runs, ["after"])}


def _sd(difference: dict[str, Any]) -> str:
    sd = difference["sd"]["after"]
    return "-" if sd is None else f"{100 * sd:.1f}"


if __name__ == "__main__":
    main()
