"""An assistant that learns its user's commands: unseen intents of CLINC150 over a pretrained MiniLM, few examples of each.

A user has intents of their own under labels of their own; 100 intents train, 10 validate, and users of 40 unseen ones are
tested. Frozen: prototypes on the encoder as it is. Centred: moved by the mean of the training intents. Residual: the identity
plus a trained map. LoRA: a low-rank adapter in the encoder (rank 8 on query and value, 73,728 of 22.7 million numbers).

    python -m benchmarks.intents --cell 20w1s
    python -m benchmarks.intents --cell 20w1s --out-of-scope

Needs the data file clinc150_intents.json.gz and the packages of `benchmarks/pretrained.py`.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from benchmarks.pretrained import minilm, without_place
from benchmarks.runner import RAW, RESULTS, Plan, Variant, average, by_label, finish, goal, parser, run_all, table
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.datasets.base import generator, resolve_data_dir
from quickbloom.common.datasets.intents import Intents, IntentsOptions
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.maths.params import Params
from quickbloom.common.personal import checkpoint
from quickbloom.server_app.comparing.batch import Run

CELLS = {"5w1s": (5, 1), "20w1s": (20, 1), "5w5s": (5, 5), "20w5s": (20, 5)}
MODEL_BYTES = 22_713_216 * 4
SHARE = 0.004
"""Largest share of the model's size that may travel to or from a node in a round."""
# Distances of vectors of length 1 are small: over 0.1 they decide.
SHARP = ("protonet.temperature=0.1",)
WIDE = {1: 60, 5: 25}
"""Intents of a training episode of the adapter, by shots: as many sentences as three episodes of 20 intents, one of each.

A sentence is told from more others at the same cost.
"""


def plan(cell: str) -> Plan:
    """Return the runs of one cell."""
    ways, shots = CELLS[cell]
    directory = str(minilm())
    encoder, adapter = (
        (f"intents.encoder=sentence:{directory}",),
        (
            *(f"intents.tokenizer={directory}", f"transformer.directory={directory}", "intents.max-length=16"),
            *("model=transformer", "transformer.lora-rank=8", "transformer.unit=true", "transformer.centre=true"),
            "baselines=false",
        ),
    )
    # Episodes of 20 intents, whatever is tested; one in a round, unless a variant says otherwise.
    episodes = ("tasks-per-round=1", "intents.train-ways=20", "evaluate-every=25", "outer-decay=true", "keep=best")
    # Twice the validation users, asked often: they choose the round.
    wide = (f"intents.train-ways={WIDE[shots]}", "intents.validation-clients=20", "evaluate-every=10")
    return Plan(
        name=f"intents-{cell}",
        claim=f"{ways}-way {shots}-shot on unseen intents: a federated adapter beats the frozen encoder",
        dataset="intents",
        rounds=100,
        variants=(
            Variant("frozen", "protonet", (*encoder, "intents.centre=false", "keep=best", "outer-lr=1e-9"), rounds=1),
            Variant("frozen, centred", "protonet", (*encoder, "keep=best", "outer-lr=1e-9"), rounds=1),
            Variant("residual", "protonet", (*encoder, *episodes, "outer-lr=1e-3"), rounds=300),
            Variant(
                "protonet, LoRA",
                "protonet",
                (*adapter, *episodes, *SHARP, *wide, "outer-lr=3e-3"),
                rounds=60 if shots == 1 else 30,
            ),
            Variant(
                "protomaml, LoRA",
                "protomaml",
                (
                    *(*adapter, *episodes, "outer-lr=1e-3", "protomaml.temperature=0.1"),
                    *("inner-lr=0.01", "inner-steps=2", "adapt-steps=3", "adapt-lrs=0.003,0.01", "evaluate-every=30"),
                ),
                rounds=60,
            ),
            Variant(
                "fomaml, LoRA",
                "fomaml",
                (*adapter, *episodes, "inner-lr=0.1", "inner-steps=5", "zero-head=true", "adapt-steps=10", "adapt-lrs=0.1,1"),
                rounds=100,
            ),
            Variant(
                "fedavg, LoRA", "fedavg", (*adapter, *episodes, "inner-lr=0.1", "adapt-steps=10", "adapt-lrs=0.1,1"), rounds=100
            ),
        ),
        settings=(
            *(f"intents.ways={ways}", f"intents.shots={shots}", "intents.query-shots=2", "adapt-steps=1"),
            *("intents.test-episodes=2", "chunk-size=1", "checkpoint-every=0"),
        ),
        nodes=1,
        in_process=True,
    )


def largest_message(result: Any, label: str) -> float:
    """Return the bytes to a node in a round as a share of the model's size: in each round one node was asked once."""
    variant = by_label(result, label)
    numbers = [run["bytes"]["up"] / variant["configuration"]["rounds"] for run in variant["runs"]]
    return float(np.max(numbers)) / MODEL_BYTES


def out_of_scope(run: Run, users: int = 20, sentences: int = 200) -> dict[str, float]:
    """Return how well an adapted model tells sentences of a user's intents from others: AUROC, and errors at a threshold.

    The score of a sentence is its distance to the nearest prototype. The threshold is the one that the validation users choose:
    there as many own sentences are refused as others are let in.
    """
    config = parse_run_config(json.loads((run.directory / "config.json").read_text())).resolved()
    options = config.table("intents")
    assert isinstance(options, IntentsOptions)
    data = Intents(options, resolve_data_dir(config.data_dir))
    found = checkpoint.load(run.directory, lambda _: None)
    algorithm = build_algorithm(config, data.spec)
    theta = found.meta
    beside = data.out_of_scope
    own, others = _distances(algorithm, theta, data, "validation", beside[:sentences], users)
    candidates = np.quantile(np.concatenate([own, others]), np.linspace(0, 1, 401))
    threshold = min(candidates, key=lambda at: abs((own > at).mean() - (others <= at).mean()))
    own, others = _distances(algorithm, theta, data, "test", beside[sentences : 2 * sentences], users)
    labels = np.concatenate([np.zeros(len(own)), np.ones(len(others))])
    return {
        "auroc": float(roc_auc_score(labels, np.concatenate([own, others]))),
        "own_refused": float((own > threshold).mean()),
        "others_let_in": float((others <= threshold).mean()),
    }


def _distances(
    algorithm: Any, theta: Params, data: Intents, split: str, beside: torch.Tensor, users: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the distances to the nearest prototype of own query sentences and of sentences beside all intents."""
    own, others = [], []
    with torch.no_grad():
        foreign = algorithm.learner.apply(theta, beside)
        for task_id in [task.task_id for task in data.tasks() if task.split == split][:users]:
            draw = data.test_draws(task_id)[0]
            *_, personal = algorithm.adaptation_path(theta, draw.support, 0.0, 1)
            prototypes = personal["prototypes"][personal["known"] > 0]
            own.append(torch.cdist(algorithm.learner.apply(theta, draw.query.x), prototypes).amin(dim=1).numpy())
            chosen = generator(0, "beside", task_id).permutation(len(foreign))[: len(own[-1])]
            others.append(torch.cdist(foreign[chosen], prototypes).amin(dim=1).numpy())
    return np.concatenate(own), np.concatenate(others)


def _parser() -> argparse.ArgumentParser:
    arguments = parser("unseen intents over a pretrained encoder", "intents")
    arguments.add_argument("--cell", choices=list(CELLS), default="20w1s", help="ways and shots; default: %(default)s")
    arguments.add_argument(
        "--labels", nargs="+", default=[], metavar="LABEL", help="run these variants alone; others stay as they are"
    )
    arguments.add_argument("--out-of-scope", action="store_true", help="also tell sentences that ask for none of the intents")
    return arguments


def main() -> None:
    chosen = _parser().parse_args()
    the_plan = plan(chosen.cell)
    if chosen.labels:
        kept = tuple(variant for variant in the_plan.variants if variant.label in chosen.labels)
        the_plan = Plan(**{**vars(the_plan), "variants": kept})
    result = run_all(the_plan, chosen.seeds, fresh=chosen.fresh, jobs=chosen.jobs)
    if chosen.labels:
        _keep_others(result, [variant.label for variant in plan(chosen.cell).variants])
    if chosen.out_of_scope:
        result["out_of_scope"] = result.get("out_of_scope", {}) | {
            variant.label: _out_of_scope(the_plan, variant, chosen.seeds)
            for variant in the_plan.variants
            if "net" in variant.algorithm
        }
    _goals(result, chosen.cell)
    finish(without_place(result, minilm()), table(result))
    for label, found in result.get("out_of_scope", {}).items():
        print(f"{label}: out of scope, {', '.join(f'{name} {value:.3f}' for name, value in found['mean'].items())}")


def _keep_others(result: dict[str, Any], labels: Sequence[str]) -> None:
    """Add the variants of the result file that were not run now, if they have the same seeds: every run names its commit."""
    path = RESULTS / f"{result['benchmark']}.json"
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"seeds": None}
    if before["seeds"] != result["seeds"]:
        return
    now = {variant["label"]: variant for variant in result["variants"]}
    both = {variant["label"]: variant for variant in before["variants"]} | now
    result["variants"] = [both[label] for label in labels if label in both]
    result["commit"] = ", ".join(sorted({run["commit"] for variant in result["variants"] for run in variant["runs"]}))
    if "out_of_scope" in before:
        result["out_of_scope"] = {label: found for label, found in before["out_of_scope"].items() if label not in now}


def _out_of_scope(the_plan: Plan, variant: Variant, seeds: Sequence[int]) -> dict[str, Any]:
    found = [out_of_scope(Run(the_plan.setup(variant), seed, RAW / the_plan.name)) for seed in seeds]
    return average(found, ("auroc", "own_refused", "others_let_in"))


def _goals(result: dict[str, Any], cell: str) -> None:
    labels = [variant["label"] for variant in result["variants"]]
    if not {"frozen, centred", "protonet, LoRA"} <= {*labels}:
        return
    gain = by_label(result, "protonet, LoRA")["mean"]["after"] - by_label(result, "frozen, centred")["mean"]["after"]
    least = 0.02 if cell == "20w1s" else 0.0
    goal(result, f"the adapter beats the frozen centred encoder by at least {least}", gain, met=gain >= least)
    share = largest_message(result, "protonet, LoRA")
    goal(result, f"bytes from a node in a round: at most {SHARE} of the model's", share, met=share <= SHARE)


if __name__ == "__main__":
    main()
