"""The tests of a ranking against numbers by hand, and a result file from a real comparison."""

from pathlib import Path

import pytest

from benchmarks import ranking, runner


def test_differences_p_and_effect_by_hand() -> None:
    by_seed = {
        "ridge": {0: 0.9, 1: 0.8, 2: 0.7, 3: 0.9, 4: 0.9, 5: 0.8},
        "fedavg": {0: 0.8, 1: 0.75, 2: 0.68, 3: 0.87, 4: 0.86, 5: 0.74},
        "local": {0: 0.9, 1: 0.79, 2: 0.72, 3: 0.9, 4: 0.9, 5: 0.8},
    }
    found = ranking.tests(by_seed, "ridge")
    tuned, local = found["best"]
    assert (tuned["first"], tuned["other"]) == ("ridge", "fedavg")
    assert tuned["difference"] == pytest.approx((0.1 + 0.05 + 0.02 + 0.03 + 0.04 + 0.06) / 6)
    # Six differences above zero: of 2^6 equally likely signs one is as extreme, and one at the other end.
    assert (tuned["p"], tuned["effect"]) == (2 / 64, 1.0)
    # +0.01 with rank 1, -0.02 with rank 2, and four zeros that are left out.
    assert (local["p"], local["effect"]) == (1.0, pytest.approx(-1 / 3))
    assert (tuned["holm"], local["holm"]) == (4 / 64, 1.0)
    assert [(test["first"], test["other"]) for test in found["fedavg"]] == [("ridge", "fedavg"), ("local", "fedavg")]
    assert found["fedavg"][0]["difference"] == pytest.approx(0.05)


def test_a_seed_that_one_row_lacks_is_no_pair() -> None:
    found = ranking.tests({"maml": {0: 0.9, 2: 0.7}, "fedavg": {0: 0.8, 1: 0.6, 2: 0.7}}, "maml")
    assert found["best"][0]["differences"] == pytest.approx([0.1, 0.0])


def test_a_ranking_is_of_the_real_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ranking, "RAW", tmp_path)
    monkeypatch.setitem(ranking.CASES, "gaussian", (("local", "fedavg"), 2, ("adapt-steps=2",)))
    result = ranking.ranking(ranking.comparison("gaussian", seeds=2, jobs=2))
    after = [row["mean"]["after"] for row in result["rows"]]
    assert after == sorted(after, reverse=True)
    best, other = (row["runs"] for row in result["rows"])
    assert result["tests"]["best"][0]["differences"] == pytest.approx(
        [one["after"] - two["after"] for one, two in zip(best, other, strict=True)], abs=1e-7
    )
    assert [one["seed"] for one in best] == [0, 1]
    assert [row["failed"] for row in result["rows"]] == [0, 0]
    assert str(tmp_path) not in result["command"]
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    runner.finish(result, text := ranking.table(result))
    assert (tmp_path / "ranking-gaussian.json").exists()
    assert text.count("\n| ") == 2 + len(result["baselines"])
