"""Seen and unseen users side by side in a comparison, from run directories as runs leave them."""

import json
from pathlib import Path
from typing import Any

import pytest

from quickbloom.common.errors import ConfigError
from quickbloom.server_app.comparing.batch import Result, Run
from quickbloom.server_app.comparing.page import write_comparison_page
from quickbloom.server_app.comparing.plan import Plan
from quickbloom.server_app.comparing.result import assemble
from quickbloom.server_app.comparing.searching import Entry
from quickbloom.server_app.comparing.table import caption, table


def scores(*after: float) -> dict[str, Any]:
    """Means after 0, 1, .. steps; the worst tenth has half of them, and over examples they are a tenth more."""
    parts = {"mean": list(after), "ci95": [0.1] * len(after), "worst10": [value / 2 for value in after]}
    parts |= {"sd": [0.2] * len(after), "weighted": [1.1 * value for value in after]}
    return {"steps": list(range(len(after))), "accuracy": parts, "loss": parts}


def left(root: Path, plan: Plan, seed: int, seen: dict[str, Any] | None, test: dict[str, Any] | None) -> Result:
    run = Run(plan.candidates("fedavg")[0], seed, root)
    run.directory.mkdir(parents=True)
    held_out = 2 if test else 0
    summary = {"tasks": {"train": 5, "validation": held_out, "test": held_out}, "chosen": {"adapt_lr": 0.3, "adapt_steps": 1}}
    summary |= {"test": test, "validation": test, "seen": seen, "seconds": {"total": 1.0}}
    (run.directory / "summary.json").write_text(json.dumps(summary))
    (run.directory / "history.jsonl").write_text(json.dumps({"round": 1, "bytes": {"up": 1, "down": 1}}) + "\n")
    return Result(run, {"code": 0, "wall": 1.0, "failure": ""})


def compared(root: Path, seen: list[dict[str, Any] | None], test: dict[str, Any] | None, *settings: str) -> dict[str, Any]:
    plan = Plan(("fedavg",), tuple(range(len(seen))), "digits", 1, (0.1,), settings)
    entry = Entry("fedavg", {seed: [left(root, plan, seed, one, test)] for seed, one in enumerate(seen)})
    return assemble(plan, [entry], None)


def cells(result: dict[str, Any]) -> dict[str, str]:
    headings, rows = table(result)
    return dict(zip(headings, rows[0], strict=True))


def test_both_protocols_have_columns_with_means_over_seeds(tmp_path: Path) -> None:
    result = compared(tmp_path, [scores(0.5, 0.8), scores(0.7, 0.9)], scores(0.2, 0.4))
    shown = cells(result)
    assert (shown["before"], shown["chosen step"], shown["worst 10 %"]) == ("20.0 ± 0.0", "40.0 ± 0.0", "20.0 ± 0.0")
    seen = [shown[f"seen, {name}"] for name in ("before", "chosen step", "worst 10 %")]
    assert seen == ["60.0 ± 14.1", "85.0 ± 7.1", "42.5 ± 3.5"]
    (row,) = result["algorithms"]
    assert row["mean"]["seen_weighted"] == pytest.approx(1.1 * 0.85)
    assert row["mean"]["weighted"] == pytest.approx(1.1 * 0.4)
    assert any(said.startswith("Seen: training tasks") for said in caption(result))


def test_without_seen_users_the_table_is_as_it_was(tmp_path: Path) -> None:
    result = compared(tmp_path, [None], scores(0.2, 0.4))
    assert not any(heading.startswith("seen") for heading in table(result)[0])
    assert not any("Seen" in said for said in caption(result))


def test_where_all_tasks_train_the_table_and_the_page_are_of_them(tmp_path: Path) -> None:
    result = compared(tmp_path, [scores(0.5, 0.8)], None, "evaluate-users=seen")
    assert result["algorithms"][0]["failed"] == 0
    shown = cells(result)
    assert (shown["seen, before"], shown["seen, chosen step"]) == ("50.0", "80.0")
    assert "before" not in shown
    said = " ".join(caption(result))
    assert "on 5 training tasks, seed 0" in said
    assert "There are no validation tasks to choose on: all adapt with their inner rate" in said
    assert "seen, chosen step" in write_comparison_page(result, tmp_path / "page.html").read_text()


def test_without_validation_tasks_no_inner_rate_is_chosen() -> None:
    seen = ("evaluate-users=seen",)
    with pytest.raises(
        ConfigError, match="cannot choose the inner rate of `fedavg`, as scores of seen users must choose nothing"
    ):
        Plan(("fedavg",), (0,), "digits", 1, (0.1, 0.3), seen).check()
    Plan(("fedavg",), (0,), "digits", 1, (0.1,), seen).check()
    Plan(("fedavg",), (0,), "digits", 1, (0.1, 0.3), (*seen, "validation-tasks=4")).check()
