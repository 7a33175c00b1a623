"""Asynchronous training on real nodes in virtual time: the rounds where all are equally fast, and what happens where not."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from loopback import Fault, LoopbackGrid

from quickbloom.common.config.run import parse_run_config
from quickbloom.common.errors import ConfigError, RunError
from quickbloom.common.maths.params import Params
from quickbloom.common.wire.messages import EVALUATE, TRAIN, TrainReply, TrainRequest, error_records, from_arrays, to_arrays
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.messaging.in_process_grid import InlineGrid
from quickbloom.server_app.messaging.polling_grid import PollingGrid
from quickbloom.server_app.runs.checkpoints import load

NODES = 30
SMALL = {
    "dataset": "gaussian",
    "gaussian.clients": NODES,
    "model": "linear",
    "rounds": 8,
    "tasks-per-round": 6,
    "evaluate-every": 3,
    "adapt-steps": 2,
    "adapt-lrs": "0.1",
    "baselines": False,
    "personal": False,
    "seed": 4,
    "round-deadline": 1e6,
}


def run(path: Path, *, grid: InlineGrid | None = None, nodes: int = NODES, **settings: Any) -> list[dict[str, Any]]:
    """The lines of the history of a run in `path`."""
    given = {key.replace("_", "-").replace("--", "."): value for key, value in settings.items()}
    config = parse_run_config({**SMALL, "output-dir": str(path), **given})
    run_federation(grid or InlineGrid(nodes, config.flat(), {}), config)
    return [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]


def model(path: Path) -> Params:
    return load(path).meta


def furthest(one: Params, other: Params) -> float:
    return max((value - other[name]).abs().max().item() for name, value in one.items())


def devices(path: Path, *lines: str) -> str:
    path.write_text("\n".join(["seconds,from,until", *lines]) + "\n")
    return str(path)


WHOLE = ["scaffold", "feddyn"]
"""Algorithms that take no contribution in part."""


@pytest.mark.parametrize("algorithm", ["reptile", "fomaml", "protonet", "perfedavg", "metasgd", *WHOLE])
@pytest.mark.parametrize("speed", ["", "even"])
def test_with_one_speed_and_a_buffer_of_a_round_it_is_synchronous_training(tmp_path: Path, algorithm: str, speed: str) -> None:
    more: dict[str, Any] = {"async_staleness": 0} if algorithm in WHOLE else {}
    rounds = run(tmp_path / "sync", algorithm=algorithm, devices=speed)
    steps = run(tmp_path / "async", algorithm=algorithm, devices=speed, mode="async", **more)
    assert furthest(model(tmp_path / "sync"), model(tmp_path / "async")) < 1e-5
    scores = [[line["validation"] for line in lines if "validation" in line] for lines in (rounds, steps)]
    assert len(scores[0]) == len(scores[1]) == 3
    for one, other in zip(*scores, strict=True):
        assert other["accuracy"] == pytest.approx(one["accuracy"], abs=1e-5)
    assert all(line["async"]["staleness"] == {"0": 6} for line in steps)
    if speed:
        assert rounds[-1]["virtual_hours"] == steps[-1]["virtual_hours"] == pytest.approx(8 * 60 / 3600, abs=1e-5)


def test_tasks_that_share_nodes_are_given_out_as_in_rounds(tmp_path: Path) -> None:
    run(tmp_path / "sync", nodes=4)
    run(tmp_path / "async", nodes=4, mode="async")
    assert furthest(model(tmp_path / "sync"), model(tmp_path / "async")) < 1e-5


def test_a_slow_device_holds_nobody_up_and_what_it_sends_is_stale(tmp_path: Path) -> None:
    """Device 0 takes ten times as long. With 6 at work and steps of 2, hours are those of the fast ones."""
    fleet = devices(tmp_path / "devices.csv", "600,0,0", *["60,0,0"] * (NODES - 1))
    lines = run(tmp_path / "run", devices=fleet, mode="async", rounds=40, fraction=1.0, tasks_per_round=6, async_buffer=2)
    # 80 tasks, at most 6 at a time, most of them in a minute each.
    assert lines[-1]["virtual_hours"] < 2 * 80 / 6 / 60
    stale = [int(s) for line in lines for s in line["async"]["staleness"]]
    assert max(stale) >= 10
    assert sum(n for line in lines for n in line["async"]["staleness"].values()) == 80


def test_what_is_too_stale_is_dropped_and_counted(tmp_path: Path) -> None:
    fleet = devices(tmp_path / "devices.csv", *["600,0,0"] * 3, *["60,0,0"] * (NODES - 3))
    slow: dict[str, Any] = {"devices": fleet, "mode": "async", "rounds": 40, "async_buffer": 2, "fraction": 1.0}
    lines = run(tmp_path / "run", **slow, async_max_staleness=2)
    dropped = sum(line["async"]["dropped"] for line in lines)
    assert dropped > 0
    assert all(int(s) <= 2 for line in lines for s in line["async"]["staleness"])
    assert load(tmp_path / "run").facts["so-far"]["asynchronous"]["dropped"] == dropped


def test_the_same_run_twice_is_the_same(tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(tmp_path / name, devices="lognormal", mode="async", async_buffer=3)
    assert furthest(model(tmp_path / "one"), model(tmp_path / "two")) == 0.0


def test_a_mean_is_worked_by_hand(tmp_path: Path) -> None:
    """Two nodes that say what their meta-gradient is; the slow one's reply is one step old when it comes."""
    seen: list[Params] = []

    def says(value: float) -> Fault:
        def fault(message: Message, answer: Any) -> Message:
            if message.metadata.message_type != TRAIN:
                return answer(message)  # type: ignore[no-any-return]
            meta = TrainRequest.from_records(message.content).meta
            seen.append(meta)
            gradient = {name: torch.full_like(tensor, value) for name, tensor in meta.items()}
            return Message(TrainReply(gradient, 1.0, [0.5]).to_records(), reply_to=message)

        return fault

    settings = {**SMALL, "gaussian.clients": 2, "validation-tasks": 0, "test-tasks": 0, "rounds": 3, "async-buffer": 1}
    settings |= {"mode": "async", "tasks-per-round": 2, "reptile.outer-lr": 1.0, "evaluate-every": 0}
    settings["reptile.outer-decay"] = False
    settings["devices"] = devices(tmp_path / "devices.csv", "60,0,0", "100,0,0")
    config = parse_run_config({**settings, "output-dir": str(tmp_path / "run"), "reptile.outer-optimizer": "sgd"})
    run_federation(LoopbackGrid(2, config.flat(), {0: says(1.0), 1: says(4.0)}), config)
    start, end = seen[0], model(tmp_path / "run")
    # t = 60: 1, fresh. t = 100: 4, one step old. t = 120: 1, one step old, since the step of t = 100 came between.
    whole = 1 + 4 / math.sqrt(2) + 1 / math.sqrt(2)
    for name, value in end.items():
        assert torch.allclose(start[name] - value, torch.full_like(value, whole), atol=1e-5)


def test_a_run_that_was_cut_off_asks_again_for_what_was_under_way(tmp_path: Path) -> None:
    slow: dict[str, Any] = {"devices": "lognormal", "mode": "async", "async_buffer": 3}
    run(tmp_path / "run", **slow, checkpoint_every=4)
    at = load(tmp_path / "run" / "checkpoints" / "round-000004.safetensors").facts["so-far"]["asynchronous"]
    assert at["turn"] > 0
    assert at["waiting"]
    before = json.loads((tmp_path / "run" / "history.jsonl").read_text().splitlines()[3])
    lines = run(
        tmp_path / "again", **slow, rounds=8, resume_from=str(tmp_path / "run" / "checkpoints" / "round-000004.safetensors")
    )
    assert [line["round"] for line in lines] == list(range(1, 9))
    assert lines[4]["virtual_hours"] >= before["virtual_hours"]
    after = load(tmp_path / "again").facts["so-far"]["asynchronous"]
    assert sum(after["contributed"].values()) == 8 * 3


def test_where_all_are_equally_fast_a_continued_run_ends_like_one_that_was_never_cut_off(tmp_path: Path) -> None:
    run(tmp_path / "whole", devices="even", mode="async", checkpoint_every=4)
    checkpoint = tmp_path / "whole" / "checkpoints" / "round-000004.safetensors"
    run(tmp_path / "again", devices="even", mode="async", resume_from=str(checkpoint))
    assert furthest(model(tmp_path / "whole"), model(tmp_path / "again")) == 0.0


def test_the_best_model_is_one_that_was_scored_while_training_went_on(tmp_path: Path) -> None:
    lines = run(tmp_path / "run", devices="lognormal", mode="async", async_buffer=2, rounds=30, keep="best", evaluate_every=1)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    scored = {line["validation"].get("round", line["round"]): line["validation"] for line in lines if "validation" in line}
    assert summary["kept"]["round"] in {0, *scored}
    assert set(scored) <= set(range(1, 31))
    assert 30 in scored


def test_broken_nodes_cost_their_replies_and_end_the_run_only_if_all_are_broken(tmp_path: Path) -> None:
    def broken(message: Message, answer: Any) -> Message:
        if message.metadata.message_type != TRAIN:
            return answer(message)  # type: ignore[no-any-return]
        return Message(error_records("no"), reply_to=message)

    config = parse_run_config({**SMALL, "mode": "async", "output-dir": str(tmp_path / "some")})
    lines = run(tmp_path / "some", mode="async", grid=LoopbackGrid(NODES, config.flat(), dict.fromkeys(range(8), broken)))
    assert len(lines) == 8
    assert sum(len(line["failures"]) for line in lines) > 0
    with pytest.raises(RunError, match="no node sent a usable reply"):
        run(tmp_path / "all", mode="async", grid=LoopbackGrid(NODES, config.flat(), dict.fromkeys(range(NODES), broken)))


def test_what_a_liar_sends_is_judged_as_in_rounds(tmp_path: Path) -> None:
    """A reply with NaN is dropped and held against its node, which is left out after three, and the run goes on."""

    def liar(message: Message, answer: Any) -> Message:
        reply = answer(message)
        if message.metadata.message_type == TRAIN:
            gradient = from_arrays(reply.content["gradient"])
            reply.content["gradient"] = to_arrays({name: value * math.nan for name, value in gradient.items()})
        return reply  # type: ignore[no-any-return]

    config = parse_run_config({**SMALL, "mode": "async", "fraction": 1.0, "tasks-per-round": 0})
    grid = LoopbackGrid(3, config.flat(), {1: liar})
    lines = run(tmp_path / "run", mode="async", grid=grid, fraction=1.0, tasks_per_round=0, async_buffer=4, rounds=12)
    reasons = [failure["reason"] for line in lines for failure in line["failures"]]
    assert sum("NaN" in reason for reason in reasons) == 3
    assert any("left out" in reason for reason in reasons)
    assert all(torch.isfinite(value).all() for value in model(tmp_path / "run").values())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"privacy.noise-multiplier": 1.0, "privacy.clip": 1.0}, "chosen for a round whatever they do"),
        ({"secure-aggregation": True}, "masks cancel only among nodes"),
        ({"over-select": 1.3}, "nobody is waited for anyway"),
        ({"min-replies": 0.5}, "`async-buffer` says"),
        ({"async-fairness": 0.5}, "nobody then works"),
    ],
)
def test_what_needs_rounds_is_refused_with_the_reason(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_run_config({**SMALL, "mode": "async", **settings})


@pytest.mark.parametrize("algorithm", WHOLE)
def test_what_tasks_keep_may_not_count_in_part(algorithm: str) -> None:
    """By default what is stale weighs less: the task would keep all of it, and the server a part."""
    sentence = (
        rf'`async-staleness` must be 0 with `mode = "async"` and `algorithm = "{algorithm}"`, because .* keep.*, got 0\.5'
    )
    with pytest.raises(ConfigError, match=sentence):
        parse_run_config({**SMALL, "algorithm": algorithm, "mode": "async"})
    parse_run_config({**SMALL, "algorithm": algorithm, "mode": "async", "async-staleness": 0.0})
    parse_run_config({**SMALL, "algorithm": algorithm})
    refused = rf'`over-select` must be 1 with `algorithm = "{algorithm}"`, because .*keep.*, got 1\.5'
    with pytest.raises(ConfigError, match=refused):
        parse_run_config({**SMALL, "algorithm": algorithm, "over-select": 1.5})


@pytest.mark.parametrize("more", [{}, {"bucketing": 2}], ids=["alone", "buckets"])
def test_with_one_speed_a_rule_with_a_history_is_that_of_synchronous_training(tmp_path: Path, more: dict[str, Any]) -> None:
    settings: dict[str, Any] = {
        "aggregate": "centered-clip",
        "malicious": 0.1,
        "clip_radius": 0.05,
        "evaluate_every": 0,
        **more,
    }
    run(tmp_path / "sync", **settings)
    run(tmp_path / "async", mode="async", **settings)
    run(tmp_path / "plain", evaluate_every=0)
    assert furthest(model(tmp_path / "sync"), model(tmp_path / "async")) < 1e-5
    assert furthest(model(tmp_path / "sync"), model(tmp_path / "plain")) > 1e-3
    centres = [
        {name: value for name, value in load(tmp_path / mode).tensors.items() if name.startswith("centre/")}
        for mode in ("sync", "async")
    ]
    assert len(centres[0]) == len(model(tmp_path / "sync"))
    assert furthest(*centres) < 1e-5


def test_a_rule_that_needs_more_nodes_than_there_are_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='`aggregate = "krum"` cannot work with `async-buffer` 2'):
        run(tmp_path / "run", mode="async", aggregate="krum", async_buffer=2)


def test_devices_are_of_simulations_only(tmp_path: Path) -> None:
    config = parse_run_config({**SMALL, "devices": "even", "output-dir": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match='`devices` must be "" on real nodes'):
        run_federation(PollingGrid(InlineGrid(3, config.flat(), {})), config)


def test_whoever_still_answers_trains_on_while_the_others_hang(tmp_path: Path) -> None:
    """Three of four hang, and stay connected: until their deadline time passes, though nobody answers."""
    config = parse_run_config({**SMALL, "gaussian.clients": 4})
    alone: dict[str, Any] = {"fraction": 1.0, "tasks_per_round": 0, "validation_tasks": 0, "test_tasks": 0, "evaluate_every": 0}
    grid = HangingGrid(4, config.flat(), {})
    lines = run(
        tmp_path / "run", grid=grid, gaussian__clients=4, mode="async", async_buffer=1, rounds=40, round_deadline=1000,
        node_deadline=120, devices="even", **alone,
    )  # fmt: skip
    assert len(lines) == 40


class HangingGrid(LoopbackGrid):
    """After the roll call at the beginning, all nodes but the first one answer nothing any more."""

    def answer(self, message: Message) -> Message | None:
        hangs = message.metadata.dst_node_id != 100 and any(one.metadata.message_type == TRAIN for one in self.requests)
        return None if hangs else super().answer(message)


def test_many_nodes_that_are_lost_at_once_do_not_end_the_run(tmp_path: Path) -> None:
    """The buffer holds a single task, twelve are at work, and nine of them are lost."""
    left = [3] * NODES

    def fails_first(message: Message, answer: Any) -> Message:
        place = message.metadata.dst_node_id - 100
        if message.metadata.message_type != TRAIN or not left[place]:
            return answer(message)  # type: ignore[no-any-return]
        left[place] -= 1
        return Message(error_records("gone"), reply_to=message)

    config = parse_run_config({**SMALL, "mode": "async"})
    grid = LoopbackGrid(NODES, config.flat(), dict.fromkeys(range(NODES), fails_first))
    lines = run(tmp_path / "run", mode="async", grid=grid, async_buffer=1, async_concurrency=12)
    assert len(lines) == 8


def test_a_rule_that_waits_for_nodes_that_are_gone_ends_the_step_with_a_sentence(tmp_path: Path) -> None:
    """Two of three nodes hang: their rule needs three. The replies of the third must not pile up for ever."""
    config = parse_run_config({**SMALL, "gaussian.clients": 3})
    more: dict[str, Any] = {"validation_tasks": 0, "test_tasks": 0, "tasks_per_round": 3, "evaluate_every": 0}
    grid = HangingGrid(3, config.flat(), {})
    with pytest.raises(RunError, match="`median` then needs at least 3 nodes"):
        run(
            tmp_path / "run", grid=grid, gaussian__clients=3, mode="async", aggregate="median", round_deadline=0.5,
            devices="even", **more,
        )  # fmt: skip


def test_scores_are_asked_for_again_where_the_message_could_not_be_delivered(tmp_path: Path) -> None:
    class Refusing(LoopbackGrid):
        """The first message about scores cannot be delivered."""

        refused = 0

        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            listed = list(messages)
            if self.refused or not any(one.metadata.message_type == EVALUATE for one in listed):
                return super().push_messages(listed)
            self.refused += 1
            return [""] * len(listed)

    config = parse_run_config({**SMALL, "mode": "async"})
    lines = run(tmp_path / "run", mode="async", grid=Refusing(NODES, config.flat(), {}), evaluate_every=1)
    assert sum("validation" in line for line in lines) >= 5


def test_a_repeated_step_keeps_what_has_come_in(tmp_path: Path) -> None:
    """Of six tasks at a time five fail at first: the step is tried again, and the task that contributed counts once."""
    failed: list[int] = []

    def at_first(message: Message, answer: Any) -> Message:
        if message.metadata.message_type == TRAIN and len(failed) < 60:
            failed.append(1)
            return Message(error_records("not yet"), reply_to=message)
        return answer(message)  # type: ignore[no-any-return]

    settings: dict[str, Any] = {"mode": "async", "rounds": 2, "on_too_few": "repeat", "evaluate_every": 0}
    config = parse_run_config({**SMALL, "mode": "async"})
    grid = LoopbackGrid(NODES, config.flat(), dict.fromkeys(range(1, NODES), at_first))
    lines = run(tmp_path / "run", grid=grid, **settings)
    assert [line["train"]["tasks"] for line in lines] == [6, 6]
    contributed = load(tmp_path / "run").facts["so-far"]["asynchronous"]["contributed"]
    assert sum(contributed.values()) == sum(sum(line["async"]["staleness"].values()) for line in lines) == 12
