"""The node's handlers: what they answer, and that a mistake costs one reply with one sentence."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from loopback import LoopbackGrid

from quickbloom.client_app import app as client
from quickbloom.client_app.node import node_of
from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.algorithms.reptile import Reptile
from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.datasets import load_dataset
from quickbloom.common.engine.round import TaskWork, evaluate, run_round
from quickbloom.common.maths.batch import Batch, Episode, Minibatches
from quickbloom.common.maths.kernels import prebuilt, source
from quickbloom.common.maths.learner import Learner
from quickbloom.common.models import build_model
from quickbloom.common.randomness import generator
from quickbloom.common.wire import packing
from quickbloom.common.wire.messages import (
    EVALUATE,
    TRAIN,
    EvaluateReply,
    EvaluateRequest,
    TrainReply,
    TrainRequest,
    error_reason,
    payload_bytes,
)
from quickbloom.common.wire.roll_call import PROTOCOL, ROLL_CALL, RollCallReply, roll_call_request

CONFIG = parse_run_config({"mlp.hidden": "6", "seed": 4}).resolved()
DIGITS = load_dataset("digits", CONFIG.table("digits"), Path())
IDS = [task.task_id for task in DIGITS.tasks()]


def reptile() -> Reptile:
    module = build_model("mlp", CONFIG.table("mlp"), (1, 8, 8), 5, CONFIG.seed)
    return Reptile(CONFIG.table("reptile"), Learner(module, "classification"))


def ask(records: RecordDict, kind: str, *, nodes: int = 4, config: RunConfig = CONFIG, **node_config: Any) -> Message:
    """The answer of node 0 of `nodes`, which hosts tasks 0, `nodes`, 2 `nodes`, ..."""
    grid = LoopbackGrid(nodes, config.flat(), node_configs={0: {key.replace("_", "-"): v for key, v in node_config.items()}})
    (reply,) = grid.send_and_receive([Message(records, 100, kind)])
    return reply


def roll_call() -> RecordDict:
    return RecordDict({"request": ConfigRecord()})


def train_request(*task_ids: str, number: int = 1) -> RecordDict:
    return TrainRequest(reptile().init(), number, CONFIG.seed, list(task_ids)).to_records()


def reason(reply: Message) -> str:
    """The one sentence of a reply that is no result."""
    assert not reply.has_error()
    text = error_reason(reply.content)
    assert text is not None
    assert "\n" not in text
    return text


def test_roll_call_tells_shapes_counts_and_versions_and_no_example() -> None:
    reply = ask(roll_call(), ROLL_CALL)
    answer = RollCallReply.from_records(reply.content)
    assert answer.spec == DIGITS.spec
    assert answer.tasks == DIGITS.tasks()[::4]
    assert answer.versions.keys() == {"quickbloom", "flwr", "torch", "python"}
    assert payload_bytes(reply.content) == 0


@pytest.mark.parametrize(
    ("compiler", "installed", "lines"),
    [("/usr/bin/c++", None, 1), (None, Path("quickbloom_kernels"), 1), (None, None, 0)],
    ids=["with a compiler", "with other kernels", "without"],
)
def test_a_node_without_the_source_of_the_kernels_says_so_once_a_run(
    compiler: str | None, installed: Path | None, lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    monkeypatch.delenv("QUICKBLOOM_KERNELS", raising=False)
    monkeypatch.setattr(source, "read", lambda: None)
    monkeypatch.setattr(client, "find_compiler", lambda: compiler)
    monkeypatch.setattr(prebuilt, "installed", lambda: installed)
    monkeypatch.setattr(client, "kernel_remark", source.remark)
    monkeypatch.setattr(client, "log", lambda level, form, *values: logged.append(form % values))
    ask(roll_call(), ROLL_CALL)
    assert [text for text in logged if "kernels are off" in text] == [source.remark()] * lines


def test_a_server_of_another_protocol_is_refused_in_one_sentence() -> None:
    records = roll_call_request()
    assert error_reason(ask(records, ROLL_CALL).content) is None
    records["request"] = ConfigRecord({"protocol": PROTOCOL + 1})
    words = f"the server speaks protocol {PROTOCOL + 1}, this node speaks {PROTOCOL}: install the same release"
    assert reason(ask(records, ROLL_CALL)) == words


def test_a_request_that_travels_as_one_record_is_answered_so(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, packed = (ask(form(train_request(IDS[0])), TRAIN).content for form in (lambda records: records, packing.pack))
    assert set(plain) == {"gradient", "metrics"}
    assert packing.is_packed(packed)
    one, other = (TrainReply.from_records(records, 1).gradient for records in (plain, packing.unpack(packed)))
    assert all(torch.equal(one[name], other[name]) for name in one)
    request = packing.pack(train_request(IDS[0]))
    monkeypatch.setattr(packing, "pack", lambda records: records)  # as with an answer that is too large
    assert set(ask(request, TRAIN).content) == {"gradient", "metrics"}


def test_a_request_that_cannot_be_unpacked_is_refused_in_one_sentence() -> None:
    reply = ask(RecordDict({"packed": ConfigRecord({"packed": b"?"})}), TRAIN)
    reply.content = packing.unpack(reply.content)
    assert "cannot be read" in reason(reply)


@pytest.mark.parametrize("nodes", [1, 3, 60])
def test_nodes_share_out_all_tasks(nodes: int) -> None:
    grid = LoopbackGrid(nodes, CONFIG.flat())
    replies = grid.send_and_receive([Message(roll_call(), node_id, ROLL_CALL) for node_id in grid.get_node_ids()])
    hosted = [task.task_id for reply in replies for task in RollCallReply.from_records(reply.content).tasks]
    assert sorted(hosted) == sorted(IDS)


def test_train_reply_is_the_round_of_the_tasks_asked_for_in_their_order() -> None:
    asked = [IDS[8], IDS[0]]
    reply = TrainReply.from_records(ask(train_request(*asked, number=7), TRAIN).content, 2)
    work = []
    for task_id in asked:
        rng = generator(4, "train", 7, task_id, 0)
        work.append(TaskWork(DIGITS.train_draw(task_id, rng), rng))
    expected = run_round(reptile(), reptile().init(), work, chunk_size=64)
    assert all(torch.equal(value, expected.gradient[name]) for name, value in reply.gradient.items())
    assert (reply.losses, reply.weight) == (expected.losses, 2.0)


def test_episodes_change_from_round_to_round_and_with_the_seed_only() -> None:
    def losses(number: int, seed: int) -> list[float]:
        records = TrainRequest(reptile().init(), number, seed, [IDS[0]]).to_records()
        return TrainReply.from_records(ask(records, TRAIN).content, 1).losses

    assert losses(1, 4) == losses(1, 4)
    assert losses(1, 4) != losses(2, 4)
    assert losses(1, 4) != losses(1, 5)


def test_a_task_trains_the_same_beside_any_other_task() -> None:
    alone = TrainReply.from_records(ask(train_request(IDS[0]), TRAIN).content, 1)
    beside = TrainReply.from_records(ask(train_request(*IDS[:9]), TRAIN, nodes=1).content, 9)
    assert beside.losses[0] == pytest.approx(alone.losses[0], abs=1e-6)


def test_evaluate_reply_scores_the_test_part_at_every_rate_and_step() -> None:
    algorithm, asked = reptile(), [IDS[4], IDS[0]]
    records = EvaluateRequest(algorithm.init(), [0.1, 0.5], 3, asked).to_records()
    reply = EvaluateReply.from_records(ask(records, EVALUATE).content, 2, 2, 3)
    draws = [DIGITS.test_draws(task_id) for task_id in asked]
    losses, metrics = evaluate(algorithm, algorithm.init(), draws, [0.1, 0.5], 3, chunk_size=64)
    assert np.allclose(reply.losses, losses, rtol=0, atol=1e-6)
    assert np.array_equal(reply.metrics, metrics)


def test_evaluate_with_shots_adapts_on_the_first_examples_of_each_class_and_scores_the_same_ones() -> None:
    algorithm = reptile()
    records = EvaluateRequest(algorithm.init(), [0.5], 3, IDS[:1], shots=1).to_records()
    reply = EvaluateReply.from_records(ask(records, EVALUATE).content, 1, 1, 3)
    (draw,) = DIGITS.test_draws(IDS[0])
    # Two images of each class stand side by side, so the first of each are those at even positions.
    few = replace(draw, support=Batch.of(draw.support.x[::2], draw.support.y[::2]))
    losses, _ = evaluate(algorithm, algorithm.init(), [[few]], [0.5], 3, chunk_size=64)
    assert np.allclose(reply.losses, losses, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [TRAIN, EVALUATE])
def test_a_task_of_another_node_is_refused_by_name(kind: str) -> None:
    evaluation = EvaluateRequest(reptile().init(), [0.1], 1, [IDS[0], IDS[1]]).to_records()
    records = train_request(IDS[0], IDS[1]) if kind == TRAIN else evaluation
    assert reason(ask(records, kind)) == f"this node does not host the task '{IDS[1]}'"


def test_a_model_of_another_form_is_refused_by_name() -> None:
    meta = {**reptile().init(), "1.weight": torch.zeros(6, 63)}
    text = reason(ask(TrainRequest(meta, 1, 4, [IDS[0]]).to_records(), TRAIN))
    assert "does not fit this node's data: the tensor `1.weight` has shape (6, 63), expected (6, 64)" in text


@pytest.mark.parametrize("kind", [TRAIN, EVALUATE])
def test_a_request_that_cannot_be_read_is_answered_with_the_reason(kind: str) -> None:
    assert "'request' is missing" in reason(ask(RecordDict(), kind))


def test_a_missing_data_file_becomes_one_sentence(tmp_path: Path) -> None:
    config = parse_run_config({"dataset": "uji"})
    text = reason(ask(roll_call(), ROLL_CALL, config=config, data_dir=str(tmp_path)))
    assert str(tmp_path) in text
    assert "does not exist" in text


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"partition_id": 4}, "`partition-id` must be below"), ({"colour": "red"}, "there is no node setting `colour`")],
)
def test_a_mistake_in_the_node_settings_becomes_one_sentence(settings: dict[str, Any], words: str) -> None:
    assert words in reason(ask(roll_call(), ROLL_CALL, **settings))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device that must be missing")
def test_a_missing_device_becomes_one_sentence() -> None:
    assert '`device` is "cuda", but this node has no CUDA' in reason(ask(roll_call(), ROLL_CALL, device="cuda"))


def test_a_defect_is_raised_and_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(client, "run_round", defect)
    reply = ask(train_request(IDS[0]), TRAIN)
    assert reply.has_error()
    assert "a defect" in str(reply.error.reason)


def context(partition: int, **settings: Any) -> Context:
    node_config = {"partition-id": partition, "num-partitions": 2}
    return Context(1, 7, node_config, RecordDict(), parse_run_config(settings).flat())  # type: ignore[arg-type]


def test_a_node_is_built_once_for_the_same_settings() -> None:
    assert node_of(context(0)) is node_of(context(0))
    assert node_of(context(0)) is not node_of(context(1))
    assert node_of(context(0)) is not node_of(context(0, seed=1))


def test_node_settings_win_over_those_of_the_run() -> None:
    own = context(0, **{"chunk-size": 8})
    assert node_of(own).chunk_size == 8
    own.node_config["chunk-size"] = 3
    assert node_of(own).chunk_size == 3


def test_several_episodes_are_averaged_within_each_task() -> None:
    meta = {}
    gradients, losses, weights = [], [], []
    for episodes in (1, 3):
        config = parse_run_config({"mlp.hidden": "6", "episodes": episodes, "algorithm": "fomaml"}).resolved()
        grid = LoopbackGrid(1, config.flat())
        module = build_model("mlp", config.table("mlp"), (1, 8, 8), 5, 0)
        meta = {name: value.detach() for name, value in module.named_parameters()}
        request = TrainRequest(meta, 1, 0, ["device-00", "device-01"]).to_records()
        (reply,) = grid.send_and_receive([Message(request, 100, TRAIN)])
        answer = TrainReply.from_records(reply.content, 2)
        gradients.append(answer.gradient)
        losses.append(answer.losses)
        weights.append(answer.weight)
    assert weights == [2.0, 2.0]
    # By hand: three draws of each of the two tasks, every one with the same weight.
    algorithm = ALGORITHMS["fomaml"](config.table("fomaml"), Learner(module, "classification"))
    dataset = load_dataset("digits", config.table("digits"), Path())
    own: list[list[float]] = []
    mean = {name: torch.zeros_like(value) for name, value in meta.items()}
    for task_id in ("device-00", "device-01"):
        own.append([])
        for episode in range(3):
            data = dataset.train_draw(task_id, generator(0, "train", 1, task_id, episode))
            nothing = Minibatches(torch.zeros(0, 0, dtype=torch.long), torch.zeros(0, 0))
            gradient, loss = algorithm.meta_gradient(meta, Episode(data.support, data.query), nothing)
            own[-1].append(float(loss))
            mean = {name: value + gradient[name] / 6 for name, value in mean.items()}
    assert losses[1] == pytest.approx([sum(part) / 3 for part in own], abs=1e-6)
    assert losses[0] == pytest.approx([part[0] for part in own], abs=1e-6)
    for name, value in mean.items():
        assert torch.allclose(gradients[1][name], value, atol=1e-6)
