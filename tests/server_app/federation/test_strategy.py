"""The strategy: the same run however tasks are spread, held-out tasks apart, and broken nodes that cost only their reply."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.error import Error
from loopback import Fault, LoopbackGrid

from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.errors import RunError
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params
from quickbloom.common.models import build_model
from quickbloom.common.wire.messages import (
    EVALUATE,
    TRAIN,
    EvaluateRequest,
    TrainRequest,
    error_records,
    from_arrays,
    to_arrays,
)
from quickbloom.server_app.federation.outer import OuterOptimizer
from quickbloom.server_app.federation.roll_call import call_roll
from quickbloom.server_app.federation.scores import Scores
from quickbloom.server_app.federation.strategy import MetaStrategy
from quickbloom.server_app.messaging import polling_grid
from quickbloom.server_app.messaging.exchange import Exchange
from quickbloom.server_app.messaging.polling_grid import PollingGrid

Answer = Callable[[Message], Message]
Record = dict[str, Any]


class Run:
    """A strategy on a loopback grid: digits, Reptile, a small model, unless asked otherwise."""

    def __init__(self, nodes: int = 3, faults: Mapping[int, Fault] | None = None, **settings: Any) -> None:
        flat = {"mlp.hidden": "8", "min-nodes": 1, "rounds": 4, "evaluate-every": 2, "adapt-steps": 3, "seed": 2}
        flat |= {"round-deadline": 0.5, **{key.replace("_", "-").replace("--", "."): v for key, v in settings.items()}}
        config = self.config = parse_run_config(flat).resolved()
        self.grid = LoopbackGrid(nodes, config.flat(), faults)
        self.population = call_roll(LoopbackGrid(nodes, config.flat()), config)
        spec = self.population.spec
        module = build_model(config.model, config.table(config.model), spec.input_shape, spec.outputs, config.seed)
        algorithm = ALGORITHMS[config.algorithm](config.table(config.algorithm), Learner(module, spec.kind))
        outer = OuterOptimizer(algorithm.options, algorithm.init(), config.rounds)
        self.records: list[Record] = []
        self.strategy = MetaStrategy(config, self.population, algorithm, outer, self.records.append)

    def start(self) -> list[Record]:
        meta = to_arrays(self.strategy.outer.meta)
        self.strategy.start(self.grid, meta, num_rounds=self.config.rounds, timeout=self.config.round_deadline)
        return self.records

    def asked(self, kind: str) -> list[list[str]]:
        """Task ids of every message of this kind."""
        reader = TrainRequest if kind == TRAIN else EvaluateRequest
        return [
            reader.from_records(message.content).task_ids
            for message in self.grid.requests
            if message.metadata.message_type == kind
        ]


def close(one: Params, other: Params, atol: float) -> bool:
    return all(torch.allclose(value, other[name], rtol=0, atol=atol) for name, value in one.items())


# ---- which tasks


def test_tasks_of_a_round_depend_on_seed_and_round_alone() -> None:
    runs = [Run(nodes, tasks_per_round=7).strategy for nodes in (1, 2, 60)]
    for number in (1, 2, 3):
        chosen = [strategy.choose_tasks(number) for strategy in runs]
        assert chosen[0] == chosen[1] == chosen[2]
        assert len(set(chosen[0])) == 7
    assert runs[0].choose_tasks(1) != runs[0].choose_tasks(2)
    assert runs[0].choose_tasks(1) == runs[0].choose_tasks(1)
    assert runs[0].choose_tasks(1) != Run(1, tasks_per_round=7, seed=3).strategy.choose_tasks(1)


@pytest.mark.parametrize(
    ("settings", "number"),
    [
        ({}, 37),
        ({"fraction": 0.5}, 19),
        ({"fraction": 0.001}, 1),
        ({"tasks_per_round": 5, "fraction": 0.5}, 5),
        ({"tasks_per_round": 999}, 37),
    ],
)
def test_number_of_tasks_in_a_round(settings: dict[str, Any], number: int) -> None:
    # 56 tasks less 15 % (8) and 20 % (11) leave 37; a part is rounded up.
    assert len(Run(**settings).strategy.choose_tasks(1)) == number


def test_a_strategy_of_ones_own_may_change_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with Flower's strategies, the requests of a round are those that `configure_train` returns."""
    run, theirs = Run(3, rounds=2), MetaStrategy.configure_train

    def fewer(self: MetaStrategy, number: int, arrays: ArrayRecord, config: ConfigRecord, grid: Any) -> list[Message]:
        return theirs(self, number, arrays, config, grid)[:1]

    monkeypatch.setattr(MetaStrategy, "configure_train", fewer)
    run.start()
    assert len(run.asked(TRAIN)) == 2  # one request a round, not three


def test_held_out_tasks_never_get_a_training_message() -> None:
    run = Run(4, tasks_per_round=9)
    run.start()
    train = {task_id for ids in run.asked(TRAIN) for task_id in ids}
    assert train <= set(run.population.splits["train"])
    assert len(run.asked(TRAIN)) <= 4 * 4
    assert {task_id for ids in run.asked(EVALUATE) for task_id in ids} == set(run.population.splits["validation"])


def test_a_message_goes_only_to_nodes_that_host_a_task_of_the_round() -> None:
    run = Run(10, tasks_per_round=2, rounds=1)
    run.start()
    for message in run.grid.requests:
        ids = TrainRequest.from_records(message.content).task_ids if message.metadata.message_type == TRAIN else []
        assert all(run.population.homes[task_id] == message.metadata.dst_node_id for task_id in ids)
    assert sum(len(ids) for ids in run.asked(TRAIN)) == 2


# ---- rounds


def test_rounds_are_the_same_on_1_2_and_60_nodes() -> None:
    one, two, sixty = (Run(nodes) for nodes in (1, 2, 60))
    losses = [[record["train"]["loss"] for record in run.start()] for run in (one, two, sixty)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert losses[2] == pytest.approx(losses[0], abs=1e-6)
    for other in (two, sixty):
        assert close(other.strategy.outer.meta, one.strategy.outer.meta, 1e-6)


def test_training_lowers_the_loss() -> None:
    records = Run(1, rounds=20, evaluate_every=0, mlp__hidden="64", reptile__inner_steps=20, reptile__outer_decay=False).start()
    assert records[-1]["train"]["loss"] < 0.8 * records[0]["train"]["loss"]


def test_history_has_a_line_per_round_and_scores_when_due() -> None:
    records = Run(rounds=5, evaluate_every=2).start()
    assert [record["round"] for record in records] == [1, 2, 3, 4, 5]
    assert [record["round"] for record in records if "validation" in record] == [2, 4, 5]
    for record in records:
        assert record["train"]["tasks"] == 37
        assert record["failures"] == []
        assert record["bytes"]["up"] > 0 < record["bytes"]["down"]
        assert record["seconds"] > 0


def test_scores_only_after_the_last_round_where_none_are_asked_for() -> None:
    records = Run(rounds=3, evaluate_every=0).start()
    assert ["validation" in record for record in records] == [False, False, True]


def test_flower_drives_it_and_gets_the_final_parameters() -> None:
    run = Run()
    result = run.strategy.start(run.grid, to_arrays(run.strategy.outer.meta), num_rounds=4, timeout=1)
    assert close(from_arrays(result.arrays), run.strategy.outer.meta, 0.0)
    assert sorted(result.train_metrics_clientapp) == [1, 2, 3, 4]
    assert sorted(result.evaluate_metrics_clientapp) == [2, 4]
    assert {"accuracy-before", "accuracy-after"} == set(result.evaluate_metrics_clientapp[4])


def test_the_order_in_which_replies_come_leaves_every_bit_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Run(5), Run(5)
    pull = other.grid.pull_messages
    monkeypatch.setattr(other.grid, "pull_messages", lambda message_ids: pull(message_ids)[::-1])
    assert [r["train"] for r in one.start()] == [r["train"] for r in other.start()]
    assert close(one.strategy.outer.meta, other.strategy.outer.meta, 0.0)


class Shuffled(LoopbackGrid):
    """Gives no reply in the first look after a message, and later those that it is asked for last to first."""

    looked = False

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        self.looked = False
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        looked, self.looked = self.looked, True
        return super().pull_messages(list(message_ids)[::-1]) if looked else []


@pytest.mark.parametrize("large", [0, 10**9], ids=["large", "small"])
@pytest.mark.parametrize("kind", ["", "garbage", "silent", "raises", "nan"])
def test_large_replies_are_summed_as_small_ones_are_whoever_fails(
    kind: str, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = {1: FAULTS[kind][0]} if kind else {}
    plain, other = (Run(5, faults, rounds=2, evaluate_every=2) for _ in range(2))
    expected = plain.start()
    monkeypatch.setattr(polling_grid, "LARGE", large)
    grid = Shuffled(5, other.config.flat(), faults)
    timeout = 3.0 if kind == "silent" else None
    other.strategy.start(PollingGrid(grid), ArrayRecord(), num_rounds=2, timeout=timeout)
    for key in ("train", "validation", "failures", "bytes"):
        found = [record.get(key) for record in other.records]
        assert found == [record.get(key) for record in expected]
    assert close(plain.strategy.outer.meta, other.strategy.outer.meta, 0.0)


def test_a_reply_is_added_up_as_soon_as_it_is_its_turn() -> None:
    run, taken = Run(3), list[int]()
    exchange = Exchange(run.config, run.population)
    messages = exchange.address({100: ["a"], 101: ["b"], 102: ["c"]}, "query.none", 1, lambda *_: RecordDict())
    run.grid.push_messages(messages)
    replies = {message.metadata.dst_node_id: Message(RecordDict(), reply_to=message) for message in messages}

    def coming() -> Iterator[Message]:
        for node_id, before in ((101, 0), (100, 0), (102, 2)):
            assert len(taken) == before
            yield replies[node_id]

    exchange.receive(coming(), lambda node_id, *_: taken.append(node_id))
    assert taken == [100, 101, 102]


def test_a_run_without_validation_tasks_works() -> None:
    run = Run(validation_tasks=0)
    assert not any("validation" in record for record in run.start())
    assert run.strategy.evaluation.last is None


# ---- nodes that fail


def replaced(gradient: Callable[[Params], Params] = lambda g: g, **metrics: Any) -> Fault:
    """The true reply with its gradient or some of its metrics changed."""

    def fault(message: Message, answer: Answer) -> Message:
        reply = answer(message)
        if message.metadata.message_type != TRAIN:
            return reply
        records = RecordDict(dict(reply.content))
        records["gradient"] = to_arrays(gradient(from_arrays(reply.content.array_records["gradient"])))
        records["metrics"] = MetricRecord({**reply.content.metric_records["metrics"], **metrics})
        return Message(records, reply_to=message)

    return fault


def pickled(message: Message, answer: Answer) -> Message:
    records = RecordDict(dict(answer(message).content))
    records["gradient"] = ArrayRecord({"w": Array("object", (1,), "numpy.ndarray", b"\x80\x04garbage")})
    return Message(records, reply_to=message)


def first(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Params], Params]:
    return lambda gradient: {name: change(value) if name == "1.weight" else value for name, value in gradient.items()}


FAULTS: dict[str, tuple[Fault, str]] = {
    "raises": (
        lambda message, _: Message(Error(code=0, reason="ValueError: boom"), reply_to=message),
        "error 0: ValueError: boom",
    ),
    "refuses": (lambda message, _: Message(error_records("no data file"), reply_to=message), "no data file"),
    "silent": (lambda message, _: None, "it sent no reply within `round-deadline` (0.5 s)"),
    "empty": (
        lambda message, _: Message(RecordDict(), reply_to=message),
        "its reply is of no use: the field 'metrics' is missing",
    ),
    "garbage": (pickled, "its reply is of no use: it cannot be read"),
    "shape": (replaced(first(lambda value: value[:, 1:])), "the tensor `1.weight` has shape (8, 63), expected (8, 64)"),
    "dtype": (replaced(first(lambda value: value.long())), "the tensor `1.weight` has dtype int64, expected float32"),
    "missing": (replaced(lambda g: {k: v for k, v in g.items() if k != "1.bias"}), "the tensor `1.bias` is missing"),
    "surplus": (replaced(lambda g: {**g, "x": torch.zeros(1)}), "there is an unexpected tensor `x`"),
    "huge": (
        replaced(first(lambda value: value * 0 + 1e30)),
        "the tensor `1.weight` holds NaN, infinity or numbers that are too",
    ),
    "nan": (
        replaced(first(lambda value: value * math.nan)),
        "the tensor `1.weight` holds NaN, infinity",
    ),
    "losses": (replaced(losses=[0.5]), "`losses` must have"),
    "weight": (replaced(weight=1e300), "`weight` is 1e+300, but the tasks asked for can have at most"),
    "negative": (replaced(weight=-1.0), "`weight` must not be negative"),
}


@pytest.mark.parametrize("kind", sorted(FAULTS))
def test_a_broken_node_costs_its_reply_and_is_named(kind: str) -> None:
    fault, words = FAULTS[kind]
    broken, whole = Run(4, {2: fault}, rounds=1, validation_tasks=0), Run(4, rounds=1, validation_tasks=0)
    kept = [task_id for task_id in whole.population.splits["train"] if whole.population.homes[task_id] != 102]
    whole.population.splits["train"] = kept
    (record,), (expected,) = broken.start(), whole.start()
    assert close(broken.strategy.outer.meta, whole.strategy.outer.meta, 1e-7)
    assert record["train"]["loss"] == pytest.approx(expected["train"]["loss"])
    ((failure,), total) = record["failures"], broken.strategy.failures
    assert (failure["who"], total) == ("node 102", 1)
    assert words in failure["reason"]


@pytest.mark.parametrize("kind", ["raises", "silent", "nan", "weight"])
def test_a_round_without_a_usable_reply_ends_the_run_with_the_reasons(kind: str) -> None:
    fault, words = FAULTS[kind]
    run = Run(2, {0: fault, 1: fault})
    before = run.strategy.outer.meta
    with pytest.raises(RunError, match="round 1: no node sent a usable reply: ") as caught:
        run.start()
    assert words in str(caught.value)
    assert close(run.strategy.outer.meta, before, 0.0)


def test_a_node_that_only_fails_to_score_leaves_the_scores_of_the_others() -> None:
    def fault(message: Message, answer: Answer) -> Message | None:
        return None if message.metadata.message_type == EVALUATE else answer(message)

    run = Run(3, {1: fault}, evaluate_every=0)
    record = run.start()[-1]
    kept = [task_id for task_id in run.population.splits["validation"] if run.population.homes[task_id] != 101]
    assert run.strategy.evaluation.last is not None
    assert run.strategy.evaluation.last.task_ids == kept
    assert record["validation"]["tasks"] == len(kept) < 8
    assert [failure["who"] for failure in record["failures"]] == ["node 101"]


def gone_for(times: int, code: int = 5) -> Fault:
    """A node that Flower does not reach for so many requests of scores, and that is back at the next roll call.

    `code`: 5 if it is gone before it answers, 3 if it is while it uploads its answer.
    """
    left = [times]

    def fault(message: Message, answer: Answer) -> Message:
        if message.metadata.message_type == EVALUATE and left[0]:
            left[0] -= 1
            return Message(Error(code=code, reason="gone"), reply_to=message)
        return answer(message)

    return fault


@pytest.mark.parametrize("code", [5, 3])
def test_scores_of_a_node_that_comes_back_are_waited_for_where_nothing_may_be_lost(code: int) -> None:
    undisturbed, run = Run(3, rounds=1), Run(3, {1: gone_for(2, code)}, rounds=1, on_too_few="repeat")
    expected, record = undisturbed.start()[-1], run.start()[-1]
    assert record["validation"] == expected["validation"]
    assert [failure["who"] for failure in record["failures"]] == ["node 101", "node 101"]
    run.grid._faults[1] = gone_for(1, code)
    test = run.population.splits["test"]
    scores = run.strategy.score_tasks(run.grid, run.strategy.outer.meta, test, [0.1])
    reference = undisturbed.strategy.score_tasks(undisturbed.grid, undisturbed.strategy.outer.meta, test, [0.1])
    assert scores.task_ids == reference.task_ids == test
    assert np.allclose(scores.losses, reference.losses, rtol=0, atol=1e-6)


def test_scores_of_a_node_that_stays_away_are_waited_for_until_the_deadline() -> None:
    run = Run(3, {1: gone_for(10**6)}, rounds=1, on_too_few="repeat", node_deadline=0.2)
    kept = [task_id for task_id in run.population.splits["validation"] if run.population.homes[task_id] != 101]
    assert run.start()[-1]["validation"]["tasks"] == len(kept)


def test_scores_are_not_waited_for_by_default() -> None:
    run = Run(3, {1: gone_for(1)}, rounds=1)
    assert run.start()[-1]["validation"]["tasks"] < 8
    assert len(run.asked(EVALUATE)) == 3


def test_a_task_that_did_not_contribute_is_named() -> None:
    run = Run(2, {0: replaced(losses=[math.nan, *[0.5] * 18])}, rounds=1, seed=2)
    asked = [task_id for task_id in run.strategy.choose_tasks(1) if run.population.homes[task_id] == 100]
    run.grid._faults[0] = replaced(losses=[math.nan, *[0.5] * (len(asked) - 1)], weight=len(asked) - 1.0)
    (record,) = run.start()
    assert [failure["who"] for failure in record["failures"]] == [f"task {asked[0]}"]
    assert record["train"]["tasks"] == 36


def test_scores_outside_the_rounds_cover_the_tasks_asked_for() -> None:
    run = Run(3)
    test = run.population.splits["test"]
    scores = run.strategy.score_tasks(run.grid, run.strategy.outer.meta, test, [0.1, 0.3])
    assert (scores.task_ids, scores.lrs) == (test, [0.1, 0.3])
    assert scores.metrics.shape == (len(test), 2, 4)
    assert run.asked(TRAIN) == []


# ---- the rate for adapting


def choose(metrics: Any, losses: Any = None, *, regression: bool = False) -> tuple[float, int]:
    """`metrics` [rates 0.1 and 0.5, steps 0..] of a single task."""
    values = np.array([metrics], dtype=float)
    strategy = Run(1, dataset="sinusoid", sinusoid__clients=10).strategy if regression else Run(1).strategy
    return strategy.evaluation.choose_rate(
        Scores(["a"], [0.1, 0.5], np.zeros(values.shape) if losses is None else np.array([losses]), values)
    )


def test_best_mean_accuracy_is_chosen_and_step_zero_is_no_choice() -> None:
    assert choose([[0.9, 0.2, 0.3], [0.9, 0.4, 0.35]]) == (0.5, 1)


def test_ties_go_to_the_lower_loss_and_then_to_fewer_steps() -> None:
    tied = [[0.1, 0.6, 0.6], [0.1, 0.6, 0.6]]
    assert choose(tied, [[9.0, 3.0, 2.0], [9.0, 1.0, 2.5]]) == (0.5, 1)
    assert choose(tied, [[9.0, 2.0, 2.0], [9.0, 2.0, 2.0]]) == (0.1, 1)


def test_lowest_error_is_chosen_in_regression() -> None:
    assert choose([[0.0, 0.5, 0.4], [0.0, 0.3, 0.6]], regression=True) == (0.5, 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_rate_that_diverges_is_never_chosen(bad: float) -> None:
    assert choose([[1.0, 2.0, 3.0], [0.0, bad, bad]], regression=True) == (0.1, 1)
    assert choose([[0.0, 0.5, 0.5], [0.0, 0.5, 0.5]], [[1.0, 4.0, 5.0], [1.0, bad, bad]]) == (0.1, 1)


def test_rates_hold_the_algorithms_own_inner_rate() -> None:
    assert Run(adapt_lrs="0.5,0.01", reptile__inner_lr=0.07).strategy.evaluation.lrs == [0.01, 0.07, 0.5]
