"""Modes beside each other: which runs there are, when an asynchronous one is as good as the waiting one, and what is shown."""

import base64
import re
from pathlib import Path
from typing import Any

import pytest

from quickbloom.common.errors import ConfigError
from quickbloom.common.metric import ACCURACY, MSE
from quickbloom.server_app.comparing import modes
from quickbloom.server_app.comparing.batch import Run
from quickbloom.server_app.comparing.comparison import planned
from quickbloom.server_app.comparing.page import write_comparison_page
from quickbloom.server_app.comparing.plan import Plan, parse_modes
from quickbloom.server_app.comparing.table import caption, markdown, table
from quickbloom.server_app.comparing.targets import curve, default_target
from quickbloom.server_app.comparing.watching import describe

PLAIN: dict[str, Any] = {"grid": {}, "edges": {}, "settings": []}
SMALL = ("sinusoid.clients=20", "over-select=1.3", "min-replies=0.5", "devices=lognormal")


def plan(*settings: str, both: tuple[str, ...] = ("sync", "async"), **more: Any) -> Plan:
    return Plan(("reptile",), (0, 1), "sinusoid", 4, (0.01,), settings, modes=both, **more)


# ---- the runs


def test_every_algorithm_has_a_run_in_each_mode_beside_each_other() -> None:
    what = Plan(("reptile", "fomaml"), (0,), "sinusoid", 4, (0.01,), SMALL, modes=("sync", "async"))
    assert what.variants == [("reptile", "sync"), ("reptile", "async"), ("fomaml", "sync"), ("fomaml", "async")]
    assert what.describe() == "4 runs: reptile, fomaml; 1 seed each, sync and async"
    waiting, free = (what.candidates("reptile", mode)[0] for mode in ("sync", "async"))
    assert (waiting.config().mode, waiting.config().over_select, waiting.config().min_replies) == ("sync", 1.3, 0.5)
    assert (free.config().mode, free.config().over_select, free.config().min_replies) == ("async", 1.0, 0.0)
    shared = {"mode", "over-select", "min-replies"}
    differs = {key for key, value in free.effective().items() if waiting.effective()[key] != value}
    assert differs == shared
    assert [describe(Run(setup, 0, Path("x"))) for setup in (waiting, free)] == [
        "reptile, inner lr 0.01, seed 0",
        "reptile, async, inner lr 0.01, seed 0",
    ]
    assert Run(waiting, 0, Path("x")).directory != Run(free, 0, Path("x")).directory


def test_settings_of_the_mode_async_are_for_its_runs_alone() -> None:
    what = plan(*SMALL, "async-buffer=3")
    waiting, free = (what.candidates("reptile", mode)[0].config() for mode in ("sync", "async"))
    assert (waiting.async_buffer, free.async_buffer) == (0, 3)
    assert what.nodes == 20
    assert planned(["reptile"], dataset="sinusoid", modes="sync,async", settings=["async-buffer=3"], seeds="1").modes
    assert modes.remark(("sync", "async"), ["async-buffer=3"]) == ""
    with pytest.raises(ConfigError, match='`async-buffer` does nothing with `mode = "sync"`'):
        planned(["reptile"], dataset="sinusoid", settings=["async-buffer=3"], seeds="1")


def test_there_is_a_node_for_each_task_where_it_matters_how_fast_they_are() -> None:
    assert plan(*SMALL).nodes == 20
    assert plan(*SMALL, both=()).nodes == 20
    assert plan("sinusoid.clients=20").nodes == 20
    assert plan("sinusoid.clients=20", both=()).nodes == 1
    assert plan(*SMALL).candidates("reptile", "async")[0].command(3)[-1] == "--json"
    assert "--nodes 20 " in " ".join(plan(*SMALL).candidates("reptile", "async")[0].command(3))


def test_what_async_runs_go_without_is_said_in_one_sentence() -> None:
    both = "`over-select` and `min-replies` are for rounds that wait: the async runs go without"
    assert modes.remark(("sync", "async"), SMALL) == both
    assert modes.remark(("sync", "async"), SMALL[:2]) == "`over-select` is for rounds that wait: the async runs go without"
    assert modes.remark(("sync",), SMALL) == ""
    assert modes.remark(("sync", "async"), ["rounds=2"]) == ""


def test_the_command_repeats_it() -> None:
    command = plan("sinusoid.clients=20", async_rounds=9).command()
    assert command.endswith("--inner-lrs 0.01 --modes sync,async --async-rounds 9 --set sinusoid.clients=20")
    waiting, free = (plan("sinusoid.clients=20", async_rounds=9).candidates("reptile", mode)[0] for mode in ("sync", "async"))
    assert (waiting.config().rounds, free.config().rounds) == (4, 9)
    assert "--modes" not in plan("sinusoid.clients=20", both=()).command()


def test_the_file_of_devices_decides_which_run_it_is(tmp_path: Path) -> None:
    file = tmp_path / "devices.csv"
    file.write_text("seconds,from,until\n1,0,0\n")

    def directory() -> Path:
        return Run(plan("sinusoid.clients=20", f"devices={file}").candidates("reptile", "sync")[0], 0, Path("x")).directory

    before = directory()
    file.write_text("seconds,from,until\n2,0,0\n")
    assert directory() != before


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"modes": "sync,fast"}, "`--modes` must be sync, async, or both with a comma between them, got 'sync,fast'"),
        ({"modes": "async", "settings": ["mode=sync"]}, "`mode` cannot be set with `--set` beside `--modes`"),
        ({"devices": "even", "settings": ["devices=lognormal"]}, "`devices` is given twice"),
        ({"async_rounds": 9}, "`--async-rounds` needs `--modes` with async in it"),
        ({"modes": "sync", "async_rounds": 9}, "`--async-rounds` needs `--modes` with async in it"),
        ({"modes": "async", "leave_one_out": True}, "`--leave-one-out` excludes `--modes`"),
        ({"modes": "async", "settings": ["secure-aggregation=true"]}, '`mode` must be "sync" with `secure-aggregation`'),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], sentence: str) -> None:
    settings = ["sinusoid.clients=20", *given.pop("settings", [])]
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        planned(["reptile"], dataset="sinusoid", settings=settings, rounds=2, seeds="1", **given)


def test_options_become_a_plan() -> None:
    what = planned(["reptile"], dataset="sinusoid", settings=["sinusoid.clients=20"], modes="async, sync", devices="even")
    assert what.modes == parse_modes("async,sync") == ("async", "sync")
    assert "devices=even" in what.settings


# ---- times, by hand


def line(number: int, hours: float | None, **validation: Any) -> dict[str, Any]:
    record: dict[str, Any] = {"round": number, "bytes": {"up": 1, "down": 2}, "seconds": 0.5}
    record |= {} if hours is None else {"virtual_hours": hours}
    return {**record, "validation": validation} if validation else record


def test_a_score_that_comes_in_later_is_timed_at_its_own_step() -> None:
    lines = [line(1, 0.5), line(2, 0.75), line(3, 2.0, accuracy=[0.1, 0.4], round=1), line(4, 3.0, accuracy=[0.1, 0.6])]
    assert modes.timeline(lines, ACCURACY, 10) == [[1, 0.4, 3, 0.5], [4, 0.6, 12, 3.0]]
    assert curve(lines, ACCURACY) == [[1, 0.4, 3], [4, 0.6, 12]]
    seconds = [line(number, None, accuracy=[0.1, 0.4]) for number in (1, 2)]
    assert [point[3] for point in modes.timeline(seconds, ACCURACY, 10)] == [0.5, 1.0]


def test_scores_are_compared_after_the_same_numbers_of_steps() -> None:
    # The last evaluation went on to four steps, and the best of all is there: earlier ones had two.
    lines = [line(1, 1.0, mse=[9, 5, 4]), line(2, 2.0, mse=[9, 5, None, 2, 1])]
    assert [point[1] for point in modes.timeline(lines, MSE, 2)] == [4, 5]


def rows() -> list[dict[str, Any]]:
    """Two seeds of one algorithm in both modes; in mode async the second one is never as good."""

    def run(seed: int, end: float, *points: list[float]) -> dict[str, Any]:
        known = {"seed": seed, "failure": "", "after": end, "validation": end, "time": points[-1][3]}
        return {**known, "timeline": list(points)}

    waiting = [
        run(0, 0.6, [2, 0.4, 100, 2.0], [4, 0.7, 200, 4.0], [6, 0.6, 300, 9.0]),
        run(1, 0.8, [2, 0.5, 100, 3.0], [4, 0.8, 200, 5.0]),
    ]
    free = [run(0, 0.7, [2, 0.59, 90, 0.5], [4, 0.6, 180, 1.0], [6, 0.7, 270, 2.0]), run(1, 0.7, [4, 0.79, 180, 1.5])]
    return [
        {"algorithm": "reptile", "mode": mode, "runs": runs, "mean": {"after": 0.5}} | PLAIN
        for mode, runs in (("sync", waiting), ("async", free))
    ]


def test_a_run_is_timed_to_what_the_waiting_one_of_its_seed_ends_at() -> None:
    found = rows()
    waiting, free = modes.beside_sync(found, ACCURACY, "virtual hours")["rows"]
    # Seed 0 ends at 0.6. It had 0.7 after 4 hours, which counts for it; mode async has 0.6 after 1 hour: a quarter.
    assert [run["time_to_sync"] for run in found[0]["runs"]] == [4.0, 5.0]
    assert [(run["time_to_sync"], run["ratio"], run["bytes_to_sync"]) for run in found[1]["runs"]] == [
        (1.0, 0.25, 180),
        (None, None, None),
    ]
    assert (waiting["reached"], free["reached"]) == (2, 1)
    assert waiting["mean"]["time"] == 7.0  # 9 and 5 hours
    assert waiting["sd"]["time"] == pytest.approx(8**0.5)
    assert (free["mean"]["ratio"], free["sd"]["ratio"], free["mean"]["after"]) == (0.25, None, 0.7)


def test_without_runs_that_wait_there_is_nothing_to_reach() -> None:
    (free,) = modes.beside_sync(rows()[1:], ACCURACY, "seconds")["rows"]
    assert (free["reached"], free["mean"]["ratio"], free["mean"]["time"]) == (0, None, 1.75)


def test_a_run_that_failed_is_no_part_of_it() -> None:
    found = rows()
    found[0]["runs"][0] = {"seed": 0, "failure": "not finite"}
    waiting, free = modes.beside_sync(found, ACCURACY, "seconds")["rows"]
    assert waiting["mean"]["time_to_sync"] == 5.0
    assert free["reached"] == 0


def test_the_target_of_rounds_is_that_of_a_run_that_waits() -> None:
    found = rows()
    found[1]["runs"][0]["validation"] = found[1]["runs"][1]["validation"] = 0.1
    assert default_target(found, ACCURACY)[0] == pytest.approx(0.7)  # 0.6 and 0.8 of mode sync


# ---- what is shown


def result() -> dict[str, Any]:
    shown = rows()
    names = ("before", "after_1", "after_5", "after_10", "after", "worst10", "rounds_to_target", "bytes_to_target", "seconds")
    for row in shown:
        row |= {"failed": 0, "reached": 0, "mean_rank": None, "rate": "given", "edge": [], "tried": [], "configuration": {}}
        row |= {"mean": dict.fromkeys(names, 0.5), "sd": dict.fromkeys(names)}
        for run in row["runs"]:
            run |= {"inner_lr": 0.1, "adapt_lr": 0.1, "adapt_steps": 1, "curve": [], "steps": [], "shots": {}, "command": "x"}
    said = {"steps": 10, "remark": modes.remark(("sync", "async"), SMALL)}
    return {
        **{"metric": "accuracy", "data": "digits", "seeds": [0, 1], "tasks": {"test": 3}, "nodes": 3, "evaluate_every": 2},
        **{"adapt_lrs": [0.1], "target": {"validation": 0.7, "origin": "x"}, "baselines": [], "command": "quickbloom compare"},
        "algorithms": shown,
        "paired": {"metric": "accuracy", "best": None, "pairs": []},
        **{"data_parts": [], "data_sha256": "0", "versions": {}},
        "modes": {**modes.beside_sync(shown, ACCURACY, "virtual hours"), **said},
    }


def test_the_table_has_hours_ratio_and_bytes() -> None:
    headings, (waiting, free) = modes.table(result())
    assert headings == [
        *("algorithm", "mode", "test accuracy", "validation accuracy", "virtual hours"),
        *("virtual hours to sync's score", "ratio to sync", "bytes until then"),
    ]
    assert waiting[:2] == ["reptile", "sync"]
    assert waiting[4:] == ["7 ± 2.8", "4.5 ± 0.71 (2 of 2)", "1 ± 0", "200 B"]  # hours 9 and 5; 4 and 5
    assert free == ["reptile", "async", "70.0 ± 0.0", "70.0 ± 0.0", "1.75 ± 0.35", "1 (1 of 2)", "0.25", "180 B"]
    assert [cells[0] for cells in table(result())[1]] == ["reptile, sync", "reptile, async"]
    assert "| reptile | async | 70.0 ± 0.0 |" in markdown(result())


def test_the_caption_says_what_is_timed_and_what_is_left_out() -> None:
    said = " ".join(caption(result()))
    assert "Modes: virtual hours to sync's score are those until the first evaluation" in said
    assert "after at most 10 steps" in said
    assert "`over-select` and `min-replies` are for rounds that wait: the async runs go without." in said
    assert "`--devices`" not in said
    found = result()
    found["modes"]["unit"] = "seconds"
    assert "whose cores all nodes share" in " ".join(caption(found))
    found["modes"] = None
    assert "Modes" not in " ".join(caption(found))


def test_the_page_draws_scores_by_hours_and_by_bytes(tmp_path: Path) -> None:
    html = write_comparison_page(result(), tmp_path / "x.html").read_text()
    texts = dict(re.findall(r"<img alt=\"(Validation tasks by [^:]+): ([^\"]+)\"", html))
    # Of rounds that both seeds evaluated the last: round 4 in both modes, at 0.7 and 0.8 after 4 and 5 hours; 0.6 and 0.79.
    assert texts["Validation tasks by virtual hours"] == (
        "reptile, sync 75.0 % after 4.5 virtual hours; reptile, async 69.5 % after 1.25 virtual hours."
    )
    assert texts["Validation tasks by bytes"] == (
        "reptile, sync 75.0 % after 0.0002 MB up and down; reptile, async 69.5 % after 0.00018 MB up and down."
    )
    drawn = [base64.b64decode(found).decode() for found in re.findall(r"src=\"data:image/svg\+xml;base64,([^\"]+)", html)]
    assert ["reptile, async" in svg and "virtual hours" in svg for svg in drawn][:2] == [True, False]
    assert "stroke-dasharray" in drawn[0]  # the line of mode sync
