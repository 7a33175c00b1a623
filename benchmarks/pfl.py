"""The usual table of personalised federated learning: seen users of Fashion-MNIST, with PFLlib's network and settings.

20 or 100 users share 70,000 images by a Dirichlet distribution of 0.1; three quarters of each user's images train, one quarter
tests. The network is PFLlib's 4-layer CNN; every round all users train one epoch with batches of 10 at rate 0.005. PFLlib
(Zhang et al. 2025) publishes the best of 2,000 rounds, the mean over test images; here it is the model after the last round, of
far fewer rounds, since one round of all users is 5,250 steps.

    python -m benchmarks.pfl --rounds 10 --jobs 2
    python -m benchmarks.pfl --users 100 --rounds 10 --jobs 2 --seeds 0

`--only` does some rows and adds them to the result file, if that is of the same users, rounds and seeds.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.runner import RAW, RESULTS, BenchmarkError, commit, finish, goal, machine, parser, percent, say
from quickbloom.server_app.comparing.batch import Result, Run, Setup, perform, today

RATE, BATCH, POINTS = 0.005, 10, 0.02
FIGURES = ("weighted", "mean", "sd", "worst10", "cpu", "bytes")
SETTINGS = (
    *("model=cnn", "partition=dirichlet:0.1", "evaluate-users=seen", "validation-tasks=0", "test-tasks=0", "fraction=1.0"),
    *("evaluate-every=0", "baselines=false", "personal=false", "checkpoint-every=0", "chunk-size=1"),
)


@dataclass(frozen=True)
class Row:
    """One line of the table. `published`: PFLlib's accuracy with 20 users; `steps`: of fine-tuning before the test; 0: none.

    A step of fine-tuning is of all training images of a user, at the rate `tuning`.
    """

    label: str
    algorithm: str
    published: float | None = None
    settings: tuple[str, ...] = ()
    steps: int = 0
    tuning: float = 0.1


ROWS = (
    Row("Local", "local", settings=("keep=true",)),
    Row("FedAvg", "fedavg", 0.8585),
    Row("FedAvg + FT", "fedavg", steps=10),
    Row("FedProx", "fedprox", 0.8563, ("strength=0.001",)),
    Row("SCAFFOLD", "scaffold"),
    Row("FedDyn", "feddyn"),
    Row("Per-FedAvg", "perfedavg", 0.9510, ("variant=fo",), steps=1, tuning=RATE),
    Row("pFedMe", "pfedme", 0.9725, ("inner-steps=5", "strength=15", "local-lr=0.005"), steps=5),
    Row("Ditto", "ditto", 0.9747),
    Row("APFL", "apfl", 0.9725),
    Row("FedPer", "heads", 0.9744),
    Row("FedRep", "heads", 0.9756, ("head-epochs=1",)),
    Row("FedBABU", "fedbabu", 0.9746, steps=10),
    Row("LG-FedAvg", "lgfedavg"),
    Row("FedRoD", "fedrod", 0.9752),
    Row("FedALA", "fedala", 0.9766),
    Row("FedProto", "fedproto", 0.9740),
    Row("kNN-Per", "knnper", steps=1),
)
"""Published: PFLlib's page of benchmarks, Fashion-MNIST, practical label skew, 20 clients, 2,000 rounds, the best of them."""


def setup(row: Row, users: int, rounds: int, nodes: int = 1) -> Setup:
    """Return the command of a row, for any seed: in one process, or with so many simulated nodes."""
    own = [f"inner-lr={RATE}", *row.settings]
    own += ["local-epochs=1", f"batch-size={BATCH}"]
    # One run serves all rows that differ only in their fine-tuning.
    alike = [other for other in ROWS if (other.algorithm, other.settings) == (row.algorithm, row.settings)]
    steps = max(1, *(other.steps for other in alike), 0)
    settings = (
        *SETTINGS,
        f"users={users}",
        f"adapt-steps={steps}",
        f"adapt-lrs={row.tuning:g}",
        *(f"{row.algorithm}.{one}" for one in own),
    )
    return Setup(row.algorithm, "fashion-mnist", rounds, settings, nodes, nodes == 1)


def main() -> None:
    commands = parser("seen users of Fashion-MNIST beside published figures", "pfl")
    commands.add_argument(
        "--only", nargs="+", default=[], metavar="LABEL", help="do these rows and keep the others of the result file"
    )
    commands.add_argument("--rounds", type=int, default=10, metavar="N", help="default: %(default)s")
    commands.add_argument("--users", type=int, default=20, metavar="N", help="default: %(default)s")
    chosen = commands.parse_args()
    rows = [row for row in ROWS if not chosen.only or row.label in chosen.only]
    if unknown := sorted(set(chosen.only) - {row.label for row in ROWS}):
        raise SystemExit(f"`--only` must name rows of this table ({', '.join(row.label for row in ROWS)}), got {unknown[0]}")
    name = f"pfl-{chosen.users}"
    result: dict[str, Any] = {"schema": 1, "benchmark": name, "claim": "the usual table, made the usual way"}
    result |= {"users": chosen.users, "rounds": chosen.rounds, "seeds": chosen.seeds, "rows": [], "goals": []}
    found = measured(rows, chosen.users, chosen.rounds, chosen.seeds, chosen.jobs)
    lines = {row.label: line(row, found[row], chosen.users, chosen.rounds) for row in rows}
    lines = earlier(result) | lines
    result |= {"rows": [lines[row.label] for row in ROWS if row.label in lines], "machine": machine(), "date": today()}
    result["commit"] = ", ".join(sorted({run["commit"] for one in result["rows"] for run in one["runs"]}))
    for one in result["rows"] if chosen.users == 20 else ():
        if one["published"] is not None:
            off = statistics.mean(run["weighted"] for run in one["runs"]) - one["published"]
            goal(result, f"{one['label']}: within two points of the published figure", 100 * off, met=abs(off) <= POINTS)
    finish(result, table(result))


def earlier(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the rows of the result file by label, if it is of the same users, rounds and seeds."""
    file = RESULTS / f"{result['benchmark']}.json"
    written = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    alike = all(written.get(key) == result[key] for key in ("schema", "users", "rounds", "seeds"))
    return {row["label"]: row for row in written["rows"]} if alike else {}


def line(row: Row, results: Sequence[Result], users: int, rounds: int) -> dict[str, Any]:
    """Return a row of the result file."""
    runs = [figures(row, done) for done in results]
    return {"label": row.label, "published": row.published, "settings": setup(row, users, rounds).settings, "runs": runs}


def measured(
    rows: Sequence[Row], users: int, rounds: int, seeds: Sequence[int], jobs: int, nodes: int = 1
) -> dict[Row, list[Result]]:
    """Return the results of every row, from runs/benchmarks if finished there."""
    runs = {(row, seed): Run(setup(row, users, rounds, nodes), seed, RAW / "pfl") for row in rows for seed in seeds}
    different = list(dict.fromkeys(runs.values()))

    def on_end(result: Result, kept: bool) -> None:
        if result.code:
            command = " ".join(result.run.setup.command(result.run.seed))
            raise BenchmarkError(f"`{command}` ended with code {result.code}: {result.failure[-600:]}")
        said = result.summary["seen"]["accuracy"]["weighted"]
        say(f"{result.run.setup.algorithm}: {100 * said[0]:.2f} -> {100 * said[-1]:.2f} %{' (kept)' * kept}")

    done = perform(different, jobs, facts={"commit": commit()}, on_end=on_end)
    return {row: [done[runs[row, seed]] for seed in seeds] for row in rows}


def figures(row: Row, result: Result) -> dict[str, Any]:
    """Return what the table shows of one run: at the step of the row, over test images, over users, and the seconds."""
    scores, seconds = result.summary["seen"]["accuracy"], result.summary["seconds"]
    figures = {name: scores[name][row.steps] for name in ("weighted", "mean", "sd", "worst10")}
    facts = {"seed": result.summary["seed"], "commit": result.facts["commit"], "date": result.facts["date"]}
    return {**facts, **figures, "cpu": seconds["cpu"], "bytes": result.summary["bytes"]["up"]}


def table(result: dict[str, Any]) -> str:
    """Return the table of the result file."""
    lines = ["| method | published, % | here, % | over users | spread of users | worst tenth | CPU s | MB up |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|")
    for row in result["rows"]:
        means = {name: statistics.mean(run[name] for run in row["runs"]) for name in FIGURES}
        over_seeds = statistics.stdev(run["weighted"] for run in row["runs"]) if len(row["runs"]) > 1 else None
        here = percent(means["weighted"]) + (f" ± {100 * over_seeds:.1f}" if over_seeds is not None else "")
        cells = [row["label"], percent(row["published"]) if row["published"] else "", here]
        cells += [percent(means[name]) for name in ("mean", "sd", "worst10")]
        cells += [f"{means['cpu']:.0f}", f"{means['bytes'] / 1e6:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
