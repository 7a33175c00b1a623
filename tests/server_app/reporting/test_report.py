"""The HTML report of a run: of real files, whole or half done."""

import base64
import json
import math
import re
import shlex
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from loopback import LoopbackGrid

from quickbloom.common.baselines.scoring import TITLES
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.errors import DataError
from quickbloom.common.metric import ACCURACY, MSE, named
from quickbloom.common.wire.messages import TRAIN
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.events.file import written
from quickbloom.server_app.events.kinds import Warned
from quickbloom.server_app.launch.settings import parse_assignments
from quickbloom.server_app.reporting.drawing import possible
from quickbloom.server_app.reporting.page import Section, Text, write_page
from quickbloom.server_app.reporting.report import write_report
from quickbloom.server_app.reporting.run_record import RunFacts
from quickbloom.server_app.runs.directory import RunDirectory, read_history

HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "$\\frac{a$", "two\nlines\x00\x1b[31m", "病院🏥" * 30]
"""Names that a user's file may have: markup, what matplotlib takes for mathematics, what XML forbids, other scripts."""


def run(path: Path, **settings: Any) -> dict[str, Any]:
    known = {key.replace("_", "-").replace("--", "."): value for key, value in settings.items()}
    config = parse_run_config({"rounds": 2, "evaluate-every": 1, "adapt-steps": 3, "output-dir": str(path), **known})
    return run_federation(LoopbackGrid(2, config.flat()), config)


@pytest.fixture(scope="module", params=["digits", "sinusoid"])
def run_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "run"
    run(path, dataset=request.param, sinusoid__clients=12, test_shots="1,2")
    return path


def pictures(html: str) -> list[ET.Element]:
    """All pictures of a page, light and dark, as what they are: whole SVG documents."""
    found = re.findall(r"data:image/svg\+xml;base64,([^\"]+)", html)
    return [ET.fromstring(base64.b64decode(image)) for image in found]


def words(html: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


def test_the_report_tells_the_result_of_the_summary(run_dir: Path) -> None:
    text = words(write_report(run_dir, None).read_text())
    summary = json.loads((run_dir / "summary.json").read_text())
    step = summary["chosen"]["adapt_steps"]
    if "accuracy" in summary["test"]:
        scores = {part: 100 * summary["test"]["accuracy"][part][step] for part in ("mean", "ci95")}
        assert f"→ {scores['mean']:.1f} %" in text
        assert f"± {scores['ci95']:.1f} %, 95 % interval over 11 clients" in text
    else:
        assert f"→ {summary['test']['mse']['mean'][step]:.4g}" in text
        assert "mean squared error for unseen clients" in text


def test_every_section_is_there_and_no_section_is_empty(run_dir: Path) -> None:
    html = write_report(run_dir, None).read_text()
    headings = re.findall(r"<h2 id=\"([^\"]+)\">([^<]+)</h2>", html)
    said = ["Warnings"] * bool(RunFacts.read(run_dir).warnings)
    assert [heading for _, heading in headings] == [
        *(
            "Result",
            *said,
            "Seen users",
            "Baselines",
            "Learning",
            "Adaptation",
            "Clients",
            "Nodes",
            "Cost",
            "Configuration",
            "Repeat it",
        ),
    ]
    assert re.findall(r"<a href=\"#([^\"]+)\">", html) == [anchor for anchor, _ in headings]
    assert "</h2>\n</section>" not in html


def test_the_file_is_whole_in_itself_and_runs_nothing(run_dir: Path) -> None:
    html = write_report(run_dir, None).read_text()
    assert not re.search(r"(src|href|srcset)=\"(?!data:|#)", html)
    assert "<script" not in html
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in html
    for picture in pictures(html):
        links = [value for element in picture.iter() for name, value in element.attrib.items() if name.endswith("href")]
        assert all(link.startswith("#") for link in links)
        assert not [element for element in picture.iter() if element.tag.endswith(("script", "foreignObject"))]


def test_every_picture_has_a_dark_twin_and_a_text_with_its_figures(run_dir: Path) -> None:
    html = write_report(run_dir, None).read_text()
    drawn = len(re.findall("<figure>", html))
    assert drawn == 8  # validation, training, steps, shots, distribution, one by one, bytes, time
    assert len(pictures(html)) == 2 * drawn
    texts = re.findall(r"<img alt=\"([^\"]+)\"", html)
    assert len(texts) == drawn
    assert all(re.search(r"\d", text) for text in texts)


def test_a_band_ends_where_scores_end() -> None:
    assert possible([-5.0, 40.0, 104.0], ACCURACY) == [0.0, 40.0, 100.0]
    assert possible([-0.5, 104.0], MSE) == [0.0, 104.0]
    assert math.isnan(possible([math.nan], ACCURACY)[0])


def test_what_stands_between_backticks_is_shown_as_code(tmp_path: Path) -> None:
    page = write_page(tmp_path / "page.html", "t", "l", [Section("S", [Text("use `quickbloom <run>`, then look")])])
    assert "<p>use <code>quickbloom &lt;run&gt;</code>, then look</p>" in page.read_text()


def test_the_worst_tenth_is_named_with_its_scores(run_dir: Path) -> None:
    clients = RunFacts.read(run_dir).clients
    html = write_report(run_dir, None).read_text()
    table = html.partition("The worst 10 % after adaptation</caption>")[2].partition("</table>")[0]
    named = re.findall(r"<th scope=\"row\">([^<]+)</th>", table)
    assert named == [client.task for client in clients[: max(1, len(clients) // 10)]]
    summary = json.loads((run_dir / "summary.json").read_text())
    metric = "accuracy" if "accuracy" in summary["test"] else "mse"
    worst = summary["test"][metric]["worst10"][summary["chosen"]["adapt_steps"]]
    assert sum(client.after for client in clients[: len(named)]) / len(named) == pytest.approx(worst, abs=1e-6)


def test_a_run_that_goes_on_has_a_report_too(run_dir: Path, tmp_path: Path) -> None:
    for name in ("config.json", "history.jsonl"):
        (tmp_path / name).write_text((run_dir / name).read_text())
    text = words(write_report(tmp_path, tmp_path / "half.html").read_text())
    assert "The run has not finished: 2 rounds so far, of 2." in text
    assert "provisional" in text
    assert f"quickbloom run --resume {tmp_path}" in text


def test_a_run_of_which_no_round_has_ended_has_a_report_too(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((run_dir / "config.json").read_text())
    assert "Nothing was evaluated yet." in words(write_report(tmp_path, None).read_text())


def test_the_warnings_of_a_run_stand_in_its_report_in_full_and_once(run_dir: Path, tmp_path: Path) -> None:
    for file in ("config.json", "history.jsonl", "summary.json", "per_task.csv"):
        (tmp_path / file).write_text((run_dir / file).read_text())
    long = "Task Ward 0 is left out: " + "x" * 400
    with written(tmp_path, [Warned(long), Warned("it rains", 1), Warned(long, 2)]):
        pass
    html = write_report(tmp_path, None).read_text()
    assert words(html).count(long) == 1
    assert words(html).count("it rains") == 1
    assert re.findall(r"<h2 id=\"warnings\">([^<]+)</h2>", html) == ["Warnings"]


def test_a_run_with_skipped_rounds_has_a_report_too(tmp_path: Path) -> None:
    def silent(message: Message, answer: Callable[[Message], Message]) -> Message | None:
        return None if message.metadata.message_type == TRAIN and message.metadata.group_id == "1" else answer(message)

    settings = {"rounds": 3, "min-replies": 0.9, "on-too-few": "skip", "output-dir": str(tmp_path), "adapt-steps": 1}
    config = parse_run_config(settings)
    summary = run_federation(LoopbackGrid(2, config.flat(), {1: silent}), config)
    first, *others = read_history(tmp_path)
    assert (first["train"], "`min-replies` asks for 34" in first["skipped"]) == ({"loss": None, "tasks": 0}, True)
    assert all(line["train"]["tasks"] == summary["tasks"]["train"] for line in others[1:])
    text = words(write_report(tmp_path, None).read_text())
    assert "node 101 it sent no reply within `round-deadline` (600 s) 1 1 1" in text
    assert "100 3 0 0 0 101 1 1 0 2" in text  # node, rounds, failures, late, away: it was asked again for the third round
    assert "2 rounds were skipped for want of answers, the first of them round 1." in text
    assert "Round 1 is skipped, the model stays as it is: " in text


def test_a_node_that_was_drawn_is_not_named_in_a_private_run(tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    run(tmp_path, rounds=1, privacy__noise_multiplier=1.0, privacy__clip=1.0, privacy__delta=0.01)
    assert all("trained" not in line["nodes"] for line in read_history(tmp_path))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_shown_not_run_and_break_no_picture(run_dir: Path, tmp_path: Path, name: str) -> None:
    for file in ("config.json", "history.jsonl", "summary.json", "per_task.csv"):
        (tmp_path / file).write_text((run_dir / file).read_text())
    lines = read_history(tmp_path)
    lines[0]["failures"] = [{"who": f"node {name}", "reason": name}, {"who": name, "reason": name}]
    RunDirectory(tmp_path).write_rounds(lines)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"own.target-column": name}))
    rows = (tmp_path / "per_task.csv").read_text()
    task = RunFacts.read(tmp_path).clients[0].task
    quoted = '"' + name.replace('"', '""') + '"'
    (tmp_path / "per_task.csv").write_text(rows.replace(f"{task},test", f"{quoted},test"))
    assert RunFacts.read(tmp_path).clients[0].task == name
    with written(tmp_path, [Warned(name)]):
        pass
    page, harmless = (Elements(write_report(path, None).read_text()) for path in (tmp_path, run_dir))
    assert page.tags <= harmless.tags
    assert page.attributes <= harmless.attributes | {"td class"}  # of a long cell
    assert " ".join(name.split()) in " ".join(page.text.replace("\ufffd", "\x00").split())
    assert len(pictures(page.source)) == len(pictures(harmless.source))


class Elements(HTMLParser):
    """The tags, the names of attributes and the text of a page, as a parser of HTML sees them."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source, self.text = source, ""
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {f"{tag} {name}" for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def test_of_one_test_task_there_is_no_interval_and_it_is_said_why(tmp_path: Path) -> None:
    run(tmp_path, dataset="digits", test_tasks=1)
    text = words(write_report(tmp_path, None).read_text())
    assert "no interval: the spread over tasks cannot be told from a single one" in text
    assert json.loads((tmp_path / "summary.json").read_text())["test"]["accuracy"]["ci95"] == [None] * 4
    row = text.partition("test (1) accuracy")[2].partition("test (1) loss")[0]
    assert row
    assert "±" not in row


def test_the_command_of_the_report_gives_the_same_settings(tmp_path: Path) -> None:
    settings = {"algorithm": "maml", "maml.inner-steps": 3, "adapt-lrs": "0.1", "compile": True, "privacy.delta": 1e-3}
    config = parse_run_config({"dataset": "gaussian", "rounds": 7, "seed": 5, "min-nodes": 4, **settings}).resolved()
    RunDirectory(tmp_path).write_json("config.json", config.flat())
    program, verb, *rest = shlex.split(RunFacts.read(tmp_path).command())
    options = list(zip(rest[::2], rest[1::2], strict=True))
    assert (program, verb) == ("quickbloom", "run")
    given = parse_assignments([value for option, value in options if option == "--set"], "maml")
    named = dict(option for option in options if option[0] != "--set")
    assert named == {"--algorithm": "maml", "--dataset": "gaussian", "--rounds": "7", "--seed": "5", "--nodes": "4"}
    again = {"algorithm": "maml", "dataset": "gaussian", "rounds": 7, "seed": 5, "min-nodes": 4, **given}
    assert parse_run_config(again).resolved().flat() == config.flat()


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is no directory of a run: it holds no config\.json"):
        write_report(tmp_path, None)


def test_a_directory_of_a_comparison_is_refused_with_what_to_open(tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text("{}")
    with pytest.raises(DataError, match=r"holds a comparison: open its comparison\.html"):
        write_report(tmp_path, None)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("config.json", text) for text in ("", "[]", "{}")),
        *(("history.jsonl", text) for text in ("nonsense\n", "{}\n", "[1]\n", '{"round": 1, "train": null}\n')),
        *(("summary.json", text) for text in ("{", "[1]", "{}", '{"test": 3}')),
        *(("per_task.csv", text) for text in ("task,split\nA,test\n", "\x00")),
    ],
)
def test_damaged_files_are_named_in_one_sentence(run_dir: Path, tmp_path: Path, name: str, content: str) -> None:
    for file in ("config.json", "history.jsonl", "summary.json", "per_task.csv"):
        (tmp_path / file).write_text((run_dir / file).read_text())
    (tmp_path / name).write_text(content)
    if (name, content) == ("per_task.csv", "\x00"):  # a table without rows is none
        assert write_report(tmp_path, None).exists()
        return
    with pytest.raises(DataError, match="damaged") as error:
        write_report(tmp_path, None)
    assert str(tmp_path) in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_a_place_that_cannot_be_written_is_refused(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be written"):
        write_report(run_dir, tmp_path / "missing" / "report.html")


def test_the_report_of_a_private_run_says_what_it_is_worth(tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    private = {"privacy.noise-multiplier": 1.0, "privacy.clip": 1.0, "privacy.delta": 0.01}
    config = parse_run_config({"rounds": 1, "output-dir": str(tmp_path), "adapt-steps": 1, **private})
    summary = run_federation(LoopbackGrid(2, config.flat()), config)
    text = write_report(tmp_path, None).read_text()
    epsilon = f"{summary['privacy']['epsilon']:.4g}"
    assert f"Differential privacy of a training task: epsilon {epsilon}, delta 0.01, after 1 step." in text


def test_the_report_has_every_score_of_model_and_baselines(tmp_path: Path) -> None:
    summary = run(tmp_path / "run", dataset="sinusoid", sinusoid__clients=12, seed=1, baselines=True)
    page = write_report(tmp_path / "run", None).read_text()
    section = page.partition(">Baselines</h2>")[2].partition("</section>")[0]
    found = summary["baselines"]
    tables = section.split("</table>")[:-1]
    for table, content in zip(tables, (found, summary["seen"]["baselines"]), strict=True):
        rows = {
            name.strip(): re.findall(r"<td[^>]*>(.*?)</td>", cells)
            for name, cells in re.findall(r"<tr>\s*<th[^>]*>(.*?)</th>(.*?)</tr>", table, re.DOTALL)
            if "<td" in cells
        }
        assert {name for name in rows if "model" not in name} <= {"own mean", *TITLES.values()}
        for contender, title in (("after", "model, after"), ("own", TITLES["own"]), ("global", TITLES["global"])):
            for place, name in enumerate(name for name, held in content["scores"].items() if held):
                cell = content["scores"][name].get(contender)
                assert rows[title][place].strip() == (named(name).score(cell["mean"]) if cell else "-")
    said = words(section)
    assert f"on the same {found['tasks']} test clients" in said
    assert "The best baseline is" in said


def test_a_report_of_a_run_without_baselines_has_no_such_section(tmp_path: Path) -> None:
    run(tmp_path / "run", dataset="gaussian", baselines=False)
    assert ">Baselines<" not in write_report(tmp_path / "run", None).read_text()
