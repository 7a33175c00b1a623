"""The mean over tasks does not see nodes; the other rules are those of the papers, and some liars do not move them."""

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch

from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.errors import ConfigError
from quickbloom.common.maths import params
from quickbloom.common.maths.params import Params
from quickbloom.common.randomness import generator
from quickbloom.common.wire.messages import TrainReply
from quickbloom.server_app.federation.robust.aggregation import (
    RULES,
    RunningMean,
    aggregate,
    aggregate_round,
    in_buckets,
    mean_over_tasks,
    too_few,
)

COMPARING = sorted(set(RULES) - {"fltrust"})
"""Rules that compare replies with one another, and not with the server's own."""


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
@pytest.mark.parametrize("rule", COMPARING)
def test_liars_that_agree_do_not_move_a_rule_out_of_the_honest_replies(rule: str, lie: float) -> None:
    honest = np.random.default_rng(0).normal(loc=1.0, scale=0.1, size=(16, 8))
    liars = np.full((4, 8), lie)
    got = np.array(combined(rule, 0.2, *np.concatenate([liars, honest]).tolist()))
    radius = np.linalg.norm(honest - honest.mean(axis=0), axis=1).max()
    assert np.linalg.norm(got - honest.mean(axis=0)) < radius
    plain = np.concatenate([liars, honest]).mean(axis=0)
    assert np.linalg.norm(plain - honest.mean(axis=0)) > radius


@pytest.mark.parametrize("rule", COMPARING)
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


# ---- the rule with a history, and buckets


def clipped(rows: Any, centre: list[float] | None = None, radius: float = 0.0, steps: int = 1) -> list[float]:
    start = {} if centre is None else {"b": torch.tensor([centre[1:]]), "a": torch.tensor(centre[:1])}
    found = aggregate("centered-clip", 0.2, vectors(*np.asarray(rows).tolist()), centre=start, radius=radius, steps=steps)
    return [*found["a"].tolist(), *found["b"].flatten().tolist()]


def test_centered_clipping_by_hand() -> None:
    # Around (1, 0) with tau 5 the updates are (0, 0), (2, 0), (6, 8) of length 10, halved, and (-3, -4) of length 5: their sum
    # is (0 + 2 + 3 - 3, 0 + 0 + 4 - 4), a quarter of it (0.5, 0).
    rows = [[1.0, 0.0], [3.0, 0.0], [7.0, 8.0], [-2.0, -4.0]]
    assert clipped(rows, [1.0, 0.0], 5.0) == pytest.approx([1.5, 0.0])
    # The lengths are 0, 2, 5 and 10. Of an even number of them the lower middle one is the median, 2:
    # (2, 0), (1.2, 1.6) and (-1.2, -1.6) remain.
    assert clipped(rows, [1.0, 0.0]) == pytest.approx([1.5, 0.0])
    # Without a history it starts at the median of every number, (2, 0).
    assert clipped(rows, radius=100.0) == pytest.approx([9 / 4, 1.0])
    assert clipped(rows, radius=1e-9) == pytest.approx([2.0, 0.0], abs=1e-8)
    # Most are at the centre: the others do not count.
    assert clipped([[1.0, 1.0]] * 3 + [[9.0, 9.0]] * 2, [1.0, 1.0], steps=3) == [1.0, 1.0]


def clipped_by_numpy(x: np.ndarray, v: np.ndarray, radius: float, steps: int) -> Any:
    for _ in range(steps):
        lengths = [math.dist(one, v) for one in x]
        tau = radius or sorted(lengths)[(len(x) - 1) // 2]
        v = v + np.mean([(one - v) * min(1.0, tau / length) for one, length in zip(x, lengths, strict=True)], axis=0)
    return v


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("radius", [0.0, 1.5])
def test_centered_clipping_agrees_with_loops(radius: float, steps: int) -> None:
    rng = np.random.default_rng(steps)
    x = rng.normal(size=(9, 5)).astype(np.float32)
    x[:2] *= 50
    v = rng.normal(size=5).astype(np.float32)
    assert clipped(x, v.tolist(), radius, steps) == pytest.approx(clipped_by_numpy(x, v, radius, steps), abs=1e-5)
    first = clipped_by_numpy(x, np.median(x, axis=0), radius, steps)
    assert clipped(x, None, radius, steps) == pytest.approx(first, abs=1e-5)


@pytest.mark.parametrize("lie", [3.0, 1e6, 1e15])
def test_a_liar_moves_the_centre_by_tau_over_n_at_a_step_however_far_it_is(lie: float) -> None:
    rows = np.zeros((5, 3), dtype=np.float32)
    rows[0, 0] = lie
    assert clipped(rows, [0.0] * 3, 2.0) == pytest.approx([2 / 5, 0.0, 0.0])


def test_buckets_are_all_replies_once_in_an_order_drawn_from_seed_and_round() -> None:
    updates = torch.arange(7.0, dtype=torch.float64).unsqueeze(1)

    def drawn(seed: int, number: int) -> list[float]:
        return in_buckets(updates, 3, generator(seed, "buckets", number)).flatten().tolist()

    order = generator(4, "buckets", 2).permutation(7).tolist()
    expected = [np.mean(order[:3]), np.mean(order[3:6]), float(order[6])]
    assert drawn(4, 2) == pytest.approx(expected)
    assert drawn(4, 2) == drawn(4, 2)
    assert len({tuple(drawn(seed, number)) for seed in (4, 5) for number in (1, 2, 3)}) == 6


@pytest.mark.parametrize("rule", COMPARING)
def test_a_rule_with_buckets_is_the_rule_on_their_means(rule: str) -> None:
    x = np.random.default_rng(3).normal(size=(13, 4)).astype(np.float32)
    config = parse_run_config({"aggregate": rule, "bucketing": 2, "malicious": 0.1, "seed": 6})
    found = aggregate_round(config, vectors(*x.tolist()), 9, {})
    order = generator(6, "buckets", 9).permutation(13)
    means = [x[order[i : i + 2]].mean(axis=0).tolist() for i in range(0, 13, 2)]
    # Of 13 replies 10 % are two, which is also what 2 / 7 of seven votes are.
    alone = aggregate(rule, 2 / 7, vectors(*means))
    for name in alone:
        assert torch.allclose(found[name], alone[name], rtol=0, atol=1e-5)
    other = aggregate_round(config, vectors(*x.tolist()), 10, {})
    assert not all(torch.equal(found[name], other[name]) for name in found)


def test_with_buckets_as_many_liars_face_fewer_votes() -> None:
    assert [too_few("median", 0.2, n, 2) is None for n in (8, 9, 10)] == [False, True, True]  # 4, 5 and 5 votes, f = 2
    assert too_few("krum", 0.2, 10, 2) == (
        "with 10 nodes in 5 buckets (`bucketing = 2`) `malicious = 0.2` means 2, and `krum` then needs at least 7 buckets"
    )
    assert too_few("mean", 0.2, 1, 2) is None
    with pytest.raises(ValueError, match="need a random generator"):
        aggregate("median", 0.2, vectors([1.0, 2.0]), bucketing=2)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"bucketing": 2}, '`bucketing` must be 1 with `aggregate = "mean"`, because the mean of buckets is .*, got 2'),
        ({"bucketing": 2, "secure-aggregation": True}, "`bucketing` must be 1 with `secure-aggregation`, because the server"),
        ({"clip-radius": 2.0, "aggregate": "median"}, '`clip-radius` does nothing with `aggregate = "median"`, got 2.0'),
        ({"clip-steps": 1}, '`clip-steps` does nothing with `aggregate = "mean"`, got 1'),
        ({"clip-steps": 0, "aggregate": "centered-clip"}, "`clip-steps` must be"),
    ],
)
def test_settings_of_rules_that_would_do_nothing_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_run_config(settings)
