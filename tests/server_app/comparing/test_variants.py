"""Named rows and grids: how they are written, which runs they mean, and who goes on from a short run to a longer one."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from quickbloom.common.errors import ConfigError
from quickbloom.server_app.comparing import searching
from quickbloom.server_app.comparing.batch import Result, Run
from quickbloom.server_app.comparing.comparison import planned
from quickbloom.server_app.comparing.page import write_comparison_page
from quickbloom.server_app.comparing.plan import Plan
from quickbloom.server_app.comparing.result import assemble
from quickbloom.server_app.comparing.searching import Entry, compare
from quickbloom.server_app.comparing.table import caption, markdown, table
from quickbloom.server_app.comparing.variants import Grid, Variant, parse_grid, parse_variant, variant_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fedper:heads.head-steps=0", Variant("fedper", "heads", ("heads.head-steps=0",))),
        ("fedrep:heads,heads.head-steps=5", Variant("fedrep", "heads", ("heads.head-steps=5",))),
        ("slow:maml,inner-lr=0.1,outer-lr=0.2", Variant("slow", "maml", ("inner-lr=0.1", "outer-lr=0.2"))),
        ("two:heads,heads.head=a,b,inner-lr=1", Variant("two", "heads", ("heads.head=a,b", "inner-lr=1"))),
        ("again:maml", Variant("again", "maml")),
    ],
)
def test_a_variant_is_read_as_told_and_written_so_that_it_is_read_again(text: str, expected: Variant) -> None:
    assert parse_variant(text) == expected
    assert parse_variant(str(expected)) == expected


def test_a_variant_from_python_is_the_one_of_the_text() -> None:
    assert variant_of("fedrep", {"algorithm": "heads", "head_steps": 5}) == parse_variant("fedrep:heads,head-steps=5")
    assert variant_of("fedper", {"heads.head-steps": 0}) == parse_variant("fedper:heads.head-steps=0")
    assert variant_of("two", {"algorithm": "heads", "head": "a=1,b"}).settings == ("head=a=1,b",)


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        (["heads"], "`--variant` must look like NAME:ALGORITHM,setting=value or NAME:ALGORITHM.setting=value, got 'heads'"),
        ([":heads"], "`--variant` must look like"),
        (["a:heads,head-steps"], "`--variant` must look like"),
        (["a:rounds=3"], "must name one algorithm: write NAME:ALGORITHM"),
        (["a:heads.head-steps=1,maml.inner-lr=1"], "must name one algorithm"),
        (["a:head"], "`algorithm` must be one of .* did you mean `heads`"),
        (["a:heads,rounds=3"], "must not set `rounds`, which all rows share: use `--rounds`"),
        (["a:heads,seed=3"], "must not set `seed`, which all rows share: use `--seeds`"),
        (["a:heads,test-tasks=3"], "must not set `test-tasks`, which all rows share: use `--set`"),
        (["a:heads,adapt-lrs=3"], "must not set `adapt-lrs`, because all rows are adapted with the same rates"),
        (["a:heads", "a:maml"], "must give every row a name of its own, got 'a' twice"),
        (["reptile:heads"], "must give every row a name of its own, got 'reptile' twice"),
        (["a:heads,rats=1"], "there is no setting `rats`"),
        (["a:heads,maml.inner-lr=1"], ""),
    ],
)
def test_a_variant_that_means_nothing_is_refused_in_one_sentence(texts: list[str], sentence: str) -> None:
    if sentence:
        with pytest.raises(ConfigError, match=sentence):
            planned(["reptile"], variants=texts, dataset="gaussian", rounds=2)
    else:  # as with `--set`: the settings of another algorithm change nothing
        planned(["reptile"], variants=texts, dataset="gaussian", rounds=2)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("inner-lr", "`--grid` must look like setting=value,value,value, got 'inner-lr'"),
        ("inner-lr=", "`--grid` must look like"),
        ("rounds=1,2", "must not set `rounds`, which all rows share"),
        ("heads.head-steps=1,2", "is of no use: `heads.head-steps` is no setting of reptile"),
        ("rats=1,2", "is of no use: `rats` is no setting of reptile"),
        ("inner-lr=0.1,x", "`reptile.inner-lr`"),
    ],
)
def test_a_grid_that_means_nothing_is_refused_in_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        planned(["reptile"], grids=[text], dataset="gaussian", rounds=2)


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs something to compare: name it with `--algorithms` or `--variant`"):
        planned([], dataset="gaussian", rounds=2)


def plan(*variants: str, algorithms: tuple[str, ...] = (), grids: tuple[str, ...] = (), rounds: int = 9) -> Plan:
    named = tuple(map(parse_variant, variants))
    settings = ("gaussian.clients=8",)
    return Plan(
        algorithms, (0, 1), "gaussian", rounds, (0.1, 0.3), settings, False, (), None, named, tuple(map(parse_grid, grids))
    )


def test_one_algorithm_has_as_many_rows_as_it_has_names() -> None:
    what = plan("fedper:heads.head-steps=0", "fedrep:heads,head-steps=5,inner-lr=0.2", algorithms=("heads",))
    steps = {
        name: [setup.effective()["heads.head-steps"] for setup in what.candidates(name)]
        for name in ("heads", "fedper", "fedrep")
    }
    assert steps == {"heads": [0, 0], "fedper": [0, 0], "fedrep": [5]}
    assert what.describe() == "10 runs: heads (2 inner rates), fedper (2 inner rates), fedrep; 2 seeds each"
    # The rate of one row is a rate of adaptation for all.
    assert {setup.effective()["adapt-lrs"] for name in what.rows for setup in what.candidates(name)} == {what.adapt_lrs}
    assert "0.2" in what.adapt_lrs.split(",")
    words = shlex.split(what.command())
    variants = [words[at + 1] for at, word in enumerate(words) if word == "--variant"]
    assert tuple(map(parse_variant, variants)) == what.named_rows


def test_a_grid_holds_for_the_rows_that_know_its_setting_and_do_not_set_it() -> None:
    what = plan(
        "fedrep:heads,head-steps=5", algorithms=("heads", "maml", "local"), grids=("heads.head-steps=0,1", "inner-lr=0.1,1,2")
    )
    assert {name: len(what.candidates(name)) for name in what.rows} == {"heads": 6, "maml": 3, "local": 3, "fedrep": 3}
    assert what.searched("fedrep") == {"heads.inner-lr": ("0.1", "1", "2")}
    assert "--grid heads.head-steps=0,1 --grid inner-lr=0.1,1,2" in what.command()
    assert Grid("model", ("mlp",)).key_for("maml") == "model"  # a setting of the run is for all


@pytest.mark.parametrize(
    ("values", "rounds", "expected"),
    [
        (1, 9, [(9, 1)]),
        (2, 9, [(9, 2)]),
        (3, 9, [(3, 3), (9, 1)]),
        (5, 10, [(4, 5), (10, 2)]),
        (9, 100, [(12, 9), (34, 3), (100, 1)]),  # 100 / 9 and 100 / 3, rounded up
        (27, 9, [(1, 27), (3, 9), (9, 3)]),  # fewer than one round is none
        (3, 2, [(2, 3)]),
    ],
)
def test_a_third_goes_on_with_three_times_the_rounds(values: int, rounds: int, expected: list[tuple[int, int]]) -> None:
    what = plan(algorithms=("maml",), grids=("inner-lr=" + ",".join(f"{1 + n}" for n in range(values)),), rounds=rounds)
    assert what.rungs("maml") == expected


def test_without_a_grid_every_inner_rate_has_all_rounds() -> None:
    assert plan(algorithms=("maml",)).rungs("maml") == [(9, 2)]


def leave(run: Run, validation: float, test: float) -> None:
    """The files of a finished run."""

    def part(after: float) -> dict[str, Any]:
        ends = {"mean": [0.1, after], "ci95": [0, 0], "worst10": [0, after / 2]}
        return {"steps": [0, 1], "accuracy": ends, "loss": ends}

    run.directory.mkdir(parents=True, exist_ok=True)
    summary = {"tasks": {"test": 2}, "chosen": {"adapt_lr": 0.3, "adapt_steps": 1}, "seconds": {"total": 1.0}}
    summary |= {"validation": part(validation), "test": part(test)}
    (run.directory / "summary.json").write_text(json.dumps(summary))
    (run.directory / "history.jsonl").write_text("")


def install(monkeypatch: pytest.MonkeyPatch, scores: Any) -> list[tuple[float, int, int]]:
    """Runs that are done at once: `scores` maps (inner lr, rounds, seed) to the validation accuracy, None: it failed."""
    calls: list[tuple[float, int, int]] = []

    def perform(wanted: list[Run], *rest: Any, **more: Any) -> dict[Run, Result]:
        found = {}
        for run in wanted:
            rate, rounds = float(run.setup.effective()["maml.inner-lr"]), run.setup.rounds
            calls.append((rate, rounds, run.seed))
            value = scores(*calls[-1])
            if value is None:
                found[run] = Result(run, {}, 1, "not finite")
                continue
            leave(run, value, 1 - value)
            found[run] = Result(run, {"wall": 1.0})
        return found

    monkeypatch.setattr(searching, "perform", perform)
    return calls


def gridded(**more: Any) -> Plan:
    return plan(algorithms=("maml",), grids=("inner-lr=1,2,3,4,5",), **more)


def entry_of(what: Plan, directory: Path) -> Entry:
    (entry,) = compare(what, directory, 1, Console(quiet=True))
    return entry


def test_the_best_by_validation_go_on_and_test_scores_are_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Validation grows with the rate while runs are short, and falls in the end; test is 1 less.
    calls = install(monkeypatch, lambda rate, rounds, seed: rate / 10 if rounds == 3 else 1 - rate / 10)
    entry = entry_of(gridded(), tmp_path)
    assert calls[:10] == [(rate, 3, seed) for seed in (0, 1) for rate in (1, 2, 3, 4, 5)]
    assert calls[10:] == [(rate, 9, seed) for seed in (0, 1) for rate in (4, 5)]
    assert {seed: one.run.setup.effective()["maml.inner-lr"] for seed, one in entry.chosen.items() if one} == {0: 4.0, 1: 4.0}


def test_what_failed_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(monkeypatch, lambda rate, rounds, seed: None if rate > 1 else 0.5)
    result = assemble(gridded(), [entry_of(gridded(), tmp_path)], None)
    assert [call for call in calls if call[1] == 9] == [(1.0, 9, 0), (1.0, 9, 1)]
    assert [one["failure"] for one in result["algorithms"][0]["tried"][:5]] == ["", *["not finite"] * 4]


def test_where_every_candidate_fails_the_row_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, lambda rate, rounds, seed: None)
    result = assemble(gridded(), [entry_of(gridded(), tmp_path)], None)
    assert table(result)[1][0][0] == "maml (2 of 2 failed)"


def test_the_table_says_what_was_chosen_and_where_the_grid_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, lambda rate, rounds, seed: (rate if seed else 6 - rate + (rate == 2)) / 10)
    what = gridded()
    result = assemble(what, [entry_of(what, tmp_path)], None)
    row = result["algorithms"][0]
    assert row["grid"] == {"maml.inner-lr": ["1", "2", "3", "4", "5"]}
    assert [run["settings"] for run in row["runs"]] == [{"maml.inner-lr": 1.0}, {"maml.inner-lr": 5.0}]
    assert row["edges"] == {"maml.inner-lr": [0, 1]}
    assert [one["rounds"] for one in row["tried"]] == [3] * 5 + [9] * 2 + [3] * 5 + [9] * 2
    said = " ".join(caption(result))
    assert "maml: `maml.inner-lr` of 1, 2, 3, 4, 5, 5 combinations, in runs of 3, 9 rounds." in said
    assert "At the edge of the grid, so that a wider one (`--grid`) may do better: maml, `maml.inner-lr`, seeds 0, 1." in said


def test_a_setting_of_words_has_no_edge_and_a_row_without_a_grid_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, lambda rate, rounds, seed: 0.5)
    what = plan("m2:maml,model=mlp,inner-lr=0.1", "m1:maml,inner-lr=0.3", grids=("model=mlp,linear",))
    result = assemble(what, compare(what, tmp_path, 1, Console(quiet=True)), None)
    assert [row["edges"] for row in result["algorithms"]] == [{}, {"model": []}]
    headings, (second, first) = table(result)
    assert headings[:3] == ["algorithm", "inner lr", "model"]
    assert (second[:3], first[:3]) == (["m2", "0.1", "-"], ["m1", "0.3", "mlp"])
    said = " ".join(caption(result))
    assert "Not searched beyond the inner rate, so at a disadvantage: m2." in said
    assert "Rows: m2 is maml with `model=mlp` and `inner-lr=0.1`; m1 is maml with `inner-lr=0.3`." in said
    assert "| m2 | 0.1 |" in markdown(result)
    page = write_comparison_page(result, tmp_path / "x.html").read_text()
    assert "m1, m2" not in page.partition("</title>")[0]
    assert "m2, m1 on" in page.partition("</title>")[0]


def test_rows_with_the_same_settings_share_their_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(monkeypatch, lambda rate, rounds, seed: rate)
    what = plan("same:maml,inner-lr=0.3", "again:maml,maml.inner-lr=0.3", algorithms=("maml",))
    entries = compare(what, tmp_path, 1, Console(quiet=True))
    assert sorted(calls) == [(0.1, 9, 0), (0.1, 9, 1), (0.3, 9, 0), (0.3, 9, 1)]
    assert {one.run.directory.name for entry in entries if (one := entry.chosen[0])} == {
        entries[0].tried[0][1].run.directory.name
    }
