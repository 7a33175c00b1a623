"""Do lying nodes spoil the model? 20 % of the training nodes attack in every round, on `digits` and `uji`, under several rules.

One task is one node. The liars follow the protocol (same keys, shapes, counts) and send, in every round:

    sign flip      minus their true meta-gradient
    scaling        100 times their true meta-gradient
    noise          Gaussian noise, 10 times as large as it
    NaN            nothing but NaN, as a defect would
    label flip     the true meta-gradient of tasks whose query labels are shifted by one (the support labels are right)
    collusion, far one update for all: opposite to the honest mean, 10 times as long as an honest meta-gradient
    collusion      one update for all: minus 10 times the honest mean, which they know; hidden if nodes differ much
    little         one update for all: the honest mean less z honest standard deviations in every number, with the largest z
                   that still hides in the crowd (Baruch, Baruch, Goldberg 2019, "A Little Is Enough", Algorithm 3)
    inner product  one update for all: minus twice the honest mean, hidden by the spread of honest nodes (Xie, Koyejo, Gupta
                   2020, "Fall of Empires")
    min-max        one update for all: the honest mean m plus gamma p, with the largest gamma for which it is no farther from
                   any honest update than two honest ones are from each other (Shejwalkar, Houmansadr 2021, "Manipulating the
                   Byzantine"); p is -m / |m| ("unit") or minus the honest standard deviation of every number ("std")
    min-sum        the same with sums: its squared distances to all honest updates add up to no more than those of the honest
                   one for which they are largest
    known root     one update for all, by liars who know the examples of the root tasks: at 45 degrees to what `fltrust` then
                   compares with, against what the honest mean has beside it

The attackers are in this file; the server, its checks and rules, the settings and the scoring are the product's. Nodes live in
this process, and one vectorised computation per round replaces one for each node.
"""

import hashlib
import json
import logging
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import torch
from flwr.app import Message, RecordDict
from torch import Tensor

from benchmarks.runner import RAW, average, commit, finish, goal, machine, parser, percent, say
from quickbloom import __version__
from quickbloom.client_app.node import node_of
from quickbloom.common.config.checks import ANY
from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.datasets import load_dataset
from quickbloom.common.datasets.base import resolve_data_dir
from quickbloom.common.engine.momentum import with_momentum
from quickbloom.common.engine.round import TaskWork, contributions
from quickbloom.common.maths.batch import TaskData
from quickbloom.common.maths.params import Params
from quickbloom.common.randomness import generator
from quickbloom.common.wire.messages import EVALUATE, TRAIN, EvaluateReply, EvaluateRequest, TrainReply, TrainRequest
from quickbloom.common.wire.roll_call import ROLL_CALL, RollCallReply
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.comparing.batch import today
from quickbloom.server_app.federation.robust.root_set import RootSet, drawn
from quickbloom.server_app.federation.splits import split_tasks
from quickbloom.server_app.messaging.in_process_grid import InlineGrid

SHARE = 0.2
ROOT_TASKS = 8
_FIRST_NODE = 1000
RULES: dict[str, dict[str, Any]] = {
    "mean": {"aggregate": "mean"},
    "multi-krum": {"aggregate": "multi-krum"},
    "geometric-median": {"aggregate": "geometric-median"},
    "centered-clip": {"aggregate": "centered-clip"},
    "centered-clip, buckets of 2": {"aggregate": "centered-clip", "bucketing": 2},
    "centered-clip, momentum": {"aggregate": "centered-clip", "node-momentum": 0.9},
    "multi-krum, momentum": {"aggregate": "multi-krum", "node-momentum": 0.9},
    "fltrust, 3 tasks": {"aggregate": "fltrust", "root-tasks": "any:3"},
    "fltrust, 8 tasks": {"aggregate": "fltrust", "root-tasks": f"any:{ROOT_TASKS}"},
    "fltrust, 16 tasks": {"aggregate": "fltrust", "root-tasks": "any:16"},
    "fltrust, 8 tasks, momentum": {"aggregate": "fltrust", "root-tasks": f"any:{ROOT_TASKS}", "node-momentum": 0.9},
}
CLEAN = "no attack"
COMMON: dict[str, Any] = {"validation-tasks": 0, "evaluate-every": 0, "checkpoint-every": 0, "malicious": SHARE}
PLANS: dict[str, dict[str, Any]] = {
    "digits": {"algorithm": "maml", "dataset": "digits", "rounds": 100, "test-tasks": 19},
    "uji": {
        **{"algorithm": "protonet", "dataset": "uji", "rounds": 30, "test-tasks": 20, "adapt-steps": 1},
        **{"model": "conv4", "conv4.filters": 32, "uji.augment": True, "chunk-size": 16},
    },
}

Attack = Callable[[Tensor, Tensor, int], Tensor]
"""(the liars' true meta-gradients [liars, ..], the honest ones [honest, ..], seed) -> the liars' updates, tensor by tensor."""


def _noise(own: Tensor, honest: Tensor, seed: int) -> Tensor:
    noise = torch.randn(own.shape, generator=torch.Generator().manual_seed(seed), dtype=own.dtype)
    return 10 * own.square().mean().sqrt() * noise


def _far(own: Tensor, honest: Tensor, seed: int) -> Tensor:
    mean: Tensor = honest.mean(dim=0)
    size = float(torch.linalg.vector_norm(honest.flatten(1), dim=1).mean())
    length = max(float(torch.linalg.vector_norm(mean)), 1e-30)
    return (-10 * size / length * mean).expand_as(own)


def _little(own: Tensor, honest: Tensor, seed: int) -> Tensor:
    n, f = len(own) + len(honest), len(own)
    supporters = n // 2 + 1 - f
    z = NormalDist().inv_cdf((n - f - supporters) / (n - f))
    return (honest.mean(dim=0) - z * honest.std(dim=0)).expand_as(own)


def _inverse_unit(mean: Tensor, honest: Tensor) -> Tensor:
    return -mean / max(float(torch.linalg.vector_norm(mean)), 1e-30)


def _inverse_deviation(mean: Tensor, honest: Tensor) -> Tensor:
    return -honest.std(dim=0, correction=0)


Perturbation = Callable[[Tensor, Tensor], Tensor]
"""(the honest mean [d], the honest updates [honest, d]) -> the direction p in which the attackers leave the mean, [d]."""


def _min_max(perturbation: Perturbation) -> Attack:
    return _hidden(perturbation, lambda squares: float(squares.max()), lambda squares: float(squares.max()))


def _min_sum(perturbation: Perturbation) -> Attack:
    return _hidden(perturbation, lambda squares: float(squares.sum()), lambda squares: float(squares.sum(dim=1).max()))


def _hidden(perturbation: Perturbation, size: Callable[[Tensor], float], bound: Callable[[Tensor], float]) -> Attack:
    """Return the attack m + gamma p with the largest gamma for which `size` does not exceed `bound`.

    `size`: of squared distances to the honest updates [honest]. `bound`: of squared distances among them [honest, honest].
    """

    def attack(own: Tensor, honest: Tensor, seed: int) -> Tensor:
        updates = honest.double().flatten(1)
        mean = updates.mean(dim=0)
        direction, apart = perturbation(mean, updates), mean - updates
        # |m + gamma p - x_i|^2 in three numbers, so that a try costs nothing.
        at_mean, slope, curve = apart.square().sum(dim=1), 2 * apart @ direction, direction.square().sum()
        most = bound(torch.cdist(updates, updates, compute_mode="donot_use_mm_for_euclid_dist").square())
        gamma = _largest(lambda g: size(at_mean + g * slope + g * g * curve) <= most) if curve > 0 else 0.0
        update: Tensor = (mean + gamma * direction).to(own.dtype)
        return update.view(own.shape[1:]).expand_as(own)

    return attack


def _largest(fits: Callable[[float], bool]) -> float:
    """Return the largest number that `fits`, by bisection, for what fits from 0 up to some number and not beyond."""
    low, high = 0.0, 1.0
    while fits(high):
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


WHOLE: dict[str, Attack] = {
    "min-max, unit": _min_max(_inverse_unit),
    "min-max, std": _min_max(_inverse_deviation),
    "min-sum, unit": _min_sum(_inverse_unit),
    "min-sum, std": _min_sum(_inverse_deviation),
}
"""Attacks that see all numbers of a meta-gradient at once; the others go tensor by tensor."""
KNOWN_ROOT = "known root"
ATTACKS: dict[str, Attack] = {
    CLEAN: lambda own, honest, seed: own,
    "sign flip": lambda own, honest, seed: -own,
    "scaling": lambda own, honest, seed: 100 * own,
    "noise": _noise,
    "NaN": lambda own, honest, seed: own * math.nan,
    "label flip": lambda own, honest, seed: own,  # the attack is in their data
    "collusion, far": _far,
    "collusion": lambda own, honest, seed: (-10 * honest.mean(dim=0)).expand_as(own),
    "little": _little,
    "inner product": lambda own, honest, seed: (-2 * honest.mean(dim=0)).expand_as(own),
    **WHOLE,
    KNOWN_ROOT: lambda own, honest, seed: own,  # it needs what the server computes, see `around`
}


def around(root: Tensor, honest: Tensor) -> Tensor:
    """Return an update [d] at 45 degrees to `root` [d], against what the honest mean has beside it.

    Closer to the server's own than honest updates are, it gets a higher trust score, and takes from the result what they add.
    """
    forward = root / torch.linalg.vector_norm(root)
    mean: Tensor = honest.mean(dim=0)
    beside = mean - (mean @ forward) * forward
    against = forward - beside / torch.linalg.vector_norm(beside)
    found: Tensor = torch.linalg.vector_norm(honest, dim=1).mean() * against / torch.linalg.vector_norm(against)
    return found


class HostileFederation(InlineGrid):
    """One node per task; the nodes of `liars` (task ids) attack in training and are honest otherwise.

    One real node that hosts all tasks computes everything, and its results are distributed as the
    nodes' replies.
    """

    def __init__(self, config: RunConfig, attack: str, liars: set[str], root: Sequence[str] = ()) -> None:
        super().__init__(1, config.flat(), {})
        ((self._host_id, context),) = self._contexts.items()
        self._host = node_of(context)
        self._attack, self._liars = attack, liars
        self._states: dict[str, Params] = {}
        self._root = RootSet(config, self._host.algorithm, self._host.dataset, root)

    def get_node_ids(self) -> list[int]:
        return [_FIRST_NODE + i for i in range(len(self._host.tasks))]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        listed = list(messages)
        deal = {ROLL_CALL: self._roll_call, TRAIN: self._train, EVALUATE: self._evaluate}
        for message, content in zip(listed, deal[listed[0].metadata.message_type](listed) if listed else [], strict=True):
            message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
            self._replies[message.metadata.message_id] = Message(content, reply_to=message)
        return [message.metadata.message_id for message in listed]

    def _roll_call(self, messages: list[Message]) -> list[RecordDict]:
        own = [[self._host.tasks[message.metadata.dst_node_id - _FIRST_NODE]] for message in messages]
        return [RollCallReply(self._host.dataset.spec, tasks, {}).to_records() for tasks in own]

    def _evaluate(self, messages: list[Message]) -> list[RecordDict]:
        requests = [EvaluateRequest.from_records(message.content) for message in messages]
        whole = replace(requests[0], task_ids=[task_id for request in requests for task_id in request.task_ids])
        answer = self.answer(Message(whole.to_records(), self._host_id, EVALUATE))
        assert answer is not None
        scores = EvaluateReply.from_records(answer.content, len(requests), len(whole.lrs), whole.steps)
        return [EvaluateReply(scores.losses[[i]], scores.metrics[[i]]).to_records() for i in range(len(requests))]

    def _train(self, messages: list[Message]) -> list[RecordDict]:
        requests = [TrainRequest.from_records(message.content) for message in messages]
        return [reply.to_records() for reply in self._replies_to(requests)]

    def _replies_to(self, requests: list[TrainRequest]) -> list[TrainReply]:
        task_ids = [task_id for request in requests for task_id in request.task_ids]
        gradients, losses = self._honest(requests[0], task_ids)
        lying = torch.tensor([task_id in self._liars for task_id in task_ids])
        known = self._root.contribution(requests[0].meta, requests[0].round, {}) if self._attack == KNOWN_ROOT else {}
        self._lie(gradients, lying, 1000 * requests[0].round, known)
        return [
            TrainReply({name: value[t].clone() for name, value in gradients.items()}, 1.0, [losses[t]], 0.0)
            for t in range(len(task_ids))
        ]

    def _lie(self, gradients: Params, lying: Tensor, seed: int, known: Params | None = None) -> None:
        """Replace the true meta-gradients [tasks, ..] of the tasks that are `lying` [tasks]."""
        attack = ATTACKS[self._attack]
        if self._attack in WHOLE or self._attack == KNOWN_ROOT:
            rows = torch.cat([value.flatten(1) for value in gradients.values()], dim=1)
            if known:
                rows[lying] = around(torch.cat([known[name].flatten() for name in gradients]), rows[~lying])
            else:
                rows[lying] = attack(rows[lying], rows[~lying], seed)
            parts = torch.split(rows, [value[0].numel() for value in gradients.values()], dim=1)
            for value, part in zip(gradients.values(), parts, strict=True):
                value.copy_(part.view(value.shape))
            return
        for i, value in enumerate(gradients.values()):
            value[lying] = attack(value[lying], value[~lying], seed + i)

    def _honest(self, request: TrainRequest, task_ids: list[str]) -> tuple[Params, list[float]]:
        """Return every task's meta-gradient, stacked in the order of `task_ids`, and its loss, as nodes would compute them."""
        algorithm, meta = self._host.algorithm_for(request.meta)
        beta = self._host.run.node_momentum
        momentum = with_momentum(algorithm, beta) if beta else None
        work = []
        for task_id in task_ids:
            rng = generator(request.seed, "train", request.round, task_id, 0)
            memory = momentum.after(self._states[task_id])[1] if momentum and task_id in self._states else None
            kept = momentum.before(None, memory, request.round) if momentum else None
            work.append(TaskWork(self._draw(task_id, rng), rng, kept))
        gradients = {name: torch.zeros(len(work), *value.shape) for name, value in meta.items()}
        losses = [math.nan] * len(work)
        for part in contributions(momentum or algorithm, meta, work, self._host.chunk_size):
            for name, value in part.gradients.items():
                gradients[name][part.positions] = value
            for t, position in enumerate(part.positions):
                losses[position] = float(part.losses[t])
                if momentum:
                    self._states[task_ids[position]] = {name: value[t] for name, value in part.kept.items()}
        return gradients, losses

    def _draw(self, task_id: str, rng: Any) -> TaskData:
        data = self._host.dataset.train_draw(task_id, rng)
        if self._attack != "label flip" or task_id not in self._liars:
            return data
        return replace(data, query=data.query._replace(y=(data.query.y + 1) % self._host.dataset.spec.outputs))


def run(dataset: str, rule: str, attack: str, seed: int, *, fresh: bool = False) -> dict[str, Any]:
    """Return the accuracy on held-out tasks after adaptation, stored in runs/benchmarks."""
    settings = {**COMMON, **PLANS[dataset], **RULES[rule], "seed": seed}
    key = hashlib.sha256(json.dumps([settings, attack, __version__], sort_keys=True).encode()).hexdigest()[:10]
    directory = RAW / "robust" / f"{dataset}-{_in_a_name(rule)}-{_in_a_name(attack)}-seed{seed}-{key}"
    file = directory / "finished.json"
    if file.exists() and not fresh:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    shutil.rmtree(directory, ignore_errors=True)
    config = parse_run_config({**settings, "baselines": False, "output-dir": str(directory)})
    data = load_dataset(config.dataset, config.table(config.dataset), resolve_data_dir(""))
    train = split_tasks(data.tasks(), config)["train"]
    chosen = generator(seed, "liars").permutation(len(train))[: int(SHARE * len(train))]
    started = time.process_time()
    try:
        # The root set of the rule; of other rules one of the same kind.
        root = drawn(train, int(config.root_tasks.removeprefix(ANY) or ROOT_TASKS), seed)
        grid = HostileFederation(config, attack, {train[i] for i in chosen}, root)
        summary = run_federation(grid, config)
        after = summary["test"]["accuracy"]["mean"][summary["chosen"]["adapt_steps"]]
        found = {"after": after, "failures": summary["failures"], "error": "", "tasks": summary["tasks"]}
    except Exception as error:  # a run ended by an attack is a result as well
        found = {"after": math.nan, "failures": 0, "error": f"{type(error).__name__}: {error}", "tasks": {}}
    spent = {"seed": seed, "liars": len(chosen), "cpu": time.process_time() - started, "commit": commit(), "date": today()}
    directory.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**found, **spent}), encoding="utf-8")
    return {**found, **spent}


def _in_a_name(text: str) -> str:
    return text.replace(",", "").replace(" ", "-")


def assemble(seeds: list[int], *, fresh: bool, only: list[str], rules: list[str]) -> dict[str, Any]:
    """Return the result file: accuracy of every (data set, rule, attack), and its difference to the clean mean per seed.

    `only`, `rules`: the data sets and rules, [] for all.
    """
    rows = []
    for dataset in only or PLANS:
        clean = [run(dataset, "mean", CLEAN, seed, fresh=fresh)["after"] for seed in seeds]
        for attack in ATTACKS:
            for rule in rules or RULES:
                runs = [run(dataset, rule, attack, seed) for seed in seeds]
                lost = [{"after": one["after"] - before} for one, before in zip(runs, clean, strict=True)]
                row: dict[str, Any] = {
                    "dataset": dataset,
                    "attack": attack,
                    "aggregate": rule,
                    "runs": runs,
                    **average(runs, ["after", "cpu"]),
                }
                rows.append({**row, "against_clean_mean": average(lost, ["after"])})
                say(f"{dataset}, {attack}, {rule}: {percent(row['mean']['after'])}")
    name = "robust-part" if rules else "robust"
    facts = {"schema": 1, "benchmark": name, "claim": CLAIM, "seeds": seeds, "settings": {"common": COMMON, **PLANS}}
    facts["rules"] = {rule: RULES[rule] for rule in rules or RULES}
    commits = sorted({one["commit"] for row in rows for one in row["runs"]})
    return {**facts, "rows": rows, "goals": [], "machine": machine(), "commit": ", ".join(commits), "date": today()}


CLAIM = "20 % lying nodes cost less than 3 points with one of the rules against them"


def main() -> None:
    command = parser(CLAIM, "robust", seeds=range(3), has_only=True)
    what = "only these rules, whose result goes to robust-part.json"
    command.add_argument("--rules", nargs="+", default=[], choices=RULES, metavar="RULE", help=what)
    arguments = command.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    result = assemble(arguments.seeds, fresh=arguments.fresh, only=arguments.only, rules=arguments.rules)
    if arguments.only and not arguments.rules:
        return
    for row in result["rows"]:
        if row["aggregate"] != "mean":
            lost = -row["against_clean_mean"]["mean"]["after"]
            text = f"{row['dataset']}, {row['attack']}, {row['aggregate']}: at most 0.03 below the mean without an attack"
            goal(result, text, lost, met=lost <= 0.03)
    finish(result, table(result))


def table(result: dict[str, Any]) -> str:
    """Return accuracies after adaptation in per cent, one line per attack, one column per rule and data set."""
    columns = list(dict.fromkeys((row["dataset"], row["aggregate"]) for row in result["rows"]))
    lines = [
        "| attack | " + " | ".join(f"{dataset}: {rule}" for dataset, rule in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for attack in ATTACKS:
        cells = []
        for dataset, rule in columns:
            (row,) = (r for r in result["rows"] if (r["dataset"], r["aggregate"], r["attack"]) == (dataset, rule, attack))
            cells.append(f"{percent(row['mean']['after'])} ± {percent(row['sd']['after'])}")
        lines.append(f"| {attack} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
