"""A user's own data in whole runs: one file on the command line, or a file on every node."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loopback import LoopbackGrid
from rich.console import Console
from typer.testing import CliRunner

from quickbloom import adapt
from quickbloom.client_app.check_data import describe
from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.datasets.own import Own, task_of_file
from quickbloom.common.datasets.own.columns import Schema
from quickbloom.common.datasets.own.vocabulary import key
from quickbloom.common.errors import ConfigError, DataError
from quickbloom.common.formatting import data_name
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.cli import main
from quickbloom.server_app.events.channel import Events
from quickbloom.server_app.events.kinds import Event, Joined, RoundEnded, Warned
from quickbloom.server_app.federation.roll_call import call_roll
from quickbloom.server_app.messaging.in_process_grid import InlineGrid
from quickbloom.server_app.reporting.report import write_report
from quickbloom.server_app.reporting.result_table import result_table
from quickbloom.server_app.reporting.run_record import RunFacts
from quickbloom.server_app.runs.directory import read_history

SMALL = ["--in-process", "--no-report", "--json", "--set", "evaluate-every=0", "--set", "mlp.hidden=16"]


def hospital(name: str, sign: float, rng: np.random.Generator, task: str = "hospital", target: str = "outcome") -> str:
    """80 rows of a hospital whose outcome hangs on its own `sign` of the marker; every tenth age is missing."""
    lines = [f"{task},age,marker,{target}"]
    for row in range(80):
        marker = rng.normal()
        age = "" if row % 10 == 0 else f"{rng.normal(60, 10):.1f}"
        lines.append(f"{name},{age},{marker * (1 + len(name)):.4f},{'ill' if sign * marker > 0 else 'well'}")
    return "\n".join(lines)


def hospitals(path: Path) -> Path:
    """Two of four flip the marker; E has one row."""
    rng = np.random.default_rng(0)
    files = [hospital(name, sign, rng).split("\n") for name, sign in (("A", 1), ("B", -1), ("C", 1), ("D", -1))]
    path.write_text("\n".join([files[0][0], *(line for file in files for line in file[1:]), "E,50,0.1,ill"]))
    return path


def run(*arguments: str) -> tuple[dict[str, Any], str]:
    """(summary, what a person reads) of `quickbloom run`."""
    result = CliRunner().invoke(main.cli, ["run", *SMALL, *arguments])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), result.stderr


def test_hospitals_with_missing_values_are_personalised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", str(hospitals(tmp_path / "h.csv")), "--task", "hospital", "--target", "outcome"]
    left = ["--set", "own.leave-out=D", "--rounds", "20", "--output", str(tmp_path / "run")]
    summary, said = run(*data, *left, "--algorithm", "reptile")
    accuracy = summary["test"]["accuracy"]["mean"]
    # One of the others chooses the rate.
    assert summary["tasks"] == {"train": 2, "validation": 1, "test": 1}
    # One model for all cannot know which way the marker of D points; 32 examples of D tell.
    assert accuracy[-1] > 0.75 > accuracy[0]
    assert "1 task is left out: E (it has 1 row with a target" in " ".join((said + capsys.readouterr().err).split())
    rows = (tmp_path / "run" / "per_task.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows if ",test," in row] == ["D"]


def test_titles_name_the_file_and_not_the_folder_that_it_lies_in(tmp_path: Path) -> None:
    folder = tmp_path / "secret-folder"
    folder.mkdir()
    data = ["--data", str(hospitals(folder / "wards[red].csv")), "--task", "hospital", "--target", "outcome"]
    summary, _ = run(*data, "--set", "own.leave-out=D", "--rounds", "1", "--output", str(tmp_path / "run"))
    assert summary["data"] == "wards[red].csv"
    console = Console(width=300, file=io.StringIO(), record=True)
    console.print(result_table(summary))
    title = "ridge on wards[red].csv, 1 rounds, seed 0"
    assert title in console.export_text()
    facts = RunFacts.read(tmp_path / "run")
    assert facts.title == "ridge on wards[red].csv, seed 0"
    (heading,) = re.findall("<h1[^>]*>(.*?)</h1>", write_report(tmp_path / "run", None).read_text(), re.DOTALL)
    assert "wards[red].csv" in heading
    assert "secret" not in heading


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"dataset": "digits", "own.path": ""}, "digits"),
        ({"dataset": "own", "own.path": "/home/me/wards.parquet"}, "wards.parquet"),
        ({"dataset": "own", "own.path": "my_data:load"}, "my_data:load"),
        ({"dataset": "own", "own.path": ""}, "the nodes' own data"),
    ],
)
def test_what_the_data_of_a_run_are_called(config: dict[str, str], name: str) -> None:
    assert data_name(config) == name


def test_forty_patients_with_a_number_to_predict(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = ["patient,x,y"]
    for patient in range(40):
        for x in rng.normal(size=20):
            # Every other patient reacts the other way round.
            rows.append(f"P{patient:02d},{x:.4f},{(-1) ** patient * 3 * x + patient + 0.1 * rng.normal():.4f}")
    (tmp_path / "p.csv").write_text("\n".join(rows))
    summary, _ = run(
        "--data",
        str(tmp_path / "p.csv"),
        "--task",
        "patient",
        "--target",
        "y",
        "--rounds",
        "20",
        "--output",
        str(tmp_path / "run"),
    )
    mse = summary["test"]["mse"]["mean"]
    # By their hashes; the shares of 40 are 26, 6 and 8.
    assert summary["tasks"] == {"train": 30, "validation": 4, "test": 6}
    # The target is standardised: 1 is what a constant reaches.
    assert mse[summary["chosen"]["adapt_steps"]] < 0.3 < mse[0]


def federation(first: str, second: str, **more: Any) -> tuple[InlineGrid, RunConfig]:
    """Two nodes with these files, which name their columns in their own way."""
    config = parse_run_config({"dataset": "own", "min-nodes": 2, "node-deadline": 1.0, "test-tasks": 1, **more})
    nodes = {
        0: {"data-path": first, "task-column": "hospital", "target-column": "outcome"},
        1: {"data-path": second, "task-column": "ward", "target-column": "outcome"},
    }
    return InlineGrid(2, config.flat(), nodes), config


def two_files(tmp_path: Path) -> tuple[str, str]:
    rng = np.random.default_rng(0)
    (tmp_path / "a.csv").write_text(hospital("A", 1, rng))
    (tmp_path / "b.csv").write_text(hospital("B", -1, rng, task="ward"))
    return str(tmp_path / "a.csv"), str(tmp_path / "b.csv")


def test_nodes_have_files_and_columns_of_their_own(tmp_path: Path) -> None:
    more: dict[str, Any] = {"rounds": 2, "validation-tasks": 0, "output-dir": str(tmp_path / "run"), "mlp.hidden": "8"}
    grid, config = federation(*two_files(tmp_path), **more)
    assert call_roll(grid, config).homes == {"A": 100, "B": 101}
    assert run_federation(grid, config)["tasks"] == {"train": 1, "validation": 0, "test": 1}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [("ill", "dead", '"classes": ["dead", "well"]'), ("marker", "crp", '["crp", "number"]')],
    ids=["classes", "columns"],
)
def test_a_node_with_other_columns_or_classes_is_refused_in_one_sentence(
    tmp_path: Path, old: str, new: str, words: str
) -> None:
    first, second = two_files(tmp_path)
    Path(second).write_text(Path(second).read_text().replace(old, new))
    grid, config = federation(first, second)
    with pytest.raises(ConfigError) as caught:
        call_roll(grid, config)
    assert words in str(caught.value)
    assert "1 x its columns or classes are " in str(caught.value)
    assert "set `own.classes` and `own.features`, or rename columns" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_node_keys_of_own_data_are_refused_for_other_data_sets() -> None:
    config = parse_run_config({"min-nodes": 1, "node-deadline": 1.0})
    with pytest.raises(ConfigError, match='`time-column` and `encoder` need `dataset = "own"`'):
        call_roll(InlineGrid(1, config.flat(), {0: {"data-path": "/x.csv"}}), config)


def test_a_node_names_the_column_of_time_of_its_own_file(tmp_path: Path) -> None:
    """Both files hold the same series, which one calls `day` and the other `tag`; neither calls it an input."""
    rng = np.random.default_rng(0)
    lines = [f"{i % 4},{i // 4},{rng.normal():.3f},{rng.normal():.3f}" for i in range(80)]
    nodes = {}
    for number, name in enumerate(("day", "tag")):
        path = tmp_path / f"{name}.csv"
        path.write_text("\n".join([f"task,{name},x,y", *(f"{number}{line}" for line in lines)]))
        nodes[number] = {"data-path": str(path), "time-column": name}
    flat = {"dataset": "own", "own.features": "x", "own.target-column": "y", "min-nodes": 2, "node-deadline": 1.0}
    config = parse_run_config(flat)
    assert len(call_roll(InlineGrid(2, config.flat(), nodes), config).homes) == 8
    del nodes[1]["time-column"]
    timed = parse_run_config({**flat, "own.time-column": "day"})
    with pytest.raises(ConfigError, match="no column `day`"):
        call_roll(InlineGrid(2, timed.flat(), nodes), timed)


def alone(path: Path, seed: int = 1) -> str:
    """A file of one ward whose rows do not say so."""
    lines = hospital("B", -1, np.random.default_rng(seed)).split("\n")
    path.write_text("\n".join(line.partition(",")[2] for line in lines))
    return str(path)


def joined(files: list[dict[str, str]], **more: Any) -> list[str]:
    """The tasks of a roll call of nodes with these settings."""
    config = parse_run_config({"dataset": "own", "own.task-column": "hospital", "validation-tasks": 0, "test-tasks": 1, **more})
    nodes = {number: {"target-column": "outcome", **settings} for number, settings in enumerate(files)}
    settings = {**config.flat(), "min-nodes": len(files), "node-deadline": 1.0}
    return sorted(call_roll(InlineGrid(len(files), settings, nodes), parse_run_config(settings)).homes)


def test_a_nodes_file_without_the_task_column_is_one_task_with_the_files_name(tmp_path: Path) -> None:
    first, _ = two_files(tmp_path)
    second = alone(tmp_path / "ward-7.csv")
    assert joined([{"data-path": first}, {"data-path": second}]) == ["A", "ward-7"]
    assert joined([{"data-path": first}, {"data-path": second, "task-name": "north"}]) == ["A", "north"]
    # Where there is the column, it says whose row it is.
    assert joined([{"data-path": first, "task-name": "x"}, {"data-path": second}]) == ["A", "ward-7"]


def test_a_task_column_that_a_node_names_must_be_there(tmp_path: Path) -> None:
    first, _ = two_files(tmp_path)
    second = alone(tmp_path / "ward-7.csv")
    with pytest.raises(ConfigError, match=r"have no column `ward`: they have age, marker, outcome"):
        joined([{"data-path": first}, {"data-path": second, "task-column": "ward"}])
    with pytest.raises(ConfigError, match="have no column `ward`"):  # also where the run has a name for all rows
        joined([{"data-path": first}, {"data-path": second, "task-column": "ward"}], **{"own.task-name": "north"})


def test_a_task_column_that_is_spelled_otherwise_does_not_become_an_input(tmp_path: Path) -> None:
    first, _ = two_files(tmp_path)
    second = tmp_path / "ward-7.csv"
    second.write_text(Path(first).read_text().replace("hospital", "Hospital", 1))
    with pytest.raises(ConfigError, match=r"no column `hospital`, but `Hospital`: rename it"):
        joined([{"data-path": first}, {"data-path": str(second)}])


@pytest.mark.parametrize("kind", ["a word among numbers", "a row that is too long"])
def test_what_an_error_quotes_of_a_file_does_not_leave_its_node(tmp_path: Path, kind: str) -> None:
    first, second = two_files(tmp_path)
    path = Path(second)
    path.write_text(_with_word(path.read_text()) if "word" in kind else path.read_text() + "SECRET-WORD,,,,,,,\n")
    with pytest.raises(ConfigError) as caught:
        joined([{"data-path": first}, {"data-path": second}])
    assert re.search(r"row \d+ (of '.*' )?\(without the header\)", str(caught.value))
    assert "SECRET-WORD" not in str(caught.value)
    if "word" in kind:  # the device itself is told
        with pytest.raises(DataError, match="holds the text 'SECRET-WORD'"):
            list(describe(second, "ward", "outcome"))


def _with_word(text: str) -> str:
    """The table with a word in place of one number of its column `age`."""
    header, row, rest = text.split("\n", 2)
    cells = row.split(",")
    cells[header.split(",").index("age")] = "SECRET-WORD"
    return "\n".join([header, ",".join(cells), rest])


def test_a_task_is_called_as_its_file_or_its_function() -> None:
    assert task_of_file("/data/ward-7.csv") == "ward-7"
    assert task_of_file("my.pkg:load") == "my.pkg:load"


def test_two_files_of_one_name_are_refused_with_what_mends_it(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    files = [{"data-path": alone(tmp_path / folder / "ward.csv", seed)} for seed, folder in enumerate("ab")]
    with pytest.raises(ConfigError, match=r"two nodes host the task 'ward': .* `quickbloom-edge join --task-name`"):
        joined(files)
    files[1]["task-name"] = "other"
    assert joined(files) == ["other", "ward"]


def test_a_run_with_one_file_must_say_whose_row_is_whose(tmp_path: Path) -> None:
    arguments = ["run", *SMALL, "--data", alone(tmp_path / "ward.csv"), "--target", "outcome"]
    result = CliRunner().invoke(main.cli, arguments)
    assert "(a patient, a hospital) is not known: use `--task`, one of age, marker" in str(result.exception)
    result = CliRunner().invoke(main.cli, [*arguments, "--task", "Markr"])
    assert "have no column `Markr`: did you mean `marker`?" in str(result.exception)


def test_a_column_that_tells_no_tasks_apart_is_asked_about(tmp_path: Path) -> None:
    """Every number is then a task of a row or two: one sentence for all of them, and the question whether that was meant."""
    data = ["--data", str(hospitals(tmp_path / "h.csv")), "--task", "marker", "--target", "outcome"]
    said = str(CliRunner().invoke(main.cli, ["run", *SMALL, *data]).exception)
    assert re.search(r"can be used: \d+ tasks are left out: .* and \d+ more \(it has \d rows? with a target, too few", said)
    assert said.endswith("is `marker` the column that says whose row it is (`--task`)?")
    assert len(said) < 600


def test_few_test_tasks_are_named_with_what_else_can_be_done(tmp_path: Path) -> None:
    data = ["--data", str(hospitals(tmp_path / "h.csv")), "--task", "hospital", "--target", "outcome"]
    few = ["--rounds", "1", "--set", "own.leave-out=B", "--in-process", "--no-report"]
    done = CliRunner().invoke(main.cli, ["run", *data, *few, "--output", str(tmp_path / "run")])
    assert "Only 1 test task (B): others may fare otherwise. `quickbloom run --leave-one-out` tests every" in done.stderr


def test_classes_that_may_be_slips_are_remarked_on_once(tmp_path: Path) -> None:
    path = hospitals(tmp_path / "h.csv")
    path.write_text(path.read_text().replace(",ill", ",Ill", 1))
    data = ["--data", str(path), "--task", "hospital", "--target", "outcome", "--rounds", "1", "--in-process", "--no-report"]
    done = CliRunner().invoke(main.cli, ["run", *data, "--output", str(tmp_path / "run")])
    alike, rare, untested = (line for line in done.stderr.splitlines() if line.startswith("Remark: "))
    assert "'Ill' and 'ill': if they are one class" in alike
    assert "'Ill' (1): mend" in rare
    assert "too few rows for a test row: 'Ill' in 1 of 4 tasks" in untested


def wards(tmp_path: Path, sexes: dict[str, str]) -> dict[int, dict[str, str]]:
    """A file for each node, with the categories of its own: {"A": "MF"} has M and F in turn. The outcome hangs on F."""
    settings = {}
    for number, (name, values) in enumerate(sexes.items()):
        rows = [
            f"{name},{i % 7}.5,{values[i % len(values)]},{'ill' if values[i % len(values)] == 'F' else 'well'}"
            for i in range(60)
        ]
        (tmp_path / f"{name}.csv").write_text("\n".join(["hospital,x,sex,outcome", *rows]))
        settings[number] = {"data-path": str(tmp_path / f"{name}.csv"), "task-column": "hospital", "target-column": "outcome"}
    return settings


def test_nodes_agree_on_the_categories_of_all_their_files(tmp_path: Path) -> None:
    """Each node has one that the others lack; all have the same inputs, which a later file meets as well."""
    nodes = wards(tmp_path, {"A": "MF", "B": "FX", "C": "FM", "D": "FO"})
    flat: dict[str, Any] = {"dataset": "own", "min-nodes": 4, "rounds": 30, "validation-tasks": 0, "test-tasks": 1}
    config = parse_run_config({**flat, "node-deadline": 5.0, "output-dir": str(tmp_path / "run"), "mlp.hidden": "8"})
    grid = InlineGrid(4, config.flat(), nodes)
    population = call_roll(grid, config)
    agreed = Schema.from_json(population.agreed)
    assert agreed.vocabularies == {"sex": sorted(key("sex", value) for value in "MFXO")}
    assert population.spec.input_shape == (1 + 4 + 2,)
    assert len(population.homes) == 4
    assert run_federation(grid, config)["test"]["accuracy"]["mean"][-1] > 0.8
    rows = [f"Z,1.5,{'FNX'[i % 3]},{'ill' if i % 3 == 0 else 'well'}" for i in range(30)]  # N is nobody's
    (tmp_path / "Z.csv").write_text("\n".join(["hospital,x,sex,outcome", *rows]))
    (model,) = adapt(tmp_path / "run", tmp_path / "Z.csv", tmp_path / "mine")
    assert model.card["spec"][1] == [7]
    # The same schema is told to nodes that a resumed run calls, though they would find another one by themselves.
    before = str(sorted((tmp_path / "run" / "checkpoints").iterdir())[-2])
    again = parse_run_config({**config.flat(), "resume-from": before, "output-dir": str(tmp_path / "more")})
    assert run_federation(InlineGrid(4, again.flat(), nodes), again)["rounds"] == 30


def test_a_node_keeps_rare_categories_back(tmp_path: Path) -> None:
    nodes = wards(tmp_path, {"A": "MFMFMFMFMX", "B": "FM"})
    flat = {"dataset": "own", "min-nodes": 2, "validation-tasks": 0, "test-tasks": 1, "own.vocabulary-min-count": 10}
    config = parse_run_config(flat)
    population = call_roll(InlineGrid(2, config.flat(), nodes), config)
    assert Schema.from_json(population.spec.schema).vocabularies == {"sex": sorted(key("sex", value) for value in "MF")}


def test_a_column_of_numbers_here_and_of_words_there_is_named_with_what_mends_it(tmp_path: Path) -> None:
    nodes = wards(tmp_path, {"A": "123", "B": "FM", "C": "FM"})
    config = parse_run_config({"dataset": "own", "min-nodes": 3, "node-deadline": 1.0, "validation-tasks": 0, "test-tasks": 1})
    for name in "ABC":
        path = tmp_path / f"{name}.csv"
        path.write_text(path.read_text().replace(",well", ",well", 1) + "\nA,1,,ill" * (name == "A"))
    with pytest.raises(ConfigError, match=r"1 x its columns or classes are .*: set `own.categorical=sex`"):
        call_roll(InlineGrid(3, config.flat(), nodes), config)


@pytest.mark.parametrize("schemas", [("x", "z"), ("[" * 200_000, "z"), ("[" * 6_000_000, "x")], ids=["odd", "deep", "long"])
def test_schemas_that_nobody_can_read_cost_their_nodes_and_end_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schemas: tuple[str, str]
) -> None:
    nodes = wards(tmp_path, {"A": "MF", "B": "MF"})
    honest, given = Own.spec.fget, iter(schemas)  # type: ignore[attr-defined]
    monkeypatch.setattr(Own, "spec", property(lambda self: replace(honest(self), schema=next(given))))
    config = parse_run_config({"dataset": "own", "min-nodes": 2, "node-deadline": 1.0, "validation-tasks": 0, "test-tasks": 1})
    with pytest.raises(ConfigError, match=r"`min-nodes` is 2, but [01] usable nodes? answered") as caught:
        call_roll(InlineGrid(2, config.flat(), nodes), config)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(("colours", "joins"), [("red", True), ("red green", True), ("", False)])
def test_a_file_that_comes_during_a_run_is_read_by_the_columns_of_the_run(tmp_path: Path, colours: str, joins: bool) -> None:
    """By itself it would have one category or two, of which the run does not know one, and so another number of inputs."""
    rng = np.random.default_rng(0)

    def file(name: str, known: list[str], column: str = "colour") -> dict[str, str]:
        rows = [f"{name}{i % 2},{known[i % len(known)]},{rng.normal():.3f},{['no', 'yes'][i // 2 % 2]}" for i in range(60)]
        (tmp_path / f"{name}.csv").write_text("\n".join([f"user,{column},x,outcome", *rows]))
        return {"data-path": str(tmp_path / f"{name}.csv")}

    nodes = {i: file(name, ["red", "blue", "red"]) for i, name in enumerate(("a", "b"))}
    nodes[2] = file("c", colours.split() or ["red"], "colour" if colours else "hue")
    flat = {"dataset": "own", "own.task-column": "user", "own.target-column": "outcome", "rounds": 4, "test-tasks": 1}
    flat |= {"algorithm": "reptile", "model": "linear", "validation-tasks": 0, "output-dir": str(tmp_path / "run")}
    config = parse_run_config(flat).resolved()
    grid = LoopbackGrid(3, config.flat(), node_configs=nodes)
    grid.node_ids = [100, 101]
    population = call_roll(grid, config)
    assert (population.agreed, len(population.homes)) == ("", 4)  # the two found the same by themselves

    def appears(event: Event) -> None:
        if isinstance(event, RoundEnded):
            grid.node_ids = [100, 101, 102]

    events: list[Event] = []
    summary = run_federation(grid, config, Events(appears, events.append))
    assert summary["failures"] == 0
    assert summary["tasks"] == {"train": 5 if joins else 3, "validation": 0, "test": 1}
    trained = [record["nodes"]["trained"] for record in read_history(tmp_path / "run")]
    assert [102 in ids for ids in trained] == [False, False, joins, joins]
    said = [event.sentence for event in events if isinstance(event, Warned | Joined) and "ode 102" in event.sentence]
    assert said[0].startswith("Node 102 joined with 2 tasks" if joins else "Node 102 does not take part: ")
