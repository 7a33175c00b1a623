"""Two neighbouring federations, with a task and without it: what the noise is added to differs by at most `privacy.clip`.

Whole runs, plain and with secure sums: whatever the data of the task are, its node's other tasks are heard, the round goes on,
and nobody is reproached.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from flwr.app.error import Error
from loopback import Fault, LoopbackGrid

from quickbloom.common.config.privacy import LEAST_CLIP, MOST_CLIP, PrivacyOptions
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.datasets.gaussian import Gaussian
from quickbloom.common.engine.round import RoundResult, run_round
from quickbloom.common.errors import ConfigError, DataError, RunError
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.maths.params import Params, norm
from quickbloom.common.wire.messages import TRAIN, TrainReply, error_records
from quickbloom.common.wire.secure.updates import Totals
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.federation.private.privacy import TaskPrivacy
from quickbloom.server_app.federation.private.secure_sum import check_totals
from quickbloom.server_app.runs.directory import read_history

pytest.importorskip("dp_accounting")

CLIP = 0.5
FLAT: dict[str, Any] = {"dataset": "gaussian", "model": "linear", "algorithm": "fedavg", "min-nodes": 1, "adapt-steps": 1}
FLAT |= {"rounds": 1, "privacy.noise-multiplier": 1.0, "privacy.clip": CLIP, "privacy.delta": 0.01, "seed": 3}
TASK = "client-023"


def all_of(x: float) -> Callable[[TaskData], TaskData]:
    def change(data: TaskData) -> TaskData:
        support, query = (Batch.of(torch.full_like(part.x, x), part.y) for part in (data.support, data.query))
        return TaskData(support, query, data.test)

    return change


def none_of(*parts: str) -> Callable[[TaskData], TaskData]:
    def change(data: TaskData) -> TaskData:
        return replace(data, **{name: Batch(*(values[:0] for values in getattr(data, name))) for name in parts})

    return change


def refused(data: TaskData) -> TaskData:
    raise DataError("the row 7 holds no number")


def defect(data: TaskData) -> TaskData:
    raise ZeroDivisionError("a defect of the data set")


HARM: dict[str, Callable[[TaskData], TaskData]] = {
    "NaN": all_of(math.nan),
    "infinity": all_of(math.inf),
    "huge": all_of(3e38),
    "no support": none_of("support"),
    "nothing": none_of("support", "query"),
    "cannot be drawn": refused,
    "a defect": defect,
}


def sums(folder: Path, monkeypatch: pytest.MonkeyPatch, clients: int, **settings: Any) -> tuple[Params, float, int]:
    """(sum, centred sum of bits) that the round of a run adds noise to, and the number of its training tasks."""
    seen: list[Params] = []
    bits: list[float] = []
    real = TaskPrivacy.mean

    def watch(self: TaskPrivacy, replies: list[TrainReply], like: Params, server_round: int) -> Params:
        zero = {name: torch.zeros_like(value).double() for name, value in like.items()}
        total = {n: v + sum(r.gradient[n].double() * r.weight for r in replies) for n, v in zero.items()}
        seen.append(total)
        bits.append(sum(reply.within - reply.weight / 2 for reply in replies))
        return real(self, replies, like, server_round)

    with monkeypatch.context() as patched:
        patched.setattr(TaskPrivacy, "mean", watch)
        config = parse_run_config({**FLAT, "gaussian.clients": clients, **settings, "output-dir": str(folder)})
        summary = run_federation(LoopbackGrid(3, config.flat()), config)
    # Who reads the run directory sees which task is broken; its node is not reproached.
    assert all(fail["who"] == f"task {TASK}" for record in read_history(folder) for fail in record["failures"])
    assert len(seen) == 1
    return seen[0], bits[0], summary["tasks"]["train"]


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("harm", sorted(HARM))
def test_neighbouring_federations_differ_by_at_most_the_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str, secure: bool
) -> None:
    draw = Gaussian.train_draw

    def harmful(self: Gaussian, task_id: str, rng: np.random.Generator) -> TaskData:
        data = draw(self, task_id, rng)
        return HARM[harm](data) if task_id == TASK else data

    monkeypatch.setattr(Gaussian, "train_draw", harmful)
    more = {"secure-aggregation": secure}
    without, bits_without, trained_without = sums(tmp_path / "without", monkeypatch, 23, **more)
    with_it, bits_with, trained_with = sums(tmp_path / "with", monkeypatch, 24, **more)
    assert trained_with == trained_without + 1
    moved = norm({name: with_it[name] - without[name] for name in with_it})
    assert moved <= CLIP * (1 + 1e-5)
    assert abs(bits_with - bits_without) <= 0.5 + 1e-6
    assert norm(without) > CLIP  # the others are there


# ---- what decides whether a round goes on


def broken(reply: Callable[[Message], Message]) -> Fault:
    return lambda message, answer: reply(message) if message.metadata.message_type == TRAIN else answer(message)


def says_why(message: Message) -> Message:
    return Message(error_records("the disk is full"), reply_to=message)


def fails(message: Message) -> Message:
    return Message(Error(code=0, reason="out of memory"), reply_to=message)


@pytest.mark.parametrize("reply", [says_why, fails])
def test_whether_a_round_goes_on_does_not_hang_on_whom_the_sample_met(
    tmp_path: Path, reply: Callable[[Message], Message]
) -> None:
    """Node 101 is broken. A round that met its tasks alone is noise alone, like one that met nobody."""
    settings = {
        **FLAT,
        "seed": 2,
        "gaussian.clients": 24,
        "rounds": 30,
        "tasks-per-round": 1,
        "privacy.noise-seed": 3,
        "evaluate-every": 0,
    }
    config = parse_run_config({**settings, "output-dir": str(tmp_path)})
    summary = run_federation(LoopbackGrid(3, config.flat(), {1: broken(reply)}), config)
    assert summary["privacy"]["steps"] == 30
    records = read_history(tmp_path)
    alone = [r for r in records if r["failures"] and r["train"]["tasks"] == 0]
    assert alone  # otherwise nothing was tried
    assert all(r["privacy"]["steps"] == r["round"] for r in records)
    # After three times it is left out, as everybody can see, and is asked no more.
    assert sum(fail["who"] == "node 101" for r in records for fail in r["failures"]) == 3


def test_a_run_of_which_nobody_can_be_asked_any_more_ends_with_the_reason(tmp_path: Path) -> None:
    config = parse_run_config({**FLAT, "rounds": 30, "node-deadline": 0.1, "output-dir": str(tmp_path)})
    with pytest.raises(RunError, match="round 3: no node sent a usable reply: error 0: out of memory; after 3"):
        run_federation(LoopbackGrid(3, config.flat(), dict.fromkeys(range(3), broken(fails))), config)
    assert [r["privacy"]["steps"] for r in read_history(tmp_path)] == [1, 2]


def test_a_loss_beyond_what_a_reply_may_say_costs_its_node_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverged(*args: Any, **named: Any) -> RoundResult:
        result = run_round(*args, **named)
        return replace(result, losses=[1e300, *result.losses[1:]])

    monkeypatch.setattr("quickbloom.client_app.app.run_round", diverged)
    config = parse_run_config({**FLAT, "rounds": 1, "output-dir": str(tmp_path)})
    assert run_federation(LoopbackGrid(3, config.flat()), config)["failures"] == 0


@pytest.mark.parametrize(("size", "clip", "nodes"), [(100_000, 1e-6, 5), (1_000_000, 1e-3, 4096)])
def test_the_rounding_of_a_secure_sum_is_no_reason_to_drop_it(size: int, clip: float, nodes: int) -> None:
    # One task of norm `clip`, and in every number of the sum half a unit of 2^-30 from each node: the worst honest case.
    sums = torch.full((size,), clip / math.sqrt(size)).double() + nodes * 2.0**-31
    totals = Totals({"w": sums.float()}, 1.0, 0.0, 1, 0.0)
    assert check_totals(totals, 1, 1.0, clip, nodes=nodes) is None
    assert norm(totals.gradient) > clip * 1.001  # the bound without the rounding would refuse it
    twice = replace(totals, gradient={"w": 2 * sums.float() + 2 * clip / math.sqrt(size)})
    assert "has norm" in str(check_totals(twice, 1, 1.0, clip, nodes=nodes))


@pytest.mark.parametrize("settings", [{}, {"secure-aggregation": True}])
def test_a_bound_of_replies_is_refused_with_privacy(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"`max-update-norm` must be 0 with `privacy.noise-multiplier` above 0"):
        parse_run_config({**FLAT, "max-update-norm": 5.0, **settings})


@pytest.mark.parametrize(("within", "bound"), [(0.0, MOST_CLIP), (20.0, LEAST_CLIP)])
def test_a_norm_that_adapts_stays_within_bounds(within: float, bound: float) -> None:
    """At 0 nodes would not clip any more, and weigh tasks by their sizes."""
    options = PrivacyOptions(noise_multiplier=1.0, clip=1.0, clip_quantile=0.5, clip_rate=10.0, noise_seed=0)
    one = TaskPrivacy(options, 20, 20)
    for _ in range(300):
        one.mean([TrainReply({"w": torch.zeros(1)}, 20.0, [0.0], within)], {"w": torch.zeros(1)})
    assert one.clip == bound
    # Few tasks: the noise of the bits is so large that e to its power would be no number.
    loud = TaskPrivacy(options.model_copy(update={"noise_multiplier": 1e6}), 1, 1)
    for _ in range(20):
        loud.mean([], {"w": torch.zeros(1)})
        assert LEAST_CLIP <= loud.clip <= MOST_CLIP
