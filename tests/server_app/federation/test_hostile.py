"""Whatever a hostile node replies, the model is that of the honest nodes alone, and the strategy goes on.

`QUICKBLOOM_FUZZ=100000` tries so many replies; a few hundred by default.
"""

import os
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.error import Error
from hostile import ANYTHING, ERRORS, MORE_VALUES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loopback import LoopbackGrid

from quickbloom.common.algorithms.base import Algorithm
from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.maths.params import Params
from quickbloom.common.wire import packing
from quickbloom.common.wire.messages import EVALUATE, TRAIN, from_arrays, to_arrays
from quickbloom.server_app.federation.outer import OuterOptimizer
from quickbloom.server_app.federation.roll_call import call_roll
from quickbloom.server_app.federation.strategy import MetaStrategy
from quickbloom.server_app.messaging.polling_grid import PollingGrid
from quickbloom.server_app.messaging.population import Population

EXAMPLES = int(os.environ.get("QUICKBLOOM_FUZZ", "300"))
HONEST, HOSTILE = 100, 101
BEFORE = {"a": 1.0}

Record = ArrayRecord | ConfigRecord | MetricRecord
Change = Callable[[RecordDict], RecordDict]


class Setting(NamedTuple):
    config: RunConfig
    grid: LoopbackGrid
    population: Population
    algorithm: Algorithm
    true: dict[tuple[int, str], RecordDict]
    """The true replies, by node and type of message."""
    model: Params
    """After one round of the honest node alone."""
    scored: list[str]


@cache
def setting() -> Setting:
    flat: dict[str, Any] = {"dataset": "gaussian", "gaussian.clients": 8, "model": "linear", "algorithm": "reptile"}
    flat |= {"min-nodes": 1, "rounds": 1, "adapt-steps": 2, "max-update-norm": 50.0, "validation-tasks": 3, "test-tasks": 1}
    config = parse_run_config(flat).resolved()
    grid = LoopbackGrid(2, config.flat())
    population = call_roll(grid, config)
    algorithm = build_algorithm(config, population.spec)
    true: dict[tuple[int, str], RecordDict] = {}
    strategy = fresh(config, population, algorithm)
    meta = to_arrays(strategy.outer.meta)
    for messages in (
        strategy.configure_train(1, meta, ConfigRecord(), grid),
        strategy.configure_evaluate(1, meta, ConfigRecord(), grid),
    ):
        for message in messages:
            reply = grid.answer(message)
            assert reply is not None
            true[message.metadata.dst_node_id, message.metadata.message_type] = reply.content
    assert len(true) == 4
    one = from_arrays(true[HONEST, TRAIN].array_records["gradient"])
    alone = OuterOptimizer(algorithm.options, algorithm.init(), config.rounds)
    alone.step(one, 1)
    scored = [task_id for task_id in population.splits["validation"] if population.homes[task_id] == HONEST]
    return Setting(config, grid, population, algorithm, true, alone.meta, scored)


def fresh(config: RunConfig, population: Population, algorithm: Algorithm, seen: list[Any] | None = None) -> MetaStrategy:
    outer = OuterOptimizer(algorithm.options, algorithm.init(), config.rounds)
    return MetaStrategy(config, population, algorithm, outer, (seen if seen is not None else []).append)


# ---- what a hostile node may reply


def with_metrics(**fields: Any) -> Change:
    def change(records: RecordDict) -> RecordDict:
        values = {**records.metric_records["metrics"], **fields}
        return RecordDict({**records, "metrics": MetricRecord({k: v for k, v in values.items() if v is not None})})

    return change


def with_list(name: str, values: list[float]) -> Change:
    """The list `name` becomes another one of the wrong length."""

    def change(records: RecordDict) -> RecordDict:
        right = records.metric_records["metrics"][name]
        assert isinstance(right, list)
        return with_metrics(**{name: [*values, 0.5] if len(values) == len(right) else values})(records)

    return change


def filled(name: str, value: float) -> Change:
    """Every number of the list `name` becomes `value`."""

    def change(records: RecordDict) -> RecordDict:
        right = records.metric_records["metrics"][name]
        assert isinstance(right, list)
        return with_metrics(**{name: [value] * len(right)})(records)

    return change


def with_gradient(change: Callable[[Params], Params]) -> Change:
    return lambda records: RecordDict(
        {**records, "gradient": to_arrays(change(from_arrays(records.array_records["gradient"])))}
    )


def with_raw(change: Callable[[Array], Array]) -> Change:
    def raw(records: RecordDict) -> RecordDict:
        arrays = dict(records.array_records["gradient"])
        name = next(iter(arrays))
        return RecordDict({**records, "gradient": ArrayRecord({**arrays, name: change(arrays[name])})})

    return raw


def each(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return with_gradient(lambda gradient: {name: change(value) for name, value in gradient.items()})


HUGE = st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e30, -1e38, 1e18, 1e4])
WRONG_NUMBER = st.floats(max_value=-1e-9) | st.sampled_from(
    [float("nan"), float("inf"), 1e300, 10**400, -(10**400), 2**63, 0, 0.0]
)
LISTS = st.lists(st.floats() | st.just(1e300), max_size=9) | st.integers(10, 20_000).map(lambda n: [0.5] * n)
TRAIN_CHANGES: st.SearchStrategy[Change] = st.one_of(
    HUGE.map(lambda value: each(lambda tensor: torch.full_like(tensor, value))),
    st.sampled_from([torch.float64, torch.float16, torch.int64, torch.bool, torch.uint8, torch.complex64]).map(
        lambda dtype: each(lambda tensor: tensor.to(dtype))
    ),
    st.sampled_from(
        [
            each(lambda tensor: tensor.unsqueeze(0)),
            each(lambda tensor: tensor.flatten()[:-1]),
            each(lambda tensor: tensor.new_zeros(0, 1)),  # [0] alone stands for a tensor of zeros
            each(lambda tensor: tensor.sum()),
            with_gradient(lambda gradient: dict(list(gradient.items())[1:])),
            with_gradient(lambda gradient: {}),
            with_gradient(lambda gradient: {name.upper(): value for name, value in gradient.items()}),
            with_raw(lambda array: Array(array.dtype, array.shape, "pickle", array.data)),
            with_raw(lambda array: Array(array.dtype, array.shape, array.stype, array.data[:-1])),
            with_raw(lambda array: Array(array.dtype, array.shape, array.stype, array.data + b"\0")),
            with_raw(lambda array: Array(array.dtype, array.shape, array.stype, array.data.replace(b"'<f4'", b"'>f4'"))),
            with_raw(lambda array: Array(array.dtype, array.shape, array.stype, array.data.replace(b"'<f4'", b"'|O4'"))),
        ]
    ),
    st.text(max_size=2000).map(lambda name: with_gradient(lambda gradient: {**gradient, name + "x": torch.zeros(1)})),
    st.binary(max_size=200).map(lambda data: with_raw(lambda array: Array("float32", (1,), array.stype, data))),
    st.binary(max_size=60).map(
        lambda data: with_raw(lambda array: Array("float32", (1,), array.stype, b"\x93NUMPY\x01\x00" + data + array.data[10:]))
    ),
    WRONG_NUMBER.map(lambda value: with_metrics(weight=value)),
    st.sampled_from([-1, -1e-9, float("nan"), float("inf"), 10**400]).map(lambda value: with_metrics(within=value)),
    LISTS.map(lambda values: with_list("losses", values)),
    st.sampled_from([-1.0, 1e300, -float("inf"), float("nan")]).map(lambda value: filled("losses", value)),
    st.sampled_from([with_metrics(weight=None), with_metrics(losses=None), with_metrics(within=None), with_metrics(more=1)]),
)
EVALUATE_CHANGES: st.SearchStrategy[Change] = st.one_of(
    st.sampled_from(["losses", "scores"]).flatmap(lambda name: LISTS.map(lambda values: with_list(name, values))),
    st.sampled_from([-1.0, 1.5, 1e300, float("nan"), float("inf")]).map(lambda value: filled("scores", value)),
    st.sampled_from([-5.0, 1e300, -float("inf")]).map(lambda value: filled("losses", value)),
    st.sampled_from([with_metrics(losses=None), with_metrics(scores=None), with_metrics(seconds=-1.0), with_metrics(more=[1])]),
)


def with_packed(change: Callable[[bytes], Any]) -> Change:
    """The records travel as one, whose bytes become others."""

    def packed(records: RecordDict) -> RecordDict:
        content = packing.pack(records).config_records["packed"]["packed"]
        assert isinstance(content, bytes)
        return RecordDict({"packed": ConfigRecord({"packed": change(content)})})

    return packed


def as_one(records: RecordDict) -> RecordDict:
    try:
        return packing.pack(records)
    except ValueError:  # there are numbers that no node can send
        return records


PACKED: st.SearchStrategy[Change] = st.one_of(
    st.floats(0, 0.999).map(lambda part: with_packed(lambda content: content[: int(part * len(content))])),
    st.binary(max_size=99).map(lambda noise: with_packed(lambda content: noise)),
    MORE_VALUES.map(lambda value: with_packed(lambda content: value)),
)


def replies(changes: st.SearchStrategy[Change]) -> st.SearchStrategy[RecordDict | Error | Change]:
    in_one = changes.map(lambda change: lambda records: as_one(change(records)))
    return st.one_of(changes, changes, in_one, PACKED, ANYTHING, ERRORS)


def as_sent(records: RecordDict) -> RecordDict:
    """With records of its own, as over a network: the server takes them apart."""
    return RecordDict({key: ArrayRecord(dict(r)) if isinstance(r, ArrayRecord) else r for key, r in records.items()})


def play(kind: str, drawn: RecordDict | Error | Change) -> tuple[MetaStrategy, dict[str, Any]]:
    """One phase of a round in which the second node replies what was drawn: (strategy, its line of the history)."""
    config, nodes, population, algorithm, true, _, _ = setting()
    honest, own = (as_sent(true[node, kind]) for node in (HONEST, HOSTILE))
    content = drawn(own) if callable(drawn) else drawn
    grid = PollingGrid(nodes, packs=True)
    nodes._faults = {
        0: lambda message, _: Message(honest, reply_to=message),
        1: lambda message, _: Message(content, reply_to=message),
    }
    seen: list[dict[str, Any]] = []
    strategy = fresh(config, population, algorithm, seen)
    meta = to_arrays(strategy.outer.meta)
    if kind == TRAIN:
        sent = strategy.configure_train(1, meta, ConfigRecord(), grid)
        strategy.aggregate_train(1, grid.send_and_receive(sent))
        strategy.aggregate_evaluate(1, [])
    else:
        sent = strategy.configure_evaluate(1, meta, ConfigRecord(), grid)
        strategy.aggregate_evaluate(1, grid.send_and_receive(sent))
    return strategy, seen[0]


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(replies(TRAIN_CHANGES))
def test_no_hostile_update_changes_the_model_or_raises(drawn: RecordDict | Error | Change) -> None:
    strategy, record = play(TRAIN, drawn)
    assert all(torch.equal(value, setting().model[name]) for name, value in strategy.outer.meta.items())
    ((failure,), train) = record["failures"], record["train"]
    assert failure["who"] == f"node {HOSTILE}"
    assert failure["reason"].isprintable()
    assert len(failure["reason"]) <= 600
    honest = np.mean(setting().true[HONEST, TRAIN].metric_records["metrics"]["losses"])
    assert train["loss"] == pytest.approx(float(honest))


class HostileFirst(PollingGrid):
    """Replies of the hostile node are there before those of the honest one."""

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return sorted(super().pull_messages(message_ids), key=lambda reply: reply.metadata.src_node_id == HONEST)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(replies(TRAIN_CHANGES))
def test_in_mode_async_the_verdicts_are_the_same(drawn: RecordDict | Error | Change) -> None:
    _, record = play(TRAIN, drawn)
    waiting, nodes, population, algorithm, true, model, _ = setting()
    honest = sum(population.homes[task_id] == HONEST for task_id in population.splits["train"])
    config = parse_run_config({**waiting.flat(), "mode": "async", "async-buffer": honest}).resolved()
    seen: list[dict[str, Any]] = []
    strategy = fresh(config, population, algorithm, seen)
    own = as_sent(true[HOSTILE, TRAIN])
    content = drawn(own) if callable(drawn) else drawn
    nodes._faults = {
        0: lambda message, _: Message(as_sent(true[HONEST, TRAIN]), reply_to=message),
        1: lambda message, _: Message(content, reply_to=message),
    }
    strategy.training.round(HostileFirst(nodes, packs=True), 1, None, list)
    strategy.aggregate_evaluate(1, [])
    assert seen[0]["failures"] == record["failures"]
    assert all(torch.equal(value, model[name]) for name, value in strategy.outer.meta.items())


@settings(max_examples=max(EXAMPLES // 5, 60), deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(replies(EVALUATE_CHANGES))
def test_no_hostile_score_counts_or_raises(drawn: RecordDict | Error | Change) -> None:
    strategy, record = play(EVALUATE, drawn)
    assert strategy.evaluation.last is not None
    assert strategy.evaluation.last.task_ids == setting().scored
    assert [failure["who"] for failure in record["failures"]] == [f"node {HOSTILE}"]


@pytest.mark.parametrize("form", [lambda records: records, packing.pack])
def test_the_true_replies_of_both_nodes_count(form: Change) -> None:
    strategy, record = play(TRAIN, form)
    assert record["failures"] == []
    assert not all(torch.equal(value, setting().model[name]) for name, value in strategy.outer.meta.items())
    strategy, record = play(EVALUATE, form)
    assert record["failures"] == []
    assert strategy.evaluation.last is not None
    assert strategy.evaluation.last.task_ids == setting().population.splits["validation"]


@pytest.mark.parametrize("node", [HONEST, HOSTILE])
def test_a_reply_whose_numbers_lie_column_by_column_counts_like_any_other(node: int) -> None:
    config, grid, population, algorithm, true, _, _ = setting()
    columns = with_raw(lambda array: Array(np.asfortranarray(array.numpy())))
    replies = {at: columns(true[at, TRAIN]) if at == node else true[at, TRAIN] for at in (HONEST, HOSTILE)}
    models = []
    for content in (replies, {at: true[at, TRAIN] for at in replies}):
        strategy = fresh(config, population, algorithm)
        messages = strategy.configure_train(1, to_arrays(strategy.outer.meta), ConfigRecord(), grid)
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(message.metadata.dst_node_id)
        strategy.aggregate_train(1, [Message(as_sent(content[m.metadata.dst_node_id]), reply_to=m) for m in messages])
        models.append(strategy.outer.meta)
    torch.testing.assert_close(*models)


def test_nobody_answers_for_somebody_else() -> None:
    config, grid, population, algorithm, true, model, _ = setting()
    strategy = fresh(config, population, algorithm)
    messages = strategy.configure_train(1, to_arrays(strategy.outer.meta), ConfigRecord(), grid)
    grid._faults = {0: lambda message, _: Message(as_sent(true[HONEST, TRAIN]), reply_to=message), 1: lambda message, _: None}
    sent = grid.send_and_receive(messages)
    forged = Message(with_metrics(weight=0.5)(true[HONEST, TRAIN]), reply_to=messages[0])
    forged.metadata.__dict__["_src_node_id"] = HOSTILE
    strategy.aggregate_train(1, [*sent, forged])
    assert all(torch.equal(value, model[name]) for name, value in strategy.outer.meta.items())


def test_after_three_bad_replies_a_node_is_left_out() -> None:
    config, grid, population, algorithm, true, _, _ = setting()
    strategy = fresh(config, population, algorithm)
    bad = each(lambda tensor: tensor * float("nan"))(true[HOSTILE, TRAIN])
    grid._faults = {
        0: lambda message, _: Message(as_sent(true[HONEST, TRAIN]), reply_to=message),
        1: lambda message, _: Message(as_sent(bad), reply_to=message),
    }
    asked = []
    for number in range(1, 6):
        messages = strategy.configure_train(number, to_arrays(strategy.outer.meta), ConfigRecord(), grid)
        asked.append([message.metadata.dst_node_id for message in messages])
        strategy.aggregate_train(number, grid.send_and_receive(messages))
    assert asked == [[HONEST, HOSTILE]] * 3 + [[HONEST]] * 2
