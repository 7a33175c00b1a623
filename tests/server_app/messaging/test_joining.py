"""Nodes that come during a run: whose tasks join, whose do not and why, and that nobody else notices."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import Message, RecordDict
from hostile import ANYTHING, MORE_VALUES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loopback import LoopbackGrid

from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.datasets.base import DataSpec, TaskInfo
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.flower import names as flower
from quickbloom.common.wire.messages import TRAIN, TrainRequest, error_records, to_arrays
from quickbloom.common.wire.refusal import REFUSED, Refusal
from quickbloom.common.wire.roll_call import CONSTANTS, ROLL_CALL, ConstantsReply, RollCallReply, told_agreed
from quickbloom.server_app.events.channel import Events
from quickbloom.server_app.events.kinds import Event, Joined, Warned
from quickbloom.server_app.federation.outer import OuterOptimizer
from quickbloom.server_app.federation.roll_call import call_roll
from quickbloom.server_app.federation.sampling import Sampling
from quickbloom.server_app.federation.strategy import MetaStrategy
from quickbloom.server_app.messaging.joining import Joining
from quickbloom.server_app.messaging.node_status import Reachability
from quickbloom.server_app.messaging.polling_grid import PollingGrid
from quickbloom.server_app.messaging.population import Population

EXAMPLES = int(os.environ.get("QUICKBLOOM_FUZZ", "300"))
SPEC = DataSpec("classification", (4,), 3)
NEW = 7
EVERYBODY = (100, 101, 102, 103)
Answer = Callable[[Message], RecordDict | None]


def task(name: str, counts: tuple[int, int, int] = (2, 2, 2), *, group: str = "", split: str = "") -> TaskInfo:
    return TaskInfo(name, *counts, group=group, split=split)


class Grid:
    """Nodes 1 and 2 and whoever comes, each of which answers as it is told to; None: nothing comes."""

    def __init__(self) -> None:
        if identity := flower.find("TaskIdentity"):  # required by Flower's messages
            identity.run_id, identity.task_id, identity.node_id = 1, 1, 1
        self.answers: dict[int, Answer] = {1: lambda _: None, 2: lambda _: None}
        self.asked: list[Message] = []
        self._replies: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        return list(self.answers)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            ids.append(str(len(self.asked)))
            self.asked.append(message)
            message.metadata.__dict__["_message_id"] = ids[-1]
            if (content := self.answers[message.metadata.dst_node_id](message)) is not None:
                self._replies[ids[-1]] = Message(content, reply_to=message)
        return ids

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(one) for one in list(ids) if one in self._replies]


class Run:
    """Tasks a, b on node 1 and c, d on node 2: a and c train, b is for validation, d for the test."""

    def __init__(self, patience: float = 60, spec: DataSpec = SPEC, constants: str = "", **changes: Any) -> None:
        tasks = {name: task(name, group=f"group {name}") for name in "abcd"}
        homes = {"a": 1, "b": 1, "c": 2, "d": 2}
        splits = {"train": ["a", "c"], "validation": ["b"], "test": ["d"]}
        self.population = Population(spec, homes, splits, tasks, nodes={1, 2}, constants=constants)
        self.config = parse_run_config({key.replace("_", "-").replace("--", "."): value for key, value in changes.items()})
        self.events: list[Event] = []
        events = Events(self.events.append)
        self.joining = Joining(self.population, self.config, events)
        self.nodes = Reachability(self.population, patience, events.warn, self.joining)
        self.grid = Grid()

    def look(self, times: int = 2) -> None:
        for _ in range(times):
            self.nodes.refresh(self.grid)  # type: ignore[arg-type]

    def comes(self, *tasks: TaskInfo, node: int = NEW, spec: DataSpec | None = None, keeps: bool = False) -> None:
        """A node that hosts these tasks connects, and is looked at."""
        reply = RollCallReply(spec or self.population.spec, list(tasks), {}, keeps=keeps)
        self.grid.answers[node] = lambda message: reply.to_records()
        self.look()

    @property
    def said(self) -> list[str]:
        return [event.sentence for event in self.events if isinstance(event, Warned | Joined)]

    @property
    def train(self) -> list[str]:
        return self.population.splits["train"]


# ---- who joins


def test_tasks_of_a_newcomer_train_from_then_on_and_are_sorted_in() -> None:
    run = Run()
    run.comes(task("bb"), task("z"), keeps=True)
    assert run.population.splits == {"train": ["a", "bb", "c", "z"], "validation": ["b"], "test": ["d"]}
    assert run.population.homes == {"a": 1, "b": 1, "c": 2, "d": 2, "bb": NEW, "z": NEW}
    assert (run.population.keepers, run.population.joined) == ({NEW}, {"bb", "z"})
    assert run.nodes.can_be_asked(NEW)
    assert run.said == ["Node 7 joined with 2 tasks"]
    assert run.joining.news() == {"nodes": [NEW], "tasks": ["bb", "z"]}
    assert run.joining.news() == {}
    assert [message.metadata.message_type for message in run.grid.asked] == [ROLL_CALL]


def test_the_tasks_of_a_round_are_those_of_a_run_that_had_all_of_them() -> None:
    run = Run(fraction=0.5, min_replies=0.5)
    sampling = Sampling(run.config, run.population, None)
    # Half of 2 training tasks is 1, of 6 it is 3; half of these must contribute: 1, then 2.
    assert (sampling.number_of_tasks, sampling.least_replies) == (1, 1)
    run.comes(task("b2"), task("e"), node=NEW)
    run.comes(task("aa"), task("f"), node=8)
    assert (sampling.number_of_tasks, sampling.least_replies) == (3, 2)
    whole = replace(run.population, splits={"train": ["a", "aa", "b2", "c", "e", "f"]})
    drawn = [sampling.choose_tasks(number) for number in range(1, 9)]
    assert drawn == [Sampling(run.config, whole, None).choose_tasks(number) for number in range(1, 9)]
    assert {one for tasks in drawn for one in tasks} == set("ac") | {"aa", "b2", "e", "f"}


def test_what_is_held_out_or_lacks_examples_never_trains() -> None:
    run = Run()
    run.comes(
        task("ok", split="train"),
        task("published", split="test"),
        task("sister of d", group="group d"),
        task("sister of a", group="group a"),
        task("d2", group="d"),  # no group, but the name of a task that has another one
        task("no query", (2, 0, 9)),
        task("no support", (0, 2, 2)),
    )
    assert run.train == ["a", "c", "d2", "ok", "sister of a"]
    assert (run.population.splits["validation"], run.population.splits["test"]) == (["b"], ["d"])
    assert run.population.unused == ["no query", "no support", "published", "sister of d"]
    assert run.said == [
        "4 tasks are left out: no query (it has 2 support and 0 query examples); no support (it has 0 support and 2 query "
        "examples); published (its data set holds it out for test); sister of d (other tasks of its group are held out)",
        "Node 7 joined with 3 tasks",
    ]


def test_a_node_that_was_away_comes_back_with_its_tasks_and_new_ones() -> None:
    run = Run()
    del run.grid.answers[2]
    run.look()
    assert run.nodes.away == [2]
    run.comes(task("c", group="group c"), task("d", group="group d"), task("new"), node=2)
    assert (run.nodes.away, run.train) == ([], ["a", "c", "new"])
    assert run.population.homes == {"a": 1, "b": 1, "c": 2, "d": 2, "new": 2}
    assert run.said == ["Node 2 joined with 1 task"]


def test_a_node_under_a_new_id_takes_its_old_tasks_along_and_brings_new_ones() -> None:
    run = Run()
    tasks = task("c", group="group c"), task("d", group="group d"), task("new")
    run.comes(*tasks)
    assert run.population.homes["c"] == 2  # as long as the old one is there, it keeps its tasks
    del run.grid.answers[2]
    run.look()
    assert {name: run.population.homes[name] for name in ("c", "d", "new")} == dict.fromkeys(("c", "d", "new"), NEW)
    assert (run.train, run.nodes.away) == (["a", "c", "new"], [])


def test_a_node_that_was_silent_when_the_run_began_joins_once_it_answers() -> None:
    run = Run()
    refused = {7: "it did not answer the roll call within 60 s", 8: "its data have the form ..", 9: "error 5: gone"}
    run.population.refused = refused
    run.nodes = Reachability(run.population, 60, run.events.append, run.joining)  # type: ignore[arg-type]
    for node in refused:
        run.comes(task(f"of {node}"), node=node)
    assert run.population.joined == {"of 7", "of 9"}


def test_a_newcomer_is_given_the_schema_and_scales_of_the_run() -> None:
    run = Run(spec=replace(SPEC, schema="columns"))
    run.population.scales = "scales"
    assert run.population.schema_for(1) == ""  # it found the same by itself
    run.comes(task("new"))
    assert told_agreed(run.grid.asked[0].content) == ("columns", "scales")
    assert (run.population.schema_for(NEW), run.population.schema_for(1)) == ("columns", "")


# ---- who does not


def test_a_newcomer_with_a_task_of_another_node_is_refused_in_one_sentence() -> None:
    run = Run()
    before = replace(run.population)
    run.comes(task("a", (9, 9, 9)), task("new"))
    run.look()
    assert run.said == [
        "Node 7 does not take part: two nodes host the task 'a': give every node its own `partition-id` and the same "
        "`num-partitions` in its --node-config"
    ]
    assert run.population == before
    assert len(run.grid.asked) == 1  # it is not called again


def test_a_refused_newcomer_that_hears_is_told_once_and_says_so_to_its_owner() -> None:
    run = Run()
    reply = RollCallReply(SPEC, [task("a", (9, 9, 9))], {}, hears=True)
    run.grid.answers[NEW] = lambda message: reply.to_records()
    run.look(4)
    (told,) = [message for message in run.grid.asked if message.metadata.message_type == REFUSED]
    refusal = Refusal.from_records(told.content)
    assert (told.metadata.dst_node_id, refusal.kind) == (NEW, "task")
    assert run.said == [f"Node 7 does not take part: {refusal.reason}"]


def test_two_newcomers_with_one_task_do_not_both_join() -> None:
    run = Run()
    replies = {7: [task("new")], 8: [task("new", (5, 5, 5)), task("more")]}
    for node, tasks in replies.items():
        content = RollCallReply(SPEC, tasks, {}).to_records()
        run.grid.answers[node] = lambda _, content=content: content  # type: ignore[misc]
    run.look()
    assert (run.train, run.population.homes["new"]) == (["a", "c", "new"], 7)
    assert run.said[-1].startswith("Node 8 does not take part: two nodes host the task 'new': ")


def test_a_node_with_the_very_tasks_of_one_that_is_there_waits_and_is_named_after_a_while() -> None:
    """It may be that one under a new id, so it is not refused."""
    for patience, said in ((60, 0), (0, 1)):
        run = Run(patience)
        run.comes(task("a", group="group a"))
        run.look(3)
        assert [
            sentence.startswith("Node 7 waits until node 1 is away: two nodes host the task 'a': ") for sentence in run.said
        ] == [True] * said
        del run.grid.answers[1]
        run.look()
        assert run.population.homes["a"] == NEW


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"join": False}, "it hosts none of the tasks of this run, and `join` is false: it can take part in the next one"),
        (
            {"privacy__noise_multiplier": 1.0, "privacy__clip": 1.0},
            "with privacy the training tasks of a run are fixed, since its account counts with their number: "
            "it can take part in the next one",
        ),
        (
            {"secure_aggregation": True},
            "with `secure-aggregation` the nodes of a run are fixed: it can take part in the next one",
        ),
    ],
)
def test_where_the_tasks_are_fixed_nobody_joins_and_the_reason_is_said(changes: dict[str, Any], reason: str) -> None:
    run = Run(**{key.replace("noise_multiplier", "noise-multiplier"): value for key, value in changes.items()})
    run.comes(task("new"))
    assert (run.train, run.said) == (["a", "c"], [f"Node 7 does not take part: {reason}"])
    del run.grid.answers[2]  # one that comes back is none that joins
    run.look()
    run.comes(task("c", group="group c"), task("d", group="group d"), task("new"), node=2)
    assert (run.train, run.nodes.away) == (["a", "c"], [])


@pytest.mark.parametrize("constants", ["", "a" * 64])
def test_a_node_that_has_gone_before_it_joined_is_asked_again_when_it_is_back(constants: str) -> None:
    run = Run(constants=constants)
    content = {
        ROLL_CALL: RollCallReply(SPEC, [task("new")], {}).to_records(),
        CONSTANTS: ConstantsReply(constants).to_records(),
    }
    for _ in range(2):
        run.grid.answers[NEW] = lambda message: content[message.metadata.message_type]
        run.look(1)
        there = run.grid.answers.pop(NEW)
        run.look()
    assert (run.train, run.said) == (["a", "c"], [])
    run.grid.answers[NEW] = there
    run.look(3)
    assert run.train == ["a", "c", "new"]
    assert [m.metadata.message_type for m in run.grid.asked] == [ROLL_CALL] * 3 + [CONSTANTS] * bool(constants)


def test_after_the_training_nobody_joins() -> None:
    run = Run()
    run.joining.close("the training is over")
    run.comes(task("new"))
    assert run.said == ["Node 7 does not take part: the training is over: it can take part in the next one"]


@pytest.mark.parametrize(
    ("spec", "form"),
    [
        (replace(SPEC, outputs=4), "classification of inputs (4,) into 4"),
        (replace(SPEC, input_shape=(5,)), "classification of inputs (5,) into 3"),
        (DataSpec("regression", (4,), 3), "regression of inputs (4,) into 3"),
        (replace(SPEC, tokens=9), "classification of 9 tokens (4,) into 3"),
    ],
)
def test_data_of_another_form_are_refused(spec: DataSpec, form: str) -> None:
    run = Run()
    run.comes(task("new"), spec=spec)
    assert run.train == ["a", "c"]
    assert run.said == [
        f"Node 7 does not take part: its data have the form {form}, the other nodes' classification of inputs (4,) into 3"
    ]


def test_a_node_whose_data_do_not_fit_the_schema_says_so_itself() -> None:
    run = Run()
    run.grid.answers[NEW] = lambda _: error_records("the table has no column `age`")
    run.look()
    assert run.said == ["Node 7 does not take part: the table has no column `age`"]


def test_a_model_with_constants_is_compared_before_the_node_joins() -> None:
    right, wrong = "a" * 64, "b" * 64
    run = Run(constants=right)
    for node, digest in ((7, right), (8, wrong), (9, "nonsense")):
        content = {
            ROLL_CALL: RollCallReply(SPEC, [task(f"of {node}")], {}).to_records(),
            CONSTANTS: ConstantsReply(digest).to_records(),
        }
        run.grid.answers[node] = lambda message, content=content: content[message.metadata.message_type]  # type: ignore[misc]
    run.look(2)
    assert run.train == ["a", "c"]
    run.look(1)
    assert run.train == ["a", "c", "of 7"]
    assert sorted(run.said) == [
        "Node 7 joined with 1 task",
        f"Node 8 does not take part: the constants of its model have the SHA-256 {wrong}, the server's {right}: give it the "
        "same file of weights and the same release of what builds the model",
        "Node 9 does not take part: its answer to the roll call is of no use: `digest` must be a SHA-256 in hexadecimal, got "
        "'nonsense'",
    ]


def test_a_newcomer_with_which_a_rule_could_not_work_is_refused() -> None:
    """With 20 % of liars `krum` needs five votes, and one node with nearly all tasks would leave one in most rounds."""
    run = Run(aggregate="krum", tasks_per_round=5, rounds=20)
    names = [f"t{i}" for i in range(8)]
    run.population.tasks |= {name: task(name) for name in names}
    run.population.homes |= {name: 10 + i for i, name in enumerate(names)}
    run.population.splits["train"] = names
    sampling = Sampling(run.config, run.population, None)
    sampling.check(1)
    run.joining.objection = lambda trial: sampling.objection(trial, 1)
    run.comes(*(task(f"u{i:02d}") for i in range(40)), node=NEW)
    assert run.train == names
    assert run.said[0].startswith('Node 7 does not take part: with its tasks `aggregate = "krum"` cannot work in round ')
    run.comes(task("u00"), node=8)
    assert run.train == [*names, "u00"]


# ---- lies

FIELDS = RollCallReply(SPEC, [task("new"), task("more")], {"flwr": "1"}).to_records().config_records["roll-call"]


@given(key=st.sampled_from(sorted(FIELDS)), value=MORE_VALUES, gone=st.booleans())
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_changed_answer_joins_whole_or_is_refused_in_one_sentence(key: str, value: Any, gone: bool) -> None:
    content = RollCallReply(SPEC, [task("new"), task("more")], {"flwr": "1"}).to_records()
    record = content.config_records["roll-call"]
    if gone:
        del record[key]
    else:
        record[key] = value
    _is_refused_or_trains(content)


@given(ANYTHING)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_is_no_answer_is_refused_in_one_sentence(content: RecordDict) -> None:
    run = _is_refused_or_trains(content)
    assert run.train == ["a", "c"]


def _is_refused_or_trains(content: RecordDict) -> Run:
    run = Run()
    run.grid.answers[NEW] = lambda _: content
    run.look(3)
    splits = run.population.splits
    assert (splits["validation"], splits["test"], splits["train"]) == (["b"], ["d"], sorted({"a", "c"} | run.population.joined))
    assert all(run.population.homes[name] == NEW for name in run.population.joined)
    assert {name: run.population.homes[name] for name in "abcd"} == {"a": 1, "b": 1, "c": 2, "d": 2}
    assert all(sentence.isprintable() and len(sentence) < 2000 for sentence in run.said)
    assert sum("does not take part" in sentence for sentence in run.said) == (NEW not in run.population.homes.values())
    return run


def test_a_newcomer_with_thousands_of_tasks_costs_one_line() -> None:
    run = Run()
    run.comes(*(task(f"{i:05d}", (0, 0, 0)) for i in range(5000)))
    (sentence,) = run.said
    assert run.train == ["a", "c"]
    assert sentence.startswith("Node 7 does not take part: none of its tasks can train: 5000 tasks are left out: 00000, 00001")
    assert len(sentence) < 400


# ---- in a run


class Federation:
    """Digits in four parts, of which the last one comes after round 2; `fixed`: all are there, its training tasks come then.

    `then`: the nodes that are there after round 2.
    """

    def __init__(self, *, polling: bool = False, fixed: bool = False, then: Sequence[int] = EVERYBODY, **changes: Any) -> None:
        flat = {"mlp.hidden": "8", "min-nodes": 1, "rounds": 6, "evaluate-every": 0, "adapt-steps": 2, "seed": 2}
        flat |= {"node-deadline": 20.0, "split": "exact", **{key.replace("_", "-"): value for key, value in changes.items()}}
        self.config: RunConfig = parse_run_config(flat).resolved()
        self.grid = LoopbackGrid(4, self.config.flat())
        self.fixed, self.then = fixed, list(then)
        self.grid.node_ids = [100, 101, 102]
        self.population = call_roll(self.grid, self.config)
        self.old = list(self.population.splits["train"])
        if fixed:
            self.grid.node_ids = list(EVERYBODY)
            everybody = call_roll(self.grid, self.config)
            self.population = replace(everybody, splits=self.population.splits)
        self.records: list[dict[str, Any]] = []
        self.events: list[Event] = []
        algorithm = build_algorithm(self.config, self.population.spec)
        outer = OuterOptimizer(algorithm.options, algorithm.init(), self.config.rounds)
        events = Events(self.events.append)
        self.strategy = MetaStrategy(self.config, self.population, algorithm, outer, self._on_round, events=events)
        self.grid.requests.clear()
        grid = PollingGrid(self.grid) if polling else self.grid
        self.strategy.start(grid, to_arrays(outer.meta), num_rounds=self.config.rounds, timeout=20)

    def _on_round(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if record["round"] == 2:
            self.grid.node_ids = self.then
        if record["round"] == 3 and self.fixed:  # called before round 3, it takes part from round 4 on
            tasks = self.population.tasks
            self.population.splits["train"] = sorted(
                [*self.old, *(name for name in tasks if self.population.homes[name] == 103)]
            )

    def asked(self, number: int) -> dict[int, list[str]]:
        return {
            message.metadata.dst_node_id: TrainRequest.from_records(message.content).task_ids
            for message in self.grid.requests
            if message.metadata.message_type == TRAIN and message.metadata.group_id == str(number)
        }


@pytest.mark.parametrize("polling", [False, True])
@pytest.mark.parametrize("changes", [{}, {"fraction": 0.5, "min_replies": 0.9, "aggregate": "median"}])
def test_a_node_that_appears_at_round_3_trains_from_round_4_on_as_if_it_had_been_there(
    changes: dict[str, Any], polling: bool
) -> None:
    federation, whole = Federation(polling=polling, **changes), Federation(fixed=True, **changes)
    come = sorted(name for name, home in federation.population.homes.items() if home == 103)
    assert ["joined" in record for record in federation.records] == [False, False, False, True, False, False]
    assert federation.records[3]["joined"] == {"nodes": [103], "tasks": come}
    assert [103 in federation.asked(number) for number in range(1, 7)] == [False] * 3 + [True] * 3
    assert [event for event in federation.events if isinstance(event, Joined)] == [Joined(103, len(come), 4)]
    assert federation.population.splits["train"] == sorted(federation.old + come)
    assert not {*federation.population.splits["validation"], *federation.population.splits["test"]} & set(come)
    for name, value in federation.strategy.outer.meta.items():
        assert torch.equal(value, whole.strategy.outer.meta[name])


def test_a_round_without_anybody_goes_on_with_a_node_that_joins_while_it_waits() -> None:
    federation = Federation(then=[103], rounds=3)
    assert [sorted(federation.asked(number)) for number in (1, 2, 3)] == [[100, 101, 102], [100, 101, 102], [103]]
    assert federation.records[2]["joined"]["nodes"] == [103]
    assert federation.records[2]["train"]["tasks"] == len(federation.asked(3)[103]) == 14


def test_a_node_that_comes_while_others_work_is_called_meanwhile_and_trains_in_the_next_round() -> None:
    """A round of minutes: without this it would be called after the round, and train in the one after the next."""

    class Slow(LoopbackGrid):
        def answer(self, message: Message) -> Message | None:
            if message.metadata.message_type == TRAIN:
                strategy.nodes._looked = -1e9  # a minute has passed
                self.node_ids = [100, 101, 102]
            return super().answer(message)

    config = parse_run_config({"mlp.hidden": "8", "rounds": 2, "evaluate-every": 0, "adapt-steps": 2}).resolved()
    grid = Slow(3, config.flat())
    grid.node_ids = [100, 101]
    population = call_roll(grid, config)
    algorithm = build_algorithm(config, population.spec)
    outer = OuterOptimizer(algorithm.options, algorithm.init(), 2)
    records: list[dict[str, Any]] = []
    strategy = MetaStrategy(config, population, algorithm, outer, records.append)
    strategy.start(PollingGrid(grid), to_arrays(outer.meta), num_rounds=2, timeout=60)
    assert [record["nodes"]["trained"] for record in records] == [[100, 101], [100, 101, 102]]
    assert [record.get("joined", {}).get("nodes") for record in records] == [None, [102]]
