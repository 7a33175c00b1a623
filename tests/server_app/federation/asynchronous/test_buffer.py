"""What a buffer of replies becomes, against numbers worked by hand."""

import math

import pytest
import torch

from quickbloom.common.config.run import parse_run_config
from quickbloom.common.wire.messages import TrainReply
from quickbloom.server_app.federation.asynchronous.buffer import Buffer

LIKE = {"a": torch.zeros(2, dtype=torch.float64)}


def reply(value: float, weight: float = 1.0, losses: tuple[float, ...] = (0.5,)) -> TrainReply:
    return TrainReply({"a": torch.tensor([value, -value], dtype=torch.float64)}, weight, list(losses))


def test_staleness_shortens_the_step_and_is_not_divided_out() -> None:
    """(1 * 4 + 3 * (1 + 3) ** -0.5 * 8) / (1 + 3) = (4 + 12) / 4."""
    buffer = Buffer(LIKE, parse_run_config({}))
    buffer.add(1, reply(4.0), 0, 0.5)
    buffer.add(2, reply(8.0, 3.0), 3, 0.5)
    assert buffer.result(1, {})["a"].tolist() == pytest.approx([4.0, -4.0])
    assert dict(buffer.staleness) == {0: 1, 3: 1}


def test_without_an_exponent_all_count_the_same() -> None:
    buffer = Buffer(LIKE, parse_run_config({}))
    buffer.add(1, reply(4.0), 0, 0.0)
    buffer.add(2, reply(8.0), 9, 0.0)
    assert buffer.result(1, {})["a"].tolist() == [6.0, -6.0]


def test_tasks_that_failed_do_not_fill_the_buffer() -> None:
    buffer = Buffer(LIKE, parse_run_config({}))
    buffer.add(1, reply(1.0, 2.0, (0.5, math.nan, 0.25)), 1, 0.5)
    buffer.add(2, reply(0.0, 0.0, (math.nan,)), 0, 0.5)
    assert (buffer.tasks, buffer.losses) == (2, [0.5, 0.25])
    assert not buffer.is_full(3)
    assert buffer.is_full(2)


def test_a_node_is_one_vote_however_often_it_answers() -> None:
    """Votes 1, 2 and 3, the last one a mean of 5 and 2 with the weights 1 and 2: the median is 2, with four votes it is 2 too,

    and with five of the fast node's it would be 5.
    """
    buffer = Buffer(LIKE, parse_run_config({"aggregate": "median", "malicious": 0.2}))
    buffer.add(1, reply(1.0), 0, 0.5)
    for _ in range(5):
        buffer.add(3, reply(5.0), 0, 0.5)
    assert not buffer.is_full(6)  # two nodes, of which one may lie: three are needed
    buffer.add(2, reply(2.0), 0, 0.5)
    assert buffer.is_full(6)
    assert buffer.result(1, {})["a"].tolist() == [2.0, -2.0]


def test_a_step_starts_from_the_centre_of_the_one_before_and_its_buckets_do_not_depend_on_who_was_faster() -> None:
    """Around 0 with tau 2: (1, -1) of length 1.41 stays as it is, (2, -2) and (6, -6) become 2 long."""
    settings = {"aggregate": "centered-clip", "malicious": 0.2, "clip-radius": 2.0, "clip-steps": 1}
    buffer = Buffer(LIKE, parse_run_config(settings))
    for node_id, value in ((1, 1.0), (2, 2.0), (3, 6.0)):
        buffer.add(node_id, reply(value), 0, 0.5)
    mean = (1 + 2 * math.sqrt(2)) / 3
    assert buffer.result(7, {"a": torch.zeros(2, dtype=torch.float64)})["a"].tolist() == pytest.approx([mean, -mean])

    found = []
    for order in ([1, 2, 3, 4, 5, 6], [6, 2, 5, 1, 3, 4]):
        buffer = Buffer(LIKE, parse_run_config({"aggregate": "median", "malicious": 0.1, "bucketing": 2}))
        for node_id in order:
            assert not buffer.is_full(6)
            buffer.add(node_id, reply(2.0**node_id), 0, 0.5)
        found.append(buffer.result(7, {})["a"].tolist())
    assert found[0] == found[1]
