"""The mean over tasks does not see nodes; the other rules are those of the papers, and some liars do not move them."""

from typing import Any, get_args

import numpy as np
import pytest
import torch

from quickbloom.common.config.run import RunConfig
from quickbloom.common.maths import params
from quickbloom.common.maths.params import Params
from quickbloom.common.wire.messages import TrainReply
from quickbloom.server_app.federation.aggregation import RULES, RunningMean, aggregate, mean_over_tasks, too_few


def reply(gradient: float, weight: float) -> TrainReply:
    return TrainReply({"w": torch.tensor([gradient])}, weight, [0.0])


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


# ---- the mean of replies that come one after the other


def replies_of(number: int) -> list[TrainReply]:
    def one(i: int) -> TrainReply:
        source = torch.Generator().manual_seed(i)
        gradient = {"w": torch.randn(30, 7, generator=source), "b": torch.randn(3, generator=source, dtype=torch.float64)}
        return TrainReply(gradient, 0.0 if i == 2 else i + 0.5, [0.0])

    return [one(i) for i in range(number)]


def running(replies: list[TrainReply]) -> Params:
    mean = RunningMean(replies_of(1)[0].gradient)
    for one in replies:
        mean.add(one)
    return mean.result()


def test_a_running_mean_has_the_bits_of_the_mean_of_all_replies() -> None:
    whole = mean_over_tasks(replies_of(6))
    assert all(torch.equal(value, whole[name]) for name, value in running(replies_of(6)).items())


def test_sums_of_large_tensors_in_their_own_type_differ_by_rounding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = mean_over_tasks(replies_of(6))
    monkeypatch.setattr(params, "LARGE", 100)
    found = running(replies_of(6))
    assert torch.equal(found["b"], whole["b"])
    assert not torch.equal(found["w"], whole["w"])
    assert torch.allclose(found["w"], whole["w"], rtol=0, atol=1e-6)


def test_a_running_mean_keeps_nothing_of_a_reply_and_shares_nothing_with_it() -> None:
    like, mine = replies_of(1)[0], replies_of(2)[1]
    mean, tensors = RunningMean(like.gradient), dict(mine.gradient)
    left = mean.add(mine)
    assert (left.gradient, left.weight) == ({}, 1.5)
    tensors["w"].fill_(9.0)
    expected = replies_of(2)[1].gradient["w"]
    assert torch.allclose(mean.result()["w"], expected, rtol=0, atol=1e-6)
    assert torch.equal(like.gradient["w"], replies_of(1)[0].gradient["w"])


def test_a_running_mean_of_nothing_is_an_error() -> None:
    mean = RunningMean({"w": torch.zeros(1)})
    mean.add(reply(1.0, 0.0))
    with pytest.raises(ValueError, match="at least one reply"):
        mean.result()


# ---- robust rules


def vectors(*rows: list[float]) -> list[TrainReply]:
    """A reply for every row, its numbers in two tensors whose order differs from node to node, with weights that differ."""
    replies = []
    for i, row in enumerate(rows):
        parts = {"a": torch.tensor(row[:1]), "b": torch.tensor(row[1:]).reshape(1, -1)}
        replies.append(TrainReply(dict(reversed(parts.items())) if i % 2 else parts, float(i + 1), [0.0]))
    return replies


def combined(rule: str, malicious: float, *rows: list[float]) -> list[float]:
    result = aggregate(rule, malicious, vectors(*rows))
    assert result["b"].shape == (1, len(rows[0]) - 1)
    assert result["a"].dtype == torch.float32
    return [*result["a"].tolist(), *result["b"].flatten().tolist()]


def test_every_setting_is_a_rule() -> None:
    assert set(get_args(RunConfig.model_fields["aggregate"].annotation)) == {"mean", *RULES}


def test_rules_by_hand() -> None:
    rows = [[0.0, 0.0], [1.0, 0.0], [2.0, 1.0], [3.0, 2.0], [100.0, -100.0]]
    # First numbers 0 1 2 3 100, second -100 0 0 1 2.
    assert combined("median", 0.2, *rows) == [2.0, 0.0]
    assert combined("median", 0.2, *rows[:4]) == [1.5, 0.5]
    assert combined("trimmed-mean", 0.2, *rows) == [2.0, pytest.approx(1 / 3)]
    assert combined("trimmed-mean", 0.0, *rows) == pytest.approx([21.2, -19.4])
    # f = 1: the squared distances to the 5 - 1 - 2 = 2 nearest add up to 1 + 5, 1 + 2, 2 + 2, 2 + 8 and far more.
    assert combined("krum", 0.2, *rows) == [1.0, 0.0]
    # m = 2: the mean of the second and the third.
    assert combined("multi-krum", 0.2, *rows) == [1.5, 0.5]
    # The corners of a square around a centre that is one of them: by symmetry the centre.
    assert combined("geometric-median", 0.2, [1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]) == pytest.approx([0, 0])
    # Fermat's point of a triangle with an angle above 120 degrees is that corner.
    corner = combined("geometric-median", 0.2, [0.0, 0.0], [10.0, 1.0], [-10.0, 1.0])
    assert corner == pytest.approx([0.0, 0.0], abs=1e-4)


def by_numpy(rule: str, x: np.ndarray, f: int) -> Any:
    """The same rules in loops."""
    n, d = x.shape
    if rule == "median":
        return np.median(x, axis=0)
    if rule == "trimmed-mean":
        return np.array([np.mean(sorted(x[:, j])[f : n - f]) for j in range(d)])
    scores = [sum(sorted(np.sum((x[i] - x[j]) ** 2) for j in range(n) if j != i)[: n - f - 2]) for i in range(n)]
    order = sorted(range(n), key=lambda i: scores[i])
    return x[order[0]] if rule == "krum" else np.mean([x[i] for i in order[: n - f - 2]], axis=0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rule", ["median", "trimmed-mean", "krum", "multi-krum"])
def test_rules_agree_with_loops(rule: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(int(rng.integers(9, 14)), 6)).astype(np.float32)
    f = int(np.ceil(0.25 * len(x)))
    assert combined(rule, 0.25, *x.tolist()) == pytest.approx(by_numpy(rule, x.astype(float), f), abs=1e-6)


@pytest.mark.parametrize("far", [1.0, 1e6, 1e15])
@pytest.mark.parametrize("seed", range(3))
def test_at_the_geometric_median_the_unit_vectors_to_the_replies_cancel(seed: int, far: float) -> None:
    x = np.random.default_rng(seed).normal(size=(12, 5))
    x[:3] *= far
    z = np.array(combined("geometric-median", 0.2, *x.tolist()))
    towards = x - z
    pull = (towards / np.linalg.norm(towards, axis=1, keepdims=True)).sum(axis=0)
    # The derivative of the sum of distances; one reply alone pulls with 1.
    assert np.linalg.norm(pull) < 1e-4


@pytest.mark.parametrize("lie", [-4.0, 100.0, -1e12])
@pytest.mark.parametrize("rule", sorted(RULES))
def test_liars_that_agree_do_not_move_a_rule_out_of_the_honest_replies(rule: str, lie: float) -> None:
    honest = np.random.default_rng(0).normal(loc=1.0, scale=0.1, size=(16, 8))
    liars = np.full((4, 8), lie)
    got = np.array(combined(rule, 0.2, *np.concatenate([liars, honest]).tolist()))
    radius = np.linalg.norm(honest - honest.mean(axis=0), axis=1).max()
    assert np.linalg.norm(got - honest.mean(axis=0)) < radius
    plain = np.concatenate([liars, honest]).mean(axis=0)
    assert np.linalg.norm(plain - honest.mean(axis=0)) > radius


@pytest.mark.parametrize("rule", sorted(RULES))
def test_weights_do_not_enter_and_a_reply_without_weight_has_no_vote(rule: str) -> None:
    rows = [[float(i), float(i * i)] for i in range(7)]
    heavy = vectors(*rows)
    light = [TrainReply(r.gradient, 1.0, [0.0]) for r in heavy]
    mute = [TrainReply({"a": torch.tensor([1e9]), "b": torch.tensor([[1e9]])}, 0.0, [float("nan")])]
    results = [aggregate(rule, 0.2, replies) for replies in (heavy, light, light + mute)]
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_an_algorithm_that_sends_nothing_gets_nothing(rule: str) -> None:
    assert aggregate(rule, 0.2, [TrainReply({}, 1.0, [0.0])] * 5) == {}


def test_how_many_replies_a_rule_needs() -> None:
    # 20 % of 5, 6 and 4 is one, two (rounded up) and one; Krum needs 2 f + 3.
    assert [too_few("krum", 0.2, n) is None for n in (5, 6, 7, 4)] == [True, False, True, False]
    assert [too_few("median", 0.2, n) is None for n in (1, 2, 3)] == [False, False, True]
    assert too_few("mean", 0.2, 1) is None
    assert too_few("multi-krum", 0.4, 10) == (
        "with 10 nodes `malicious = 0.4` means 4, and `multi-krum` then needs at least 11 nodes"
    )
