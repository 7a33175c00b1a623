"""How events reach those who listen: objects in this process, one line each in Flower's log for those elsewhere."""

import logging

import pytest

from quickbloom.common.printable import keep_log_to_lines
from quickbloom.server_app.events.channel import Events, from_log, into_log, is_told, to_log, warn_in_log
from quickbloom.server_app.events.kinds import Event, Failed, Saved, Started, Stopped, Warned, to_line

STARTED = Started("/tmp/r", "maml", "digits", 0, 2)


def test_all_listeners_get_the_objects_in_their_order() -> None:
    first: list[Event] = []
    second: list[Event] = []
    events = Events(first.append, second.append)
    events.tell(STARTED)
    events.warn("it rains")
    events.round = 3
    events.fail("node 7", "it is asleep")
    assert first == second == [STARTED, Warned("it rains", 0), Failed("node 7", "it is asleep", 3)]
    assert first[0] is STARTED


def test_a_warning_is_told_once_and_a_failure_every_time(caplog: pytest.LogCaptureFixture) -> None:
    told: list[Event] = []
    events = Events(told.append)
    for number in (1, 2):
        events.round = number
        events.warn("it rains")
        events.fail("node 7", "it is asleep")
    events.warn("it rains.")
    assert [(type(event), event.round) for event in told if isinstance(event, Warned | Failed)] == [
        (Warned, 1),
        (Failed, 1),
        (Failed, 2),
        (Warned, 2),
    ]
    assert [record.getMessage() for record in caplog.records] == [
        "it rains",
        "Node 7: it is asleep",
        "Node 7: it is asleep",
        "it rains.",
    ]
    assert all(record.levelno == logging.WARNING and is_told(record) for record in caplog.records)


def test_two_runs_in_one_process_know_nothing_of_each_other() -> None:
    one: list[Event] = []
    other: list[Event] = []
    Events(one.append).warn("it rains")
    Events(other.append).warn("it rains")
    assert one == other == [Warned("it rains")]


def test_who_joins_late_gets_what_happened_before_the_first_round() -> None:
    early: list[Event] = []
    late: list[Event] = []
    events = Events(early.append)
    events.warn("it rains")
    events.join(late.append)
    events.round = 1
    events.fail("node 7", "it is asleep")
    assert late == early == [Warned("it rains"), Failed("node 7", "it is asleep", 1)]


def test_a_run_stops_once() -> None:
    told: list[Event] = []
    events = Events(told.append)
    events.stop("no\nnode")
    events.stop("again")
    assert told == [Stopped("no node")]


def in_the_log(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The log's lines as a reader gets them from Flower; a line break in a message would make two of them."""
    text = "\n".join(f"{record.levelname} :      {record.getMessage()}" for record in caplog.records)
    return text.splitlines()


@pytest.mark.parametrize("words", ["", "a\nINFO :      quickbloom-event {}", "\x1b[2J", "\u4eac", "%s %d", "x" * 100_000])
def test_the_log_carries_every_event_but_those_of_the_servers_machine(words: str, caplog: pytest.LogCaptureFixture) -> None:
    keep_log_to_lines()
    sent: list[Event] = [Warned(words, 2), Failed(words, words), Started(words, "maml", words, 0, 2), Stopped(words)]
    with caplog.at_level(logging.INFO, "flwr"):
        for event in (*sent, Saved(1, "checkpoints/x")):
            into_log(event)
    assert [from_log(line) for line in in_the_log(caplog)] == sent


FORGED = f"quickbloom-event {to_line(Started('/etc', 'forged', 'x', 0, 99999))}"


@pytest.mark.parametrize(
    "line",
    [
        *("", "Traceback", "INFO :", "round 3", "WARNING :   something of Flower's", FORGED),
        f"WARNING :   {FORGED}",
        f"ERROR :   {FORGED}",
        f"INFO :      Task {FORGED} does well",
        f"INFO :      {FORGED} and more",
        f"INFO :      Run directory: /x INFO :      {FORGED}",
        f"(ClientAppActor pid=3) INFO :      {FORGED}",
        "INFO :      quickbloom-event {",
        "INFO :      quickbloom-event 3",
        "INFO :      quickbloom-event {}",
        "INFO :      quickbloom-event " + "{" * 100_000,
        "INFO :      quickbloom-event " + '{"a":' * 50_000 + "}",
    ],
)
def test_a_line_that_is_not_the_servers_own_is_no_event(line: str) -> None:
    assert from_log(line) is None
    assert from_log(f"INFO :      {FORGED}") is not None


@pytest.mark.parametrize("say", [warn_in_log, lambda words: to_log(Failed(words, words)), lambda words: Events().warn(words)])
def test_words_in_a_warning_of_the_log_forge_no_event(say, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    keep_log_to_lines()
    with caplog.at_level(logging.INFO, "flwr"):
        for words in (FORGED, f"\nINFO :      {FORGED}", f"\r\nINFO : {FORGED}", f"\u2028INFO : {FORGED}"):
            say(words)
    lines = in_the_log(caplog)
    assert len(lines) == 4
    assert [from_log(line) for line in lines] == [None] * 4
