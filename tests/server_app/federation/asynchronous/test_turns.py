"""Whose turn it is: the draws of the rounds, in their order, and nobody's share grows because it is fast."""

from collections.abc import Sequence
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quickbloom.common.errors import ConfigError
from quickbloom.server_app.federation.asynchronous.turns import Turns
from quickbloom.server_app.federation.sampling import Sampling


class Draws:
    """The rounds' samples: `draws[0]` is that of round 1; after the last they begin again."""

    def __init__(self, *draws: Sequence[str]) -> None:
        self.draws = [list(draw) for draw in draws]
        self.number_of_tasks = len(self.draws[0])

    def choose_tasks(self, number: int) -> list[str]:
        return self.draws[(number - 1) % len(self.draws)]


def turns(*draws: Sequence[str], **more: Any) -> Turns:
    return Turns(cast(Sampling, Draws(*draws)), **more)


def everybody(task: str) -> bool:
    return True


def test_with_everybody_free_the_turns_are_the_rounds() -> None:
    order = turns("ab", "bc", "ca")
    taken = [order.take(2, "abc", (), everybody) for _ in range(4)]
    assert taken == [[(1, "a"), (1, "b")], [(2, "b"), (2, "c")], [(3, "c"), (3, "a")], [(4, "a"), (4, "b")]]


def test_what_is_left_of_a_turn_comes_before_the_next_one() -> None:
    order = turns("abc", "cba")
    assert order.take(1, "abc", (), everybody) == [(1, "a")]
    # a is at work: it keeps its place only for what it does; c and b of turn 1 come before turn 2.
    assert order.take(3, "abc", "a", everybody) == [(1, "b"), (1, "c")]
    assert order.take(1, "abc", "bc", everybody) == [(2, "a")]


def test_who_is_at_work_loses_the_turn_and_who_is_away_does_not() -> None:
    order = turns("ab", "ab", "cd")
    assert order.take(2, "acd", (), lambda task: task != "b") == [(1, "a"), (3, "c")]
    # b was away at turns 1 and 2, and has one turn for it, the first, before d of turn 3.
    assert order.take(2, "abcd", "ac", everybody) == [(1, "b"), (3, "d")]
    assert order.last == 3


def test_a_task_whose_node_works_for_another_task_waits() -> None:
    order = turns("ab", "cd")
    assert order.take(2, "abcd", (), lambda task: task != "b") == [(1, "a"), (2, "c")]
    assert order.take(1, "abcd", "ac", everybody) == [(1, "b")]


def test_nobody_who_can_start_ends_the_search() -> None:
    order = turns("ab", "ba")
    assert order.take(2, "ab", "ab", everybody) == []
    assert order.take(2, "", (), everybody) == []
    assert order.take(2, "ab", (), lambda _: False) == []
    assert order.last == 0


def test_a_fast_task_gets_at_most_so_many_times_the_share_of_its_turns() -> None:
    """b .. d never come free. a is free at every look: without a limit it works in all its turns, they in one each.

    With the limit F = 2: after n turns of all four and g works of a, all worked in (3 + g) / 4n of their turns, so that a may
    work as long as g < 2 * (3 + g) / 4n * n + 1, which ends at g = 5.
    """
    for fairness, most in ((0.0, 100), (2.0, 5)):
        order = turns("abcd", fairness=fairness)
        assert order.take(4, "abcd", (), everybody) == [(1, "a"), (1, "b"), (1, "c"), (1, "d")]
        for _ in range(99):
            order.take(1, "abcd", "bcd", everybody)
        assert order.given == {"a": most, "b": 1, "c": 1, "d": 1}


def share(order: Turns) -> float:
    return sum(order.given.values()) / sum(order.drawn.values()) if order.drawn else 1.0


SPEEDS = st.lists(st.integers(1, 30), min_size=3, max_size=12)


@given(SPEEDS, st.integers(1, 12), st.sampled_from([1.0, 2.0, 4.0]), st.data())
def test_answering_fast_gains_at_most_the_fairness(speeds: list[int], slots: int, fairness: float, data: st.DataObject) -> None:
    """Tasks that need 1 to 30 ticks, in slots that are refilled at once; the draws are any."""
    names = [chr(97 + i) for i in range(len(speeds))]
    draws = data.draw(st.lists(st.permutations(names).map(lambda p: p[: max(1, len(names) // 2)]), min_size=1, max_size=5))
    order = turns(*draws, fairness=fairness)
    until: dict[str, int] = {}
    for tick in range(120):
        until = {task: end for task, end in until.items() if end > tick}
        before = share(order)
        for _, task in order.take(slots - len(until), names, set(until), everybody):
            assert task not in until
            until[task] = tick + speeds[names.index(task)]
            # The limit held when the work was given; until the look is over, others may have lost a turn.
            assert order.given[task] <= fairness * max(before, share(order)) * order.drawn[task] + 2
        assert len(until) <= slots
    assert all(order.given[task] <= order.drawn[task] for task in names)
    assert len(order.waiting) <= len(names)
    # Nobody starves: who was drawn often enough, and was free, has worked.
    assert any(order.given.values())


def test_a_continued_run_asks_again_for_what_was_under_way() -> None:
    order = turns("ab", "cd", "ab", fairness=2.0)
    under_way = order.take(2, "abcd", (), everybody)
    other = turns("ab", "cd", "ab", fairness=2.0)
    other.restore(order.state(under_way))
    assert other.take(3, "abcd", (), everybody) == [(1, "a"), (1, "b"), (2, "c")]


@pytest.mark.parametrize(
    "state",
    [None, {}, {"turn": -1, "waiting": [], "drawn": {}, "given": {}}, {"turn": 1, "waiting": [5], "drawn": {}, "given": {}}],
)
def test_a_state_that_is_none_ends_in_a_sentence(state: Any) -> None:
    with pytest.raises(ConfigError, match="does not say whose turn it is"):
        turns("ab").restore(state)
