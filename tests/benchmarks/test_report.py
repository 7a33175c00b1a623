"""The report of a large run, 1,000 tasks and 1,000 rounds: its size and what it leaves out. The benchmark measures its time."""

import json
import re
from pathlib import Path

from benchmarks.report import MEGABYTES, write_run
from quickbloom.server_app.reporting.report import write_report
from quickbloom.server_app.runs.directory import read_history


def test_a_large_run_has_a_small_report_that_adds_up(tmp_path: Path) -> None:
    write_run(tmp_path, tasks=1000, rounds=1000)
    html = write_report(tmp_path, None).read_text()
    assert len(html.encode()) < MEGABYTES * 1e6
    failures = sum(len(line["failures"]) for line in read_history(tmp_path))
    assert json.loads((tmp_path / "summary.json").read_text())["failures"] == failures
    table = html.partition("<caption>Nodes in 1000 rounds")[2].partition("</table>")[0]
    rows = [[int(cell) for cell in re.findall(r"<td>(\d+)</td>", row)] for row in table.split("</tr>")[1:-1]]
    assert len(rows) == 60
    assert all(rounds + failed == 1000 for rounds, failed, _, _ in rows)
    assert sum(failed for _, failed, _, _ in rows) == failures


def test_of_very_many_clients_the_worst_are_listed_and_it_is_said_where_the_others_are(tmp_path: Path) -> None:
    write_run(tmp_path, tasks=20_000, rounds=3)
    html = write_report(tmp_path, None).read_text()
    assert len(html.encode()) < MEGABYTES * 1e6
    assert "The worst 10 % after adaptation (the first 1000 of 2000; per_task.csv has all)" in html
    assert "Every unseen client (the worst 1000 of 20000; per_task.csv has all)" in html
