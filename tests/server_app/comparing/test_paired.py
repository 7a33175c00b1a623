"""Paired tests against scipy, numbers worked by hand, and a simulation of the number of seeds that settles a difference."""

from typing import Any

import numpy as np
import pytest

from quickbloom.common.metric import ACCURACY, MSE
from quickbloom.server_app.comparing.paired import (
    caption,
    compared,
    holm,
    mean_ranks,
    midranks,
    seeds_needed,
    signed_rank,
    table,
)

stats = pytest.importorskip("scipy.stats", reason="the oracle: it comes with scikit-learn")


@pytest.mark.parametrize("number", [1, 5, 6, 12, 30, 60])
def test_p_values_are_those_of_scipy_without_ties(number: int) -> None:
    rng = np.random.default_rng(number)
    for shift in (0.0, 0.5, 2.0):
        values = rng.normal(shift, 1, number)
        assert signed_rank(values)[0] == pytest.approx(stats.wilcoxon(values, method="exact").pvalue, rel=1e-9)


@pytest.mark.parametrize("number", [4, 9, 12])
def test_p_values_with_equal_differences_are_those_of_all_permutations(number: int) -> None:
    values = np.random.default_rng(number).integers(-2, 4, number).astype(float)
    kept = values[values != 0]
    exact = stats.wilcoxon(kept, method=stats.PermutationMethod(n_resamples=np.inf)).pvalue
    assert signed_rank(values)[0] == pytest.approx(exact, rel=1e-9)


def test_p_values_of_many_are_those_of_scipys_normal_distribution() -> None:
    values = np.round(np.random.default_rng(0).normal(0.1, 1, 400), 1)
    kept = values[values != 0]
    assert signed_rank(values)[0] == pytest.approx(stats.wilcoxon(kept, method="asymptotic").pvalue, rel=1e-6)


def test_the_effect_by_hand() -> None:
    # |d| = 1, 2, 3, 4 have ranks 1..4; for the first 1 + 3 + 4 = 8, for the second 2: (8 - 2) / 10.
    assert signed_rank([1, -2, 3, 4])[1] == pytest.approx(0.6)
    # 1 and 1 share ranks 1 and 2; 3 has rank 3: (1.5 + 3 - 1.5) / 6.
    assert signed_rank([1, -1, 3])[1] == pytest.approx(0.5)
    assert signed_rank([0, 0]) == (1.0, 0.0)
    assert signed_rank([1, 2, 3, 4, 5, 6]) == pytest.approx((2 / 64, 1.0))


def test_ranks_are_those_of_scipy() -> None:
    values = np.random.default_rng(3).integers(0, 5, 40).astype(float)
    assert midranks(values).tolist() == stats.rankdata(values).tolist()


def test_holm_by_hand() -> None:
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.04, and never falling.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_so_many_seeds_find_the_difference_in_four_of_five_experiments() -> None:
    rng = np.random.default_rng(0)
    seen = rng.normal(0, 1, 8)
    seen = 0.8 + (seen - seen.mean()) / seen.std(ddof=1)  # mean 0.8, deviation 1
    number = seeds_needed(seen, 1)
    assert number is not None
    found = np.mean([signed_rank(rng.normal(0.8, 1, number))[0] < 0.05 for _ in range(1500)])
    assert 0.75 < found < 0.88


def test_there_are_never_fewer_seeds_than_could_be_clear() -> None:
    assert seeds_needed([1.0, 1.001, 0.999], 1) == 6  # 2 / 2^6 = 0.03, 2 / 2^5 = 0.06
    assert seeds_needed([1.0, 1.001, 0.999], 4) == 8  # 0.05 / 4 = 0.0125; 2 / 2^8 = 0.008
    assert seeds_needed([1.0], 1) is None
    assert seeds_needed([1.0, -1.0], 1) is None


def scores(**rows: list[list[float]]) -> tuple[dict[str, dict[int, dict[str, float]]], dict[str, dict[int, float]]]:
    """Of users u0, u1, .. by seed, and their means."""
    users = {name: {seed: {f"u{i}": v for i, v in enumerate(one)} for seed, one in enumerate(by)} for name, by in rows.items()}
    means = {name: {seed: float(np.mean(one)) for seed, one in enumerate(by)} for name, by in rows.items()}
    return users, means


def test_pairs_by_hand() -> None:
    found = compared(*scores(a=[[0.5, 0.7], [0.6, 0.8]], b=[[0.4, 0.5], [0.3, 0.6]], c=[[0.4, 0.5], [0.3, 0.6]]), ACCURACY)
    assert found["best"] == "a"
    first = found["pairs"][0]
    assert (first["first"], first["second"]) == ("a", "b")
    # Seeds: 0.6 - 0.45 and 0.7 - 0.45; users: 0.55 - 0.35 and 0.75 - 0.55.
    assert first["seeds"]["difference"] == pytest.approx(0.2)
    assert first["seeds"]["sd"] == pytest.approx(0.1 / np.sqrt(2))
    assert (first["users"]["pairs"], first["users"]["difference"]) == (2, pytest.approx(0.2))
    assert (first["seeds"]["p"], first["seeds"]["effect"]) == (0.5, 1.0)
    assert (first["seeds"]["holm"], first["seeds"]["holm_all"]) == (1.0, 1.0)
    assert [(pair["first"], pair["second"]) for pair in found["pairs"]] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert found["pairs"][2]["seeds"]["holm"] is None  # no test of the best
    assert found["ranks"] == {"a": 1.0, "b": 2.5, "c": 2.5}


def test_where_lower_is_better_signs_and_ranks_turn_round() -> None:
    users, means = scores(a=[[0.5, 0.7]], b=[[0.4, 0.8]], c=[[0.1, 0.2]])
    found = compared(users, means, MSE)
    assert found["best"] == "c"
    assert found["pairs"][0]["seeds"]["difference"] == pytest.approx(0.45)
    assert mean_ranks(users, MSE) == {"a": 2.5, "b": 2.5, "c": 1.0}


def test_rows_without_scores_and_users_of_one_row_alone_are_left_out() -> None:
    users, means = scores(a=[[0.5, 0.7]], b=[[0.4]])
    found = compared({**users, "c": {}}, {**means, "c": {}}, ACCURACY)
    assert [(pair["second"], pair["users"]["pairs"]) for pair in found["pairs"]] == [("b", 1)]
    assert compared({}, {}, ACCURACY)["pairs"] == []


def said(**rows: list[list[float]]) -> dict[str, Any]:
    return {"paired": compared(*scores(**rows), ACCURACY)}


def test_what_is_settled_and_what_is_not_is_said() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(0.5, 0.05, (8, 5))
    noisy = base + np.array([-3, 2, -2, 1, -3, 2, -1, -1])[:, None] / 100
    result = said(good=base.tolist(), bad=(base - 0.1).tolist(), like=noisy.tolist())
    text = " ".join(caption(result))
    assert "good is better than bad: p below 0.05 over seeds." in text
    needed = result["paired"]["pairs"][1]["seeds_needed"]
    assert "good is better than like is not settled by 8 seeds" in text
    assert f"about {needed} seeds would settle it" in text
    headings, cells = table(result)
    assert headings[0] == "good beside"
    assert [row[0] for row in cells] == ["bad", "like"]
    # p of 8 seeds on one side is 2 / 2^8, twice that with Holm.
    assert cells[0][1:4] == ["10.0 ± 0.0", "0.016", "+1.00"]


def test_one_seed_and_one_row_are_no_ground_for_a_test() -> None:
    assert "two seeds are the fewest that can tell" in " ".join(caption(said(a=[[0.5, 0.6]], b=[[0.4, 0.5]])))
    assert "1 seed cannot settle anything here, whatever the scores: p is at least 1." in " ".join(
        caption(said(a=[[0.5, 0.6]], b=[[0.4, 0.5]]))
    )
    assert (caption(said(a=[[0.5]])), table(said(a=[[0.5]]))) == ([], ([], []))
