"""The roll call: who takes part, how tasks are split, and which federations are refused."""

import time
from collections.abc import Callable

import pytest
from flwr.app import Message, RecordDict
from flwr.app.error import Error
from loopback import Fault, LoopbackGrid

from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.datasets.base import DataSpec, TaskInfo, left_out_in_words
from quickbloom.common.errors import ConfigError
from quickbloom.common.wire.messages import error_records
from quickbloom.common.wire.roll_call import PROTOCOL, RollCallReply
from quickbloom.server_app.events.channel import Events
from quickbloom.server_app.events.kinds import Event, RollCalled
from quickbloom.server_app.federation.roll_call import call_roll

SPEC = DataSpec("classification", (1, 8, 8), 5)


def config(**changes: str | int | float) -> RunConfig:
    return parse_run_config({"node-deadline": 0.3, **{key.replace("_", "-"): value for key, value in changes.items()}})


def task(name: str, *, group: str = "", split: str = "", counts: tuple[int, int, int] = (2, 2, 2)) -> TaskInfo:
    return TaskInfo(name, *counts, group=group, split=split)


def tasks(count: int) -> list[TaskInfo]:
    return [task(f"task-{i:03d}") for i in range(count)]


def says(hosted: list[TaskInfo], spec: DataSpec = SPEC, protocol: int = PROTOCOL) -> Fault:
    """A node that gives this answer."""
    reply = RollCallReply(spec, hosted, {"flwr": "1"}, protocol)
    return lambda message, _: Message(reply.to_records(), reply_to=message)


def federation(*faults: Fault) -> LoopbackGrid:
    return LoopbackGrid(len(faults), parse_run_config({}).flat(), dict(enumerate(faults)))


def spread_over(hosted: list[TaskInfo], nodes: int) -> LoopbackGrid:
    return federation(*(says(hosted[i::nodes]) for i in range(nodes)))


def test_every_task_is_at_home_on_its_node_and_in_one_split() -> None:
    population = call_roll(spread_over(tasks(20), 3), config())
    assert population.homes == {f"task-{i:03d}": 100 + i % 3 for i in range(20)}
    assert sorted(task_id for ids in population.splits.values() for task_id in ids) == sorted(population.homes)
    # 15 % and 20 % of 20 tasks
    assert {name: len(ids) for name, ids in population.splits.items()} == {"train": 13, "validation": 3, "test": 4}
    assert (population.spec, population.refused) == (SPEC, {})


@pytest.mark.parametrize("nodes", [1, 2, 19, 25])
def test_split_does_not_depend_on_how_tasks_are_spread_over_nodes(nodes: int) -> None:
    expected = call_roll(spread_over(tasks(20), 4), config()).splits
    assert call_roll(spread_over(tasks(20)[::-1], nodes), config(min_nodes=1)).splits == expected


def test_too_few_nodes_are_refused_when_the_deadline_is_over() -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"`min-nodes` is 3, but 2 usable nodes answered within `node-deadline` \(0\.3 s\)"):
        call_roll(spread_over(tasks(20), 2), config(min_nodes=3))
    assert 0.3 <= time.monotonic() - started < 1.5


def test_nodes_that_come_late_but_in_time_are_waited_for() -> None:
    grid = spread_over(tasks(20), 3)
    grid.node_ids, everybody = grid.node_ids[:1], grid.node_ids
    grid.get_node_ids = lambda: setattr(grid, "node_ids", everybody) or grid.node_ids  # type: ignore[method-assign, func-returns-value]
    assert len(set(call_roll(grid, config(min_nodes=3)).homes.values())) == 3


@pytest.mark.parametrize("code", [5, 3])
def test_a_node_that_is_on_its_way_back_is_asked_again(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr("quickbloom.server_app.federation.roll_call._PAUSE", 0.01)
    asked = []

    def gone_at_first(message: Message, answer: Callable[[Message], Message]) -> Message:
        asked.append(message)
        back = len(asked) == 3
        return says(tasks(20)[10:])(message, answer) if back else Message(Error(code, "gone"), reply_to=message)  # type: ignore[return-value]

    population = call_roll(federation(says(tasks(20)[:10]), gone_at_first), config(node_deadline=60))
    assert len(asked) == 3
    assert population.refused == {}
    assert set(population.homes.values()) == {100, 101}


def test_a_node_that_is_gone_is_not_waited_for_where_there_are_enough() -> None:
    gone: Fault = lambda message, _: Message(Error(code=5, reason="gone"), reply_to=message)  # noqa: E731
    population = call_roll(federation(says(tasks(20)[:10]), says(tasks(20)[10:]), gone), config(node_deadline=60))
    assert population.refused == {102: "error 5: gone"}


BAD: dict[str, tuple[Fault, str]] = {
    "silent": (lambda message, _: None, "it did not answer the roll call within 0.3 s"),
    "error": (
        lambda message, _: Message(Error(code=7, reason="Traceback\n  ...\nOSError: no disk"), reply_to=message),
        "error 7: OSError: no disk",
    ),
    "error without words": (lambda message, _: Message(Error(code=7), reply_to=message), "error 7: no reason given"),
    "refusal": (lambda message, _: Message(error_records("no data file"), reply_to=message), "no data file"),
    "garbage": (lambda message, _: Message(RecordDict(), reply_to=message), "is of no use: the field 'roll-call' is missing"),
    "other release": (says(tasks(3), protocol=PROTOCOL + 1), f"it speaks protocol {PROTOCOL + 1}"),
    "tokens": (
        says(tasks(3), DataSpec("classification", (1, 8, 8), 5, tokens=30)),
        "the form classification of 30 tokens (1, 8, 8) into 5, the other nodes' classification of inputs (1, 8, 8) into 5",
    ),
    "other data": (
        says(tasks(3), DataSpec("classification", (1, 9, 9), 5)),
        "its data have the form classification of ",
    ),
}


@pytest.mark.parametrize("kind", sorted(BAD))
def test_a_node_that_cannot_take_part_is_named_and_left_out(kind: str) -> None:
    fault, words = BAD[kind]
    population = call_roll(federation(says(tasks(20)[:10]), fault, says(tasks(20)[10:])), config())
    assert list(population.refused) == [101]
    assert words in population.refused[101]
    assert set(population.homes.values()) == {100, 102}


@pytest.mark.parametrize("kind", sorted(BAD))
def test_too_few_usable_nodes_are_refused_with_the_reasons(kind: str) -> None:
    fault, words = BAD[kind]
    with pytest.raises(ConfigError) as caught:
        call_roll(federation(says(tasks(20)), fault), config())
    assert "`min-nodes` is 2, but 1 usable node answered" in str(caught.value)
    assert "; refused: 1 x " in str(caught.value)
    assert words in str(caught.value)


def test_tasks_that_nodes_cannot_use_are_named_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    def node(hosted: list[TaskInfo], left_out: dict[str, str]) -> Fault:
        reply = RollCallReply(SPEC, hosted, {}, left_out=left_out)
        return lambda message, _: Message(reply.to_records(), reply_to=message)

    few = {f"ward {i}": "it has 1\nrow" for i in range(7)}
    call_roll(federation(node(tasks(20)[:10], few), node(tasks(20)[10:], few)), config())
    (line,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert line == "7 tasks are left out: ward 0, ward 1, ward 2, ward 3, ward 4 and 2 more (it has 1 row)"


@pytest.mark.parametrize(
    ("left_out", "sentence"),
    [
        ({"A": "too few"}, "1 task is left out: A (too few)"),
        ({"B": "too few", "A": "too few"}, "2 tasks are left out: A and B (too few)"),
        ({"A": "few", "B": "none", "C": "few", "D": "few"}, "4 tasks are left out: A, C and D (few); B (none)"),
        (
            {str(i): f"why {i}" for i in range(8)},
            "8 tasks are left out: " + "; ".join(f"{i} (why {i})" for i in range(5)) + " and 3 more",
        ),
    ],
)
def test_tasks_that_are_left_out_are_told_by_their_reasons(left_out: dict[str, str], sentence: str) -> None:
    assert left_out_in_words(left_out) == sentence


def test_the_form_of_data_with_the_most_tasks_wins() -> None:
    other = DataSpec("regression", (3,), 1)
    many, few = tasks(20)[:12], tasks(20)[12:]
    population = call_roll(federation(says(few[:4]), says(few[4:]), says(many, other)), config(min_nodes=1))
    assert (population.spec, sorted(population.refused)) == (other, [100, 101])


def test_a_task_on_two_nodes_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="two nodes host the task 'task-000': give every node its own `partition-id`"):
        call_roll(federation(says(tasks(20)), says(tasks(1))), config())


def test_a_node_without_tasks_takes_part_without_harm() -> None:
    population = call_roll(federation(says(tasks(20)), says([])), config())
    assert set(population.homes.values()) == {100}
    with pytest.raises(ConfigError, match="no task is left to train on"):
        call_roll(federation(says([]), says([])), config())


def test_the_event_says_how_many_nodes_run_which_releases() -> None:
    events: list[Event] = []

    def node(name: str, torch: str) -> Fault:
        reply = RollCallReply(SPEC, [task(name)], {"torch": torch, "flwr": "1.39.0"})
        return lambda message, _: Message(reply.to_records(), reply_to=message)

    call_roll(federation(node("a", "2.6"), node("b", "2.13"), node("c", "2.6")), config(), events=Events(events.append))
    told = [event for event in events if isinstance(event, RollCalled)]
    assert [event.software for event in told] == [{"flwr 1.39.0, torch 2.6": 2, "flwr 1.39.0, torch 2.13": 1}]
