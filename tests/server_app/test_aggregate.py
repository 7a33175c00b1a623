"""The mean over tasks does not see nodes."""

import pytest
import torch

from common.wire import TrainReply
from server_app.aggregate import mean_over_tasks


def reply(gradient: float, weight: float) -> TrainReply:
    return TrainReply({"w": torch.tensor([gradient])}, weight, [0.0], 0.0)


def mean(*replies: TrainReply) -> float:
    return mean_over_tasks(replies)["w"].item()


def test_nodes_count_with_their_sum_of_weights_by_hand() -> None:
    # (1 * 3 + 3 * 7) / 4 = 6
    assert mean(reply(3.0, 1.0), reply(7.0, 3.0)) == 6.0


def test_spread_of_tasks_over_nodes_does_not_matter() -> None:
    # Four tasks of gradient 1, 2, 3, 6 and weight 1: mean 3, alone, in pairs, or three and one.
    alone = mean(*(reply(g, 1.0) for g in (1.0, 2.0, 3.0, 6.0)))
    assert alone == mean(reply(1.5, 2.0), reply(4.5, 2.0)) == mean(reply(2.0, 3.0), reply(6.0, 1.0)) == 3.0


def test_a_reply_without_weight_leaves_no_trace() -> None:
    assert mean(reply(3.0, 2.0), reply(1e30, 0.0)) == 3.0


def test_order_of_replies_does_not_matter() -> None:
    replies = [reply(torch.randn(1, generator=torch.Generator().manual_seed(i)).item() * 10**i, float(i + 1)) for i in range(8)]
    assert mean(*replies) == mean(*replies[::-1])


@pytest.mark.parametrize("replies", [[], [reply(1.0, 0.0)]])
def test_no_weight_at_all_is_an_error(replies: list[TrainReply]) -> None:
    with pytest.raises(ValueError, match="at least one item"):
        mean_over_tasks(replies)
