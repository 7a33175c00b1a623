"""The advice that follows from trials whose scores are made by hand."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from quickbloom.common.metric import named
from quickbloom.server_app.advising.advice import advise, decision
from quickbloom.server_app.advising.candidates import Candidate
from quickbloom.server_app.advising.page import lines, table, write
from quickbloom.server_app.advising.trials import Trial
from quickbloom.server_app.runs.directory import to_json

NAN = math.nan
HOSTILE = "[red]<b>Ann</b>"


def scores(*values: float) -> dict[str, float]:
    """One user for each value: u0, u1, .."""
    return {f"u{place}": value for place, value in enumerate(values)}


def trial(
    after: dict[str, float],
    telling: dict[str, float] | None = None,
    *,
    metric: str = "rmse",
    model: tuple[str, str] = ("ridge", "linear"),
    shots: Mapping[int, float | None] | None = None,
    own: dict[str, float] | None = None,
    constant: dict[str, float] | None = None,
    one_model: dict[str, float] | None = None,
) -> Trial:
    """A candidate with these scores of the choosing and the telling users; baselines have the same of both."""
    beside = {"own": own, "constant": constant, "global": one_model}
    baselines = {name: found for name, found in beside.items() if found}
    curve = {"shots": list(shots), metric: {"mean": list(shots.values())}} if shots else None
    run: dict[str, Any] = {"baselines": {"metric": metric}, "shots": curve, "bytes": {"up": 300, "down": 700}}
    run |= {"seconds": {"total": 2.0}}
    parts = {"choosing": {"after": after, **baselines}, "telling": {"after": telling or after, **baselines}}
    return Trial(Candidate(*model), 100, [run], parts)


def found(*trials: Trial, few: bool = False) -> dict[str, Any]:
    return {**advise(trials, few=few), "data": "<data>.csv", "command": ""}


def said(content: dict[str, Any]) -> str:
    return decision(content, named(content["metric"]))


def test_gain_and_interval_by_hand() -> None:
    # Errors 1, 2, 3 where own rows alone have 2, 4, 6: gains 1, 2, 3, mean 2, sd 1, half 4.303 * 1 / sqrt(3) = 2.484.
    content = found(trial(scores(1, 2, 3), own=scores(2, 4, 6), constant=scores(9, 9, 9)))
    gain = content["gains"]["own rows"]
    assert (content["own_rows"], gain["mean"], gain["users"]) == ("own", 2.0, 3)
    assert gain["half"] == pytest.approx(4.30265 / math.sqrt(3), abs=1e-4)
    assert said(content) == "Take `ridge` with `model=linear`; over own data alone its gain is not certain (2 ± 2.5)"
    assert lines(content)[1] == (
        "For 3 users, `ridge` (linear) is better than ridge regression on the user's own rows alone by 2 ± 2.5, which is not "
        "certain."
    )


@pytest.mark.parametrize(
    ("model", "own", "end"),
    [
        ((1.0, 2.0, 3.0), (3.0, 4.1, 4.9), ": a user gains 2 ± 0.25 over own data alone"),
        ((3.0, 4.1, 4.9), (1.0, 2.0, 3.0), ": a user loses 2 ± 0.25 over own data alone"),
        ((1.0, 2.0, 3.0), (0.0, 3.0, 2.0), "; over own data alone its loss is not certain (0.3333 ± 2.9)"),
        ((1.0, 2.0), (2.0, 1.0), "; on average it does as well as own data alone"),
        ((1.0,), (3.0,), "; the one user that was scored gained 2 over own data alone, which says little of others"),
        ((3.0,), (1.0,), "; the one user that was scored lost 2 over own data alone, which says little of others"),
        ((NAN,), (1.0,), ""),
    ],
)
def test_every_form_of_the_gain(model: tuple[float, ...], own: tuple[float, ...], end: str) -> None:
    # The choosing users take the model in each case; what is told is of others.
    choosing = {"after": scores(0.1, 0.1), "own": scores(5, 5)}
    made = trial(scores(0), own=scores(0))
    made = Trial(
        made.candidate, 100, made.runs, {"choosing": choosing, "telling": {"after": scores(*model), "own": scores(*own)}}
    )
    assert said(found(made)) == f"Take `ridge` with `model=linear`{end}"


def test_of_equal_ones_the_simplest_is_taken() -> None:
    def take(own: float, one_model: float = 0.1, constant: float = 0.1) -> str:
        beside = [scores(value, value) for value in (own, constant, one_model)]
        content = found(trial(scores(0.800, 0.900), metric="auroc", own=beside[0], constant=beside[1], one_model=beside[2]))
        return str(content["take"])

    # The model's mean is 0.85. What is within 0.005 of the best is as good.
    assert take(own=0.846, one_model=0.85) == "own"
    assert take(own=0.844, one_model=0.846) == "global"
    assert take(own=0.844, one_model=0.844) == "ridge, linear"
    assert take(constant=0.846, own=0.85) == "constant"


def test_of_an_error_equal_is_a_part_of_it() -> None:
    own = [found(trial(scores(100, 100), own=scores(value, value)))["take"] for value in (100.4, 100.6)]
    assert own == ["own", "ridge, linear"]


def test_what_needs_no_model_is_said_so() -> None:
    content = found(trial(scores(2, 2), own=scores(1, 1)))
    assert content["kind"] == "own rows"
    assert said(content).startswith("Do not federate: ridge regression on the user's own rows alone does as well as")
    assert not [line for line in lines(content) if line.startswith("Cost")]
    content = found(trial(scores(2, 2), own=scores(3, 3), one_model=scores(1, 1)))
    assert content["kind"] == "one model"
    assert said(content).startswith("Federate, but do not personalise: one ridge regression for all users does as well")


def test_the_best_trained_model_is_told_of_wherever_it_stands() -> None:
    content = found(
        trial(scores(3, 3), own=scores(9, 9)), trial(scores(2, 2), model=("maml", "mlp"), own=scores(9, 9), shots={1: 5.0})
    )
    assert (content["take"], content["model"]["algorithm"]) == ("maml, mlp", "maml")
    assert content["shots"] == [{"shots": 1, "score": 5.0}]
    assert [row["name"] for row in content["candidates"]] == ["maml, mlp", "ridge, linear", "own"]


def test_losers_are_those_worse_than_alone_the_worst_first() -> None:
    content = found(trial(scores(1, 5, 2, 3, NAN), own=scores(2, 1, 2, 2, 1), constant=scores(9, 9, 9, 9, 9)))
    assert [one["task"] for one in content["losers"]] == ["u4", "u1", "u3"]
    (sentence,) = [line for line in lines(content) if "lose" in line]
    assert sentence == (
        "With `ridge` (linear) 3 of 5 users lose against own rows alone: u4 (1 alone, diverged), u1 (1 alone, 5), "
        "u3 (2 alone, 3)."
    )
    nobody = lines(found(trial(scores(1, 1), own=scores(2, 2))))
    assert "With `ridge` (linear) none of 2 users loses against own rows alone." in nobody
    many = lines(found(trial(scores(*[2.0] * 7), own=scores(*[1.0] * 7))))
    assert [line for line in many if line.endswith(" and 2 more.")]


@pytest.mark.parametrize(
    ("shots", "sentence"),
    [
        ({1: 5.0, 5: 1.9, 10: 1.5}, "From 5 rows of a user on, `ridge` (linear) is better than all own rows alone (2)."),
        ({1: 1.9, 5: 2.1, 10: 1.5}, "From 10 rows of a user on, `ridge` (linear) is better than all own rows alone (2)."),
        ({1: 1.9, 5: 1.8}, "From 1 row of a user on, `ridge` (linear) is better than all own rows alone (2)."),
        ({1: 5.0, 5: 2.0}, "With 5 rows of a user or fewer, `ridge` (linear) does not beat all own rows alone (2)."),
        ({1: None, 5: 1.0}, "From 5 rows of a user on, `ridge` (linear) is better than all own rows alone (2)."),
    ],
)
def test_from_how_many_rows_on_it_is_better(shots: dict[int, float | None], sentence: str) -> None:
    assert sentence in lines(found(trial(scores(1, 1), own=scores(2, 2), shots=shots)))


def test_shots_of_several_runs_are_their_mean_where_all_have_them() -> None:
    one, other = (trial(scores(1, 1), own=scores(2, 2), shots=shots) for shots in ({1: 4.0, 2: 3.0}, {1: 2.0, 5: 1.0}))
    both = Trial(one.candidate, 100, [*one.runs, *other.runs], one.scores)
    assert found(both)["shots"] == [{"shots": 1, "score": 3.0}]


def test_where_everything_trained_diverged_there_is_advice_in_json_and_words(tmp_path: Path) -> None:
    content = found(trial(scores(NAN, NAN), own=scores(2, 3), shots={1: None}))
    assert (content["take"], content["gains"]["own rows"]["mean"], content["shots"]) == ("own", None, [])
    assert "NaN" not in to_json(content)
    text = write(content, tmp_path / "advice.html").read_text()
    assert "diverged" in text


def test_names_of_users_are_shown_as_they_are(tmp_path: Path) -> None:
    content = found(trial({HOSTILE: 2.0}, own={HOSTILE: 1.0}, shots={1: 3.0, 2: 2.5}), few=True)
    assert any(HOSTILE in line for line in lines(content))
    page = write(content, tmp_path / "advice.html").read_text()
    assert "<b>Ann" not in page
    assert "&lt;b&gt;Ann" in page
    assert "&lt;data&gt;.csv" in page
    assert page.count("<figure>") == 1


def test_few_users_are_told_so() -> None:
    content = found(trial(scores(1, 2), own=scores(2, 3)), few=True)
    assert any(line.startswith("There are only 2 users: each was held out once") for line in lines(content))
    assert [column.header for column in table(content).columns][2:] == ["2 users to choose by", "the same users"]
    content = found(trial(scores(1, 2), scores(1, 2, 3), own=scores(2, 3, 4)))
    assert [column.header for column in table(content).columns][2:] == ["2 users to choose by", "3 other users"]
    assert any(line.startswith("Only 2 users decided: another split") for line in lines(content))
