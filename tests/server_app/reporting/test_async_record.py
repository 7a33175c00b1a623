"""What summary.json and the report say of mode async and of virtual time: of records made by hand, and of real runs."""

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from quickbloom.common.config.run import parse_run_config
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.federation.asynchronous.turns import contributions
from quickbloom.server_app.messaging.in_process_grid import InlineGrid
from quickbloom.server_app.reporting.report import write_report
from quickbloom.server_app.reporting.run_record import RunFacts
from quickbloom.server_app.runs.directory import read_history


def words(page: Path) -> str:
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", page.read_text())).split())


def titles(page: Path) -> list[str]:
    return re.findall(r"<figcaption>\s*([^<]+?)\s*</figcaption>", page.read_text())


def run(path: Path, **settings: Any) -> dict[str, Any]:
    """A run of 20 sinusoids, a device for each."""
    known = {key.replace("_", "-").replace("--", "."): value for key, value in settings.items()}
    shared = {"dataset": "sinusoid", "sinusoid.clients": 20, "rounds": 6, "tasks-per-round": 4, "evaluate-every": 2}
    shared |= {"algorithm": "reptile", "baselines": False, "adapt-steps": 2, "seed": 3, "output-dir": str(path)}
    config = parse_run_config({**shared, **known})
    return run_federation(InlineGrid(20, config.flat(), {}), config)


# ---- by hand


def line(number: int, **more: Any) -> dict[str, Any]:
    return {
        "round": number,
        "train": {"loss": 1.0, "tasks": 4},
        "nodes": {"asked": 1, "answered": 1, "away": [], "trained": [], "late": {}},
        "bytes": {"up": 1, "down": 2},
        "seconds": 0.5,
        "failures": [],
        **more,
    }


def written(path: Path, *lines: dict[str, Any], **settings: Any) -> Path:
    """The directory of a run that goes on, with these lines."""
    path.mkdir(exist_ok=True)
    config = parse_run_config({"algorithm": "reptile", "dataset": "digits", "rounds": 10, **settings})
    (path / "config.json").write_text(json.dumps(config.flat()))
    (path / "history.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def steps(**more: Any) -> list[dict[str, Any]]:
    """Three steps with 3 + 1 + 4 contributions of staleness 0, 1 + 2 of 1, 1 of 6, and 5 that were dropped."""
    counted = [({"0": 3, "1": 1}, 0), ({"0": 1, "1": 2, "6": 1}, 5), ({"0": 4}, 0)]
    return [
        line(number, **{"async": {"staleness": found, "dropped": dropped, "turn": 9, "at-work": 4}}, **more)
        for number, (found, dropped) in enumerate(counted, 1)
    ]


def test_the_report_counts_steps_staleness_and_what_was_dropped(tmp_path: Path) -> None:
    page = write_report(written(tmp_path, *steps(), mode="async"), None)
    text = words(page)
    assert "reptile on digits, seed 0, async" in text
    assert "steps per minute 120 3 steps in all" in text  # 3 in 1.5 s
    assert "mean staleness, in steps 0.75" in text  # (3 * 1 + 6) / 12
    assert "67% of 12 contributions were of the newest model" in text
    assert "contributions dropped 5" in text
    assert "8 of 12 contributions with none, median 0, the oldest 6 steps." in page.read_text()


def test_where_time_is_virtual_steps_are_counted_by_its_hours(tmp_path: Path) -> None:
    lines = [{**one, "virtual_hours": hours} for one, hours in zip(steps(), (0.5, 0.7, 2.0), strict=True)]
    page = write_report(written(tmp_path, *lines, mode="async", devices="even"), None)
    assert "steps per virtual hour 1.5" in words(page)
    assert "virtual hours 2 0.5 bytes up" in words(page)  # of rounds of 0.5, 0.2 and 1.3 hours the median
    assert "3 after 2 virtual hours." in page.read_text()


def test_scores_stand_at_the_step_whose_model_was_scored(tmp_path: Path) -> None:
    lines = steps()
    scores = {"adapt_lr": 0.1, "loss": [1.0, 1.0], "tasks": 2}
    lines[1]["validation"] = {**scores, "accuracy": [0.1, 0.5], "round": 1}
    lines[2]["validation"] = {**scores, "accuracy": [0.2, 0.75]}
    for one, hours in zip(lines, (0.5, 0.7, 2.0), strict=True):
        one["virtual_hours"] = hours
    known = RunFacts.read(written(tmp_path, *lines, mode="async"))
    assert known.evaluations == [(1, 0.1, 0.5, 2), (3, 0.2, 0.75, 2)]
    page = write_report(tmp_path, None)
    assert "after 0.5 virtual hours 50.0 %; after 2 75.0 %." in page.read_text()


def test_a_run_of_rounds_on_real_devices_has_nothing_of_both(tmp_path: Path) -> None:
    page = write_report(written(tmp_path, line(1), line(2)), None)
    assert "Asynchronous" not in words(page)
    assert "virtual" not in page.read_text()


def test_who_hardly_ever_contributes_has_less_than_half_of_the_median() -> None:
    counted = {"A": 4, "B": 2, "C": 1, "D": 9}
    # 0, 1, 2, 4, 9: the median is 2, and half of it 1.
    assert contributions(counted, ["A", "B", "C", "D", "E"]) == {"least": 0, "median": 2, "most": 9, "rarely": ["E"]}
    # 1, 2, 4, 9: the median is 3, and half of it 1.5. Who trains no more does not count.
    assert contributions({**counted, "gone": 1}, ["A", "B", "C", "D"])["rarely"] == ["C"]
    many = {f"t{place:02d}": 10 for place in range(30)}
    seldom = {f"s{place:02d}": place % 3 for place in range(12)}
    rarest = contributions({**many, **seldom}, [*many, *seldom])["rarely"]
    assert rarest == ["s00", "s03", "s06", "s09", "s01", "s04", "s07", "s10", "s02", "s05"]


# ---- real runs


@pytest.fixture(scope="module", params=["sync", "async"])
def simulated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict[str, Any]]:
    path = tmp_path_factory.mktemp("simulated") / "run"
    return request.param, path, run(path, mode=request.param, devices="lognormal", round_deadline=7200.0)


def test_the_summary_agrees_with_the_history(simulated: tuple[str, Path, dict[str, Any]]) -> None:
    mode, path, summary = simulated
    history = read_history(path)
    assert summary["virtual_hours"] == history[-1]["virtual_hours"] > 0
    if mode == "sync":
        assert summary["async"] is None
        return
    said = summary["async"]
    ages = [age for record in history for age, n in record["async"]["staleness"].items() for _ in range(n)]
    assert said["staleness"] == {age: ages.count(age) for age in sorted(set(ages), key=int)}
    assert len(ages) == sum(record["train"]["tasks"] for record in history) == 24  # 6 steps of 4
    assert said["dropped"] == sum(record["async"]["dropped"] for record in history)
    assert said["steps_per_virtual_hour"] == pytest.approx(6 / summary["virtual_hours"], abs=1e-4)
    assert said["steps_per_minute"] is None
    counted = said["contributions"]
    assert counted["least"] <= counted["median"] <= counted["most"]
    assert counted["least"] * summary["tasks"]["train"] <= 24 <= counted["most"] * summary["tasks"]["train"]


def test_the_report_of_a_simulation_shows_virtual_time(simulated: tuple[str, Path, dict[str, Any]]) -> None:
    mode, path, summary = simulated
    page = write_report(path, path.parent / "report.html")
    text = words(page)
    assert f"training took {summary['virtual_hours']:.3g} virtual hours" in text
    assert any(title.startswith("Validation clients by virtual time") for title in titles(page))
    assert ("Staleness of the contributions" in titles(page)) == (mode == "async")
    if mode == "async":
        named = summary["async"]["contributions"]["rarely"]
        assert named
        assert f"less than half as often as the median: {', '.join(named)}." in text


def test_real_time_is_counted_by_the_minute(tmp_path: Path) -> None:
    summary = run(tmp_path / "run", mode="async", rounds=3)
    seconds = sum(record["seconds"] for record in read_history(tmp_path / "run"))
    assert summary["virtual_hours"] is None
    assert summary["async"]["steps_per_minute"] == pytest.approx(180 / seconds, rel=1e-3)
    assert summary["async"]["steps_per_virtual_hour"] is None


def test_runs_of_both_modes_stand_beside_each_other_by_virtual_time(tmp_path: Path) -> None:
    scores = {"adapt_lr": 0.1, "loss": [1.0, 1.0], "tasks": 2, "accuracy": [0.1, 0.5]}
    for mode, hours in (("sync", 4.0), ("async", 0.5)):
        written(tmp_path / mode, line(1, validation=scores, virtual_hours=hours), mode=mode)
    page = write_report([tmp_path / "sync", tmp_path / "async"], tmp_path / "both.html")
    assert "sync: 50.0 % after 4; async: 50.0 % after 0.5 virtual hours." in page.read_text()
