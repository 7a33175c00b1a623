"""Nodes that are late, dead, back, back under another id, or send nonsense: what each costs, and what it does not."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from flwr.app import Message, RecordDict
from flwr.app.error import Error
from loopback import LoopbackGrid

from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.errors import ConfigError, RunError
from quickbloom.common.wire.messages import EVALUATE, TRAIN, TrainRequest, to_arrays
from quickbloom.common.wire.roll_call import ROLL_CALL
from quickbloom.server_app.federation.outer import OuterOptimizer
from quickbloom.server_app.federation.roll_call import call_roll
from quickbloom.server_app.federation.strategy import MetaStrategy
from quickbloom.server_app.messaging.polling_grid import PollingGrid

Answer = Callable[[Message], Message]


class Grid(LoopbackGrid):
    """Replies can be held back until they are let go, and a node can be reached under another id."""

    def __init__(self, nodes: int, run_config: dict[str, Any]) -> None:
        super().__init__(nodes, run_config)
        self.hold: Callable[[Message], bool] = lambda message: False
        self.held: dict[str, Message] = {}
        self.alias: dict[int, int] = {}

    def answer(self, message: Message) -> Message | None:
        asked = message.metadata.dst_node_id
        message.metadata.__dict__["_dst_node_id"] = self.alias.get(asked, asked)
        try:
            reply = super().answer(message)
        finally:
            message.metadata.__dict__["_dst_node_id"] = asked
        if reply is not None:
            reply.metadata.__dict__["_src_node_id"] = asked
        if reply is not None and self.hold(message):
            self.held[message.metadata.message_id] = reply
            return None
        return reply

    def let_go(self) -> None:
        self._replies |= self.held
        self.held = {}


def _nothing(federation: "Federation") -> None:
    """A round before which nothing happens."""


class Federation:
    """Digits on `nodes` nodes; `script` says what happens before the training messages of a round."""

    def __init__(self, nodes: int = 3, script: dict[int, Callable[["Federation"], None]] | None = None, **changes: Any) -> None:
        flat = {"mlp.hidden": "8", "min-nodes": 1, "rounds": 5, "evaluate-every": 0, "adapt-steps": 2, "seed": 2}
        flat |= {"node-deadline": 0.3, "round-deadline": 0.3, "validation-tasks": 0}
        flat |= {key.replace("_", "-"): value for key, value in changes.items()}
        self.config: RunConfig = parse_run_config(flat).resolved()
        self.grid = Grid(nodes, self.config.flat())
        self.population = call_roll(self.grid, self.config)
        self.algorithm = build_algorithm(self.config, self.population.spec)
        self.records: list[dict[str, Any]] = []
        outer = OuterOptimizer(self.algorithm.options, self.algorithm.init(), self.config.rounds)
        self.strategy = MetaStrategy(self.config, self.population, self.algorithm, outer, self._on_round)
        self.grid.requests.clear()
        self._script = script or {}

    def _on_round(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        self._script.get(record["round"] + 1, _nothing)(self)

    def start(self, *, polling: bool = False) -> list[dict[str, Any]]:
        self._script.get(1, _nothing)(self)
        grid = PollingGrid(self.grid) if polling else self.grid
        meta = to_arrays(self.strategy.outer.meta)
        self.strategy.start(grid, meta, num_rounds=self.config.rounds, timeout=self.config.round_deadline)
        return self.records

    def asked(self, kind: str = TRAIN) -> dict[int, list[int]]:
        """The nodes that got a message of this kind, by round; for the roll call all under 0."""
        nodes: dict[int, list[int]] = {}
        for message in self.grid.requests:
            if message.metadata.message_type == kind:
                number = 0 if kind == ROLL_CALL else int(message.metadata.group_id)
                nodes.setdefault(number, []).append(message.metadata.dst_node_id)
        return {number: sorted(ids) for number, ids in nodes.items()}

    def hosted(self, *node_ids: int) -> int:
        return sum(self.population.homes[task_id] in node_ids for task_id in self.population.splits["train"])


def holds(node_id: int, kinds: tuple[str, ...] = (TRAIN, ROLL_CALL)) -> Callable[[Federation], None]:
    """From now on this node answers nothing of these kinds."""

    def script(federation: Federation) -> None:
        federation.grid.hold = lambda m: m.metadata.dst_node_id == node_id and m.metadata.message_type in kinds

    return script


def free(federation: Federation) -> None:
    federation.grid.hold = lambda message: False


def frees(federation: Federation) -> None:
    free(federation)
    federation.grid.let_go()


# ---- late and dead nodes


def test_a_node_that_missed_the_deadline_is_not_asked_again() -> None:
    federation = Federation(script={2: holds(101)})
    records = federation.start(polling=True)
    assert federation.asked() == {1: [100, 101, 102], 2: [100, 101, 102], 3: [100, 102], 4: [100, 102], 5: [100, 102]}
    assert [[failure["who"] for failure in record["failures"]] for record in records] == [[], ["node 101"], [], [], []]
    assert [record["nodes"]["asked"] for record in records] == [3, 3, 2, 2, 2]
    assert [record["nodes"]["answered"] for record in records] == [3, 2, 2, 2, 2]
    assert [record["nodes"]["away"] for record in records] == [[], [101], [101], [101], [101]]
    assert records[2]["train"]["tasks"] == federation.hosted(100, 102)
    assert records[1]["seconds"] >= 0.3


def test_a_late_reply_is_dropped_and_counted_and_its_node_is_asked_again() -> None:
    federation = Federation(script={2: holds(101), 4: frees})
    records = federation.start()
    assert federation.asked() == {1: [100, 101, 102], 2: [100, 101, 102], 3: [100, 102], 4: [100, 101, 102], 5: [100, 101, 102]}
    assert [record["nodes"]["late"] for record in records] == [{}, {}, {}, {"node 101": 1}, {}]
    assert federation.strategy.late == 1
    # The model is the one of a federation in which the node was not there in rounds 2 and 3.
    other = Federation()
    whole = other.population.splits["train"]
    part = [task_id for task_id in whole if other.population.homes[task_id] != 101]
    other._script = {2: lambda f: f.population.splits.update(train=part), 4: lambda f: f.population.splits.update(train=whole)}
    other.start()
    for name, value in federation.strategy.outer.meta.items():
        assert torch.equal(value, other.strategy.outer.meta[name])


def test_a_node_whose_work_was_lost_is_called_and_comes_back_with_its_answer() -> None:
    def answers_again(federation: Federation) -> None:
        federation.grid.held.clear()
        free(federation)

    federation = Federation(script={2: holds(101), 4: answers_again}, node_deadline=0.001)
    records = federation.start(polling=True)
    # Called before round 4, when the first call is given up; its answer is seen before round 5.
    assert federation.asked()[4] == [100, 102]
    assert federation.asked()[5] == [100, 101, 102]
    told = {"asked": 3, "answered": 3, "away": [], "connected": 3, "late": {}, "trained": [100, 101, 102]}
    assert records[-1]["nodes"] == told


def test_a_node_that_is_not_connected_is_not_asked_until_it_is_back() -> None:
    def gone(federation: Federation) -> None:
        federation.grid.node_ids = [100, 102]

    def back(federation: Federation) -> None:
        federation.grid.node_ids = [100, 101, 102]

    federation = Federation(script={2: gone, 4: back})
    records = federation.start()
    assert [federation.asked()[number] for number in (1, 2, 3, 5)] == [[100, 101, 102], [100, 102], [100, 102], [100, 101, 102]]
    assert [len(record["failures"]) for record in records] == [0] * 5
    assert [record["nodes"]["connected"] for record in records] == [3, 2, 2, 3, 3]
    assert federation.asked(ROLL_CALL)[0] == [101]


def test_flowers_word_that_a_node_is_gone_is_believed() -> None:
    def dead(message: Message, answer: Answer) -> Message:
        if message.metadata.message_type == ROLL_CALL or message.metadata.group_id != "2":
            return answer(message)
        return Message(Error(code=5, reason="Node Unavailable"), reply_to=message)

    federation = Federation(script={2: lambda f: f.grid._faults.update({1: dead})})
    federation.start()
    assert (federation.asked()[3], federation.asked(ROLL_CALL)[0]) == ([100, 102], [101])
    assert federation.asked()[4] == [100, 101, 102]


def test_a_node_that_is_back_under_another_id_takes_its_tasks_with_it() -> None:
    def restarted(federation: Federation) -> None:
        federation.grid.alias = {555: 101}
        federation.grid.node_ids = [100, 101, 102, 555]

    def old_id_lapsed(federation: Federation) -> None:
        federation.grid.node_ids = [100, 102, 555]

    federation = Federation(script={2: restarted, 4: old_id_lapsed})
    records = federation.start()
    assert federation.asked()[3] == [100, 101, 102]  # as long as the old one is there, it keeps its tasks
    assert federation.asked()[5] == [100, 102, 555]
    assert records[-1]["train"]["tasks"] == 48 - 3 == federation.hosted(100, 102, 555)
    assert federation.asked(ROLL_CALL)[0] == [555]


# ---- bad replies


def test_after_three_bad_replies_a_node_is_left_out_for_the_run() -> None:
    def nonsense(message: Message, answer: Answer) -> Message:
        return Message(RecordDict(), reply_to=message) if message.metadata.message_type == TRAIN else answer(message)

    federation = Federation(script={1: lambda f: f.grid._faults.update({1: nonsense})})
    records = federation.start()
    assert [101 in federation.asked()[number] for number in (1, 2, 3, 4, 5)] == [True, True, True, False, False]
    reasons = [failure["reason"] for record in records for failure in record["failures"]]
    assert len(reasons) == federation.strategy.failures == 3
    assert ["left out" in reason for reason in reasons] == [False, False, True]
    assert records[-1]["nodes"]["away"] == [101]
    scores = federation.strategy.score_tasks(
        federation.grid, federation.strategy.outer.meta, federation.population.splits["test"], [0.1]
    )
    assert all(federation.population.homes[task_id] != 101 for task_id in scores.task_ids)
    assert 101 not in federation.asked(EVALUATE)[5]


# ---- over-selection


def test_more_tasks_are_asked_and_the_round_ends_when_enough_answered() -> None:
    federation = Federation(
        9, {1: holds(104)}, tasks_per_round=20, over_select=1.3, round_deadline=120.0, node_deadline=30.0, rounds=3
    )
    records = federation.start(polling=True)
    assert records[0]["seconds"] < 120  # the deadline was not waited for
    first = [
        TrainRequest.from_records(m.content).task_ids
        for m in federation.grid.requests
        if m.metadata.message_type == TRAIN and m.metadata.group_id == "1"
    ]
    assert sum(map(len, first)) == math.ceil(1.3 * 20)
    held = [ids for ids in first if federation.population.homes[ids[0]] == 104]
    assert records[0]["train"]["tasks"] == 26 - len(held[0]) >= 20
    assert all(record["failures"] == [] for record in records)
    assert 104 not in federation.asked()[2] + federation.asked()[3]


def test_without_enough_answers_over_selection_waits_for_the_deadline_and_names_who_was_missing() -> None:
    federation = Federation(2, {1: holds(101)}, tasks_per_round=20, over_select=1.3, rounds=1)
    (record,) = federation.start(polling=True)
    assert record["seconds"] >= 0.3
    assert [failure["who"] for failure in record["failures"]] == ["node 101"]


def test_the_result_depends_on_who_answered_alone() -> None:
    metas = []
    for order in (1, -1):
        federation = Federation(9, tasks_per_round=20, over_select=1.3, rounds=2)
        pull = federation.grid.pull_messages
        federation.grid.pull_messages = lambda ids, pull=pull, order=order: pull(ids)[::order]  # type: ignore[misc,method-assign]
        federation.start(polling=True)
        metas.append(federation.strategy.outer.meta)
    assert all(torch.equal(value, metas[1][name]) for name, value in metas[0].items())


# ---- too few


def silent(federation: Federation) -> None:
    federation.grid.hold = lambda message: message.metadata.dst_node_id != 100


@pytest.mark.parametrize("least", [0.9, 40])
def test_too_few_contributions_stop_the_run_with_the_reasons(least: float) -> None:
    federation = Federation(script={2: silent}, min_replies=least)
    with pytest.raises(RunError, match=r"round 2: 16 training tasks contributed, `min-replies` asks for 4\d: it sent no reply"):
        federation.start()
    assert len(federation.records) == 1


def test_more_replies_than_a_round_has_tasks_are_refused_at_the_start() -> None:
    with pytest.raises(ConfigError, match="`min-replies` must be at most the 10 training tasks of a round, got 11"):
        Federation(tasks_per_round=10, min_replies=11)


def test_a_repeated_round_waits_for_those_who_owe_an_answer() -> None:
    federation = Federation(min_replies=0.9, on_too_few="repeat", rounds=2, node_deadline=20.0, script={2: holds(101)})
    looks: list[int] = []

    def look() -> list[int]:
        looks.append(1)
        if len(looks) == 5:
            frees(federation)
        return [100, 101, 102]

    federation.grid.get_node_ids = look  # type: ignore[method-assign]
    records = federation.start()
    assert [m.metadata.group_id for m in federation.grid.requests if m.metadata.message_type == TRAIN].count("2") == 3 + 3
    assert records[1]["nodes"]["answered"] == 2 + 3


def test_as_many_as_asked_for_are_enough() -> None:
    least = Federation().hosted(100)
    assert len(Federation(script={2: silent}, min_replies=least, rounds=2).start()) == 2
    with pytest.raises(RunError, match=rf"{least} training tasks contributed, `min-replies` asks for {least + 1}"):
        Federation(script={2: silent}, min_replies=least + 1, rounds=2).start()


def test_a_skipped_round_leaves_the_model_and_stands_in_the_history() -> None:
    models: list[Any] = []

    def remember(federation: Federation) -> None:
        models.append(federation.strategy.outer.meta)

    def script_2(federation: Federation) -> None:
        remember(federation)
        silent(federation)

    def script_3(federation: Federation) -> None:
        remember(federation)
        frees(federation)

    federation = Federation(script={2: script_2, 3: script_3, 4: remember}, min_replies=0.9, on_too_few="skip")
    records = federation.start()
    assert [record["round"] for record in records] == [1, 2, 3, 4, 5]
    assert ["skipped" in record for record in records] == [False, True, False, False, False]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
    assert any(not torch.equal(value, models[2][name]) for name, value in models[1].items())


def test_a_repeated_round_gives_what_an_undisturbed_one_gives() -> None:
    federation = Federation(min_replies=0.9, on_too_few="repeat", rounds=3)
    tries: list[int] = []

    def once(message: Message) -> bool:
        if message.metadata.group_id == "2" and message.metadata.dst_node_id == 101 and len(tries) < 2:
            tries.append(1)
            return True
        return False

    plain = federation.grid.push_messages

    def push(messages: Iterable[Message]) -> list[str]:
        federation.grid.let_go()  # what was held back comes once the others are asked again
        return plain(messages)

    federation.grid.hold = once
    federation.grid.push_messages = push  # type: ignore[method-assign]
    records = federation.start()
    calm = Federation(rounds=3)
    calm.start()
    assert [record["round"] for record in records] == [1, 2, 3]
    assert [failure["who"] for failure in records[1]["failures"]] == ["node 101"] * 2
    assert sum(record["nodes"]["late"].get("node 101", 0) for record in records) == federation.strategy.late == 2
    for name, value in federation.strategy.outer.meta.items():
        assert torch.equal(value, calm.strategy.outer.meta[name])


def test_repeating_comes_to_an_end() -> None:
    federation = Federation(script={2: silent}, min_replies=0.9, on_too_few="repeat")
    with pytest.raises(RunError, match=r"round 2: 16 training tasks contributed"):
        federation.start()
    assert len([m for m in federation.grid.requests if m.metadata.group_id == "2"]) == 3 + 4


def test_without_anybody_to_ask_the_run_waits_for_a_node_and_goes_on() -> None:
    federation = Federation(1, {2: lambda f: setattr(f.grid, "node_ids", [])}, node_deadline=20.0, rounds=3)
    looks: list[int] = []
    get = LoopbackGrid.get_node_ids

    def look() -> list[int]:
        looks.append(1)
        if len(looks) > 4:
            federation.grid.node_ids = [100]
        return get(federation.grid)

    federation.grid.get_node_ids = look  # type: ignore[method-assign]
    assert [record["train"]["tasks"] for record in federation.start()] == [45, 45, 45]


def test_without_anybody_for_too_long_the_run_ends_with_a_sentence() -> None:
    federation = Federation(1, {2: lambda f: setattr(f.grid, "node_ids", [])})
    with pytest.raises(
        RunError, match="round 2: no node sent a usable reply: 1 nodes are away or left out, among them node 100"
    ):
        federation.start()
