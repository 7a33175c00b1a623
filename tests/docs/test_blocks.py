"""Every command and every block of code in README and docs is run here, or looked at with the reason why it is not run.

A page is read from top to bottom in a directory with the files that its reader has. Long runs are shortened by `SHORTER`. What
needs containers, another machine, root or hours is in `LOOKED_AT`: such a command is parsed by the program that it starts, with
all its options and settings. A block or command that no rule knows fails the test.
"""

import csv
import hashlib
import importlib
import io
import json
import re
import shlex
import shutil
import sys
import tomllib
import warnings
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import pytest
import small_encoders
import typer
import yaml
from chart import render
from documents import PAGES, ROOT, Block, blocks, prose
from typer.testing import CliRunner

from quickbloom.client_app import cli as edge
from quickbloom.client_app.owner import diary
from quickbloom.client_app.owner.words import Status
from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.algorithms.base import Algorithm
from quickbloom.common.baselines.scoring import BASELINES
from quickbloom.common.config.run import parse_node_config, parse_run_config
from quickbloom.common.datasets import DATASETS
from quickbloom.common.metric import RMSE
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.cli import main as server
from quickbloom.server_app.events.kinds import RoundEnded, Scored
from quickbloom.server_app.launch.settings import parse_assignments
from quickbloom.server_app.messaging.in_process_grid import InlineGrid
from quickbloom.server_app.reporting.against_baselines import in_words
from quickbloom.server_app.reporting.progress import round_line

HOSPITALS = ROOT / "examples" / "hospitals.py"
hospitals = ModuleType("hospitals")
exec(compile(HOSPITALS.read_text(), HOSPITALS, "exec"), hospitals.__dict__)

commands_of_users = ModuleType("commands")
exec(compile((ROOT / "examples" / "commands.py").read_text(), "commands.py", "exec"), commands_of_users.__dict__)

SHORTER = [
    # On what a reader types, in this order.
    (r"^quickbloom compare --algorithms \S+", "quickbloom compare --algorithms fedavg,reptile"),
    (r"^(quickbloom compare .*)$", r"\1 --seeds 1 --rounds 1 --inner-lrs 0.1"),  # of an option the last value counts
    (r" --runtime simulation", ""),
    (r"^(quickbloom run (?!.*--data).*)$", r"\1 --rounds 2 --no-report"),
    (r"--nodes 2", "--nodes 1"),
    (r"--nodes 56", "--nodes 12"),
    (r"clients=2000 --set tasks-per-round=100", "clients=200 --set tasks-per-round=10"),
]
"""What makes a command of a page one that a test can wait for; nothing else is changed but names in capitals."""

NAMES = [(r" \[--host NAME \.\.\.\]", ""), (r"\bSEED\b", "0"), (r"\bID\b", "1")]
"""What stands on a page for a name of the reader's own."""

LOOKED_AT = [
    (r"quickbloom run .*(--connection |--set mlflow=)", "needs a server: tests/integration/test_grpc.py"),
    (r"quickbloom run .*--resume ", "needs a run that was cut off: tests/integration/test_resume.py"),
    (r"quickbloom run .*--leave-one-out", "a run for each task: tests/server_app/comparing/test_leave_one_out.py"),
    (r"quickbloom run .*--dataset intents", "needs a data file and weights: tests/server_app/test_partly_trained.py"),
    (
        r"(quickbloom (run|compare)|quickbloom-edge check-data) .*fashion-mnist",
        "minutes, and Debian's files: tests/common/datasets/test_fashion_mnist.py",
    ),
    (r"quickbloom advise ", "a minute: tests/server_app/advising/test_carry_out.py"),
    (r"quickbloom compare .*--algorithms fedavg,reptile,maml,protonet --dataset digits", "minutes; the README's is run"),
    (r"quickbloom compare .*--(variant|grid) ", "runs that are many: tests/server_app/comparing/test_variants.py"),
    (r"quickbloom compare .*--output shared", "several machines: tests/server_app/comparing/test_spread_out.py"),
    (r"sbatch ", "a Slurm cluster"),
    (r"quickbloom run .*--set wandb=", "needs wandb: tests/server_app/runs/test_trackers.py"),
    (r"quickbloom compare --data hospitals.csv .*--algorithms fedavg,maml$", "a minute; that of the tutorial is run"),
    (r"quickbloom secrets .*--register ", "needs a SuperLink: tests/integration/test_secrets.py"),
    (r"quickbloom deploy (?!init)", "containers: tests/server_app/deployment/test_compose.py"),
    (r"quickbloom-edge join ", "runs until it is stopped: tests/integration/test_edge.py"),
    (r"quickbloom-edge status ", "needs a device that has joined: tests/client_app/owner/test_status_words.py"),
    (r"quickbloom-edge score ", "needs episodes: tests/client_app/test_score.py"),
    (r"quickbloom-edge export ", "needs onnx: tests/client_app/test_export.py"),
    (r"flwr ", "Flower's runtime: tests/integration/test_simulation.py"),
    (r"quickbloom metrics ", "runs until it is stopped: tests/server_app/deployment/test_metrics.py"),
    (r"flower-(superlink|supernode) ", "runs until it is stopped: tests/integration/test_grpc.py"),
    (r"python -m benchmarks\.", "minutes to hours: benchmarks/results/"),
    (r"python -m pytest ", "the tests themselves"),
    (r"make ", "installs; `make test` is what runs this"),
    (r"docker ", "containers: tests/docker"),
    (r"(helm|kubectl) ", "a cluster: tests/kubernetes"),
    (r"(\S+/)?pip install ", "the package index"),
    (r"python -m venv ", "the package index, for other libraries"),
    (
        r"(source|export|cd|git|tar|sudo|ssh|systemctl|openssl|journalctl|tensorboard|ss|stat|umask) ?",
        "the shell's, or the system's own",
    ),
]
"""Commands that are not run, by how they begin, each with the reason and where it is run if anywhere."""


class _ParsedError(Exception):
    """A program has understood its options; no further."""


@dataclass
class Reader:
    """Somebody who does what a page says, in `folder`."""

    folder: Path

    def fill(self, command: str) -> str:
        """A command with this reader's own names in place of the page's."""
        for pattern, found in (
            (r"runs/digits-maml-seed0-\.\.\.", "runs/digits-maml-*"),
            (r"RUN_DIR", "runs/*"),
        ):
            if re.search(pattern, command):
                newest = max(self.folder.glob(found), key=lambda path: path.stat().st_mtime)
                command = re.sub(pattern, str(newest.relative_to(self.folder)), command)
        return command

    def run(self, command: str) -> str:
        """Run one command in this process; returns what it prints on stdout."""
        for pattern, shorter in SHORTER:
            command = re.sub(pattern, shorter, command)
        words = shlex.split(self.fill(command))
        if words[0] == "python":
            return self._python(Path(words[1]), words[2:])
        program = {"quickbloom": server.cli, "quickbloom-edge": edge.cli}[words[0]]
        done = CliRunner().invoke(program, words[1:])
        assert done.exit_code == 0, f"{command}: {done.output} {done.exception!r}"
        return done.stdout

    def _python(self, script: Path, arguments: list[str]) -> str:
        """The examples that pages name; test_examples.py runs them in processes of their own."""
        assert (ROOT / script).is_file(), script
        if script.name == "commands.py":
            commands_of_users.write_all(self.folder)
        elif script.name == "hospitals.py":
            hospitals.write_all(self.folder)
        else:
            assert script.name in ("own_algorithm.py", "own_dataset.py"), script
        return ""


def commands(block: Block) -> Iterator[str]:
    """The commands of a block, each in one line, without comments; names in capitals are filled in."""
    for line in block.text.replace("\\\n", " ").splitlines():
        for command in re.split(r" && |; ", re.sub(r"\s+# .*$|^# .*$", "", line)):
            for pattern, name in NAMES:
                command = re.sub(pattern, name, command)
            if command.strip():
                yield re.sub(r"\s+", " ", command).strip()


def reason_not_to_run(command: str) -> str:
    """Why a command is only looked at; "": it is run."""
    plain = re.sub(r"^([A-Z_]+=\S+ )+", "", command)
    return next((reason for pattern, reason in LOOKED_AT if re.match(pattern, plain)), "")


def parse(program: typer.Typer, words: list[str]) -> dict[str, Any]:
    """The options of a command line as its program understands them; fails on an unknown one."""
    command: Any = typer.main.get_command(program)
    while hasattr(command, "commands"):
        name, words = words[0], words[1:]
        assert name in command.commands, f"there is no command `{name}`"
        command = command.commands[name]
    parameters: dict[str, Any] = command.make_context("command", list(words)).params
    return parameters


def look_at(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be known of a command without running it: its program understands it, its files and settings are there."""
    command = re.sub(r"^([A-Z_]+=\S+ )+", "", command).split(" | ")[0]
    words = shlex.split(re.split(r" [<>] ", command)[0])
    match words:
        case ["quickbloom" | "quickbloom-edge" as name, *rest]:
            options = parse(server.cli if name == "quickbloom" else edge.cli, rest)
            check_settings(rest, options)
        case ["flwr", *rest]:
            with warnings.catch_warnings(action="ignore"):  # it calls what typer deprecates
                from flwr.cli.app import app as flwr
            options = parse(flwr, rest)
            if options.get("run_config_overrides"):
                text = " ".join(options["run_config_overrides"])
                parse_run_config(tomllib.loads(re.sub(r" (?=[\w.-]+=)", "\n", text)))
        case ["flower-superlink" | "flower-supernode" as name, *rest]:
            understood([name, *rest], entry_points(group="console_scripts", name=name)[name].load(), monkeypatch)
            for text in re.findall(r'--node-config "([^"]*)"', command):
                parse_node_config(tomllib.loads(text.replace(" ", "\n")))
        case ["python", "-m", "pytest", *files]:
            assert all((ROOT / file).exists() for file in files if not file.startswith("-")), command
        case ["python", "-m", module, *rest]:
            understood([module, *rest], importlib.import_module(module).main, monkeypatch)
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
        case ["pip", "install", what]:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            for extra in re.findall(r"\[(.*)\]", shlex.split(command)[2]):
                assert extra in project["optional-dependencies"], what
        case ["docker", "compose", *rest]:
            look_at_compose(rest, monkeypatch)
        case ["helm", "install" | "upgrade", _, chart, *rest]:
            given = [word for flag, word in pairwise(rest) if flag == "-f"]
            assert (ROOT / chart / "Chart.yaml").exists(), command
            assert given, command
            assert all((ROOT / file).exists() for file in given if "/" in file), command
        case ["docker", "run", *rest]:
            inner = rest[next(i for i, word in enumerate(rest) if word.startswith("quickbloom:")) + 1 :]
            if inner[0].startswith("quickbloom"):
                look_at(shlex.join(inner), monkeypatch)
        case ["export", *assignments]:
            for variable, _, value in (assignment.partition("=") for assignment in assignments):
                if variable == "COMPOSE_FILE":
                    assert all(yaml.safe_load((ROOT / file).read_text()) for file in value.split(":")), command


def look_at_compose(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    action, rest = words[0], [word for word in words[1:] if not word.startswith("-")]
    assert action in {"up", "down", "run", "stop", "start", "restart", "build"}, action
    if action == "run":
        assert rest[0] in services, words
        if len(rest) > 1:
            inner = words[words.index(rest[0]) + 1 :]
            if inner[0] in ("quickbloom", "quickbloom-edge", "flwr"):
                look_at(shlex.join(inner), monkeypatch)
    else:
        assert set(rest) <= set(services), words


def understood(words: list[str], main: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a program read its options with argparse, and stop there."""
    original = ArgumentParser.parse_args

    def parse_args(self: ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        original(self, *args, **kwargs)
        raise _ParsedError

    with monkeypatch.context() as patched:
        patched.setattr(sys, "argv", words)
        patched.setattr(ArgumentParser, "parse_args", parse_args)
        with pytest.raises(_ParsedError):
            main()


def check_settings(words: list[str], options: dict[str, Any]) -> None:
    """Every `--set` names a setting and gives it a value that it can have."""
    if words[0] == "join":
        parse_node_config(dict(assignment.split("=", 1) for assignment in options["set_"] or []))
    elif words[0] == "run":
        parse_run_config(parse_assignments(options["set_"] or [], options["algorithm"] or "reptile"))


def wards(path: Path, names: tuple[str, ...]) -> None:
    """A table with the columns that docs/edge.md names."""
    rows = [row for name in names for row in hospitals.patients(name, 40)]
    hospitals.write(path, rows, ("ward", "age", "marker", "sex", "outcome"))


def nothing(reader: Reader) -> None:
    """The reader has a checkout."""


def of_own_data(reader: Reader) -> None:
    hospitals.write_all(reader.folder)


def of_edge(reader: Reader) -> None:
    """A node that took part keeps its personal models in STATE."""
    wards(reader.folder / "ward.csv", tuple(f"w-{i}" for i in range(8)))
    wards(reader.folder / "ward-newer.csv", ("w-1", "w-2"))
    wards(reader.folder / "new-patients.csv", ("w-1",))
    settings = {"dataset": "own", "own.path": str(reader.folder / "ward.csv"), "own.task-column": "ward", "rounds": 2}
    settings |= {"own.target-column": "outcome", "min-nodes": 1, "output-dir": str(reader.folder / "run")}
    config = parse_run_config(settings)
    run_federation(InlineGrid(1, config.flat(), {0: {"state-dir": str(reader.folder / "STATE")}}), config)


def of_report(reader: Reader) -> None:
    """Two runs of the names that the page gives them."""
    for name in ("maml-seed0-20260101-120000", "reptile-seed0-20260101-121500"):
        algorithm, _, _ = name.partition("-")
        reader.run(f"quickbloom run --algorithm {algorithm} --output runs/digits-{name}")


def of_pretrained(reader: Reader) -> None:
    """Sentences, and a small encoder of random weights in place of the one that is named."""
    commands_of_users.write_all(reader.folder)
    small_encoders.transformer(reader.folder / "all-MiniLM-L6-v2")


def of_flower_app(reader: Reader) -> None:
    """The reader's own app."""
    shutil.copytree(ROOT / "examples" / "own_trainer" / "pads", reader.folder / "pads")


PREPARED = {
    "flower-app.md": of_flower_app,
    "pretrained.md": of_pretrained,
    "report.md": of_report,
    "own-data.md": of_own_data,
    "choosing.md": of_own_data,
    "edge.md": of_edge,
}


def is_shell(block: Block) -> bool:
    first = next(commands(block), "")
    known = ("quickbloom", "quickbloom-edge", "python")
    return block.language == "sh" or (not block.language and (first.split()[0] in known or bool(reason_not_to_run(first))))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_does_what_it_says(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.syspath_prepend(tmp_path)
    # What a page registers is forgotten afterwards.
    monkeypatch.setattr("quickbloom.common.algorithms.ALGORITHMS", dict(ALGORITHMS))
    monkeypatch.setattr("quickbloom.common.datasets.DATASETS", dict(DATASETS))
    reader = Reader(tmp_path)
    PREPARED.get(page.name, nothing)(reader)
    for block in blocks(page):
        if is_shell(block):
            do(block, reader, monkeypatch)
        elif block.language == "python" or (not block.language and block.text.startswith("from ")):
            if block.title:
                Path(block.title).write_text(block.text)
            exec(compile(block.text, str(block), "exec"), {"__name__": "page"})
        else:
            other(block)


def do(block: Block, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in commands(block):
        if reason_not_to_run(command):
            look_at(command, monkeypatch)
            continue
        first, _, pipe = command.partition(" | ")
        printed = reader.run(first)
        if pipe:
            value: Any = json.loads(printed)
            program, path = pipe.split()
            assert program == "jq", command
            for name in path.strip(".").split("."):
                value = value[name]
            assert len(value) in {10 * 2**doubled + 1 for doubled in range(5)}, command  # as `adapt-steps` may grow


def other(block: Block) -> None:
    """Blocks that are no program: each of a kind that is known here, and looked at as that kind allows."""
    text = block.text
    match block.language:
        case "math":
            return  # on the site: test_pages.py
        case "toml":
            tomllib.loads(text)
        case "yaml":
            assert render(yaml.safe_load(text))
        case "text" | "":
            for begins, check in TEXTS.items():
                if text.lstrip().startswith(begins):
                    check(text)
                    return
            raise AssertionError(f"{block}: no rule knows this block")
        case _:
            raise AssertionError(f"{block}: no rule knows the language {block.language}")


def superlink_toml(text: str) -> None:
    ((name, connection),) = tomllib.loads(text)["superlink"].items()
    assert re.fullmatch(r"[\w-]+", name)
    assert set(connection) <= {"address", "insecure", "root-certificates"}


def unit_file(text: str) -> None:
    command = re.search(r"ExecStart=(.*?)\nRestart=", text.replace("\\\n", " "), re.DOTALL)
    assert command is not None
    words = shlex.split(command[1])
    assert Path(words[0]).name == "quickbloom-edge"
    parse(edge.cli, words[1:])


def said_by_status(text: str) -> None:
    with TemporaryDirectory() as folder, diary.visiting(folder, "fl.example.org:9092") as visit:
        visit.connected()
        diary.note_message(folder, "query.roll_call", "1", "")
        diary.note_refusal(folder, "columns", "its columns or classes are ..")
        said = " ".join(Status.of(Path(folder)).lines()).replace(folder, "/var/lib/quickbloom/state")
    shown, said = (re.sub(r"20[-\d]{8} \d\d:\d\d UTC", "TIME", " ".join(words.split())) for words in (text, said))
    for part in shown.split(" The server says: its columns or classes are .. "):
        assert part in said


def said_by_a_node(text: str) -> None:
    source = "".join((ROOT / "client_app" / name).read_text() for name in ("round_log.py", "app.py", "personal_models.py"))
    for words in ("training", "on its own test part", "Personal model of", "test example", " of its own"):
        assert words in text
        assert words in source


def files_of_a_node(text: str) -> None:
    from quickbloom.client_app.personal_models import FOLDER, META, path_of

    assert str(path_of(Path("STATE") / FOLDER, "TASK")) in text
    assert META in text


def idea(text: str) -> None:
    for name in ("adaptation_path", "meta_gradient"):
        assert name in text
        assert hasattr(Algorithm, name)


def result_table(text: str) -> None:
    source = "".join(path.read_text() for path in (ROOT / "server_app").rglob("*.py"))
    for words in ("held-out tasks", "before", "after", "worst 10 % after"):
        assert words in text
        assert words.replace(" after", "") in source


def rooms(text: str) -> None:
    """A map of folders: each room that is named is there."""
    for line in text.splitlines():
        folder, _, named = line.strip().partition(" ")
        for room in re.split(r",|<-", named.replace("modules without a room", "")):
            path = ROOT / folder / room.strip()
            assert path.is_dir() or path.with_suffix(".py").is_file(), path


def recording(text: str) -> None:
    """A terminal: what was typed is there, and the last lines are what a run says."""
    assert text.startswith("$ make demo\n")
    source = "".join(path.read_text() for path in (ROOT / "server_app").rglob("*.py"))
    for words in ("query loss", "chosen on validation tasks", "Run directory: ", "Report: "):
        assert words in text
        assert words in source
    told = round_line(RoundEnded(10, 100, 1.5, 8, 0.1), Scored(10, "accuracy", 0.2, 0.7, 0.3, 10, 8))
    assert told is not None
    assert "   validation accuracy 20.0 % -> 70.0 %" in told
    assert re.search(r"   validation accuracy [\d.]+ % -> [\d.]+ %", text)
    result_table(text)


def advice(text: str) -> None:
    """The sentences of the page are those that the numbers of its table give."""
    from quickbloom.server_app.advising.page import lines

    rows = re.findall(r"│ (\S.*?) +│ +(\d*) │ +([\d.]+) │ +([\d.]+) │", text)
    titles = {in_words(name, RMSE): name for name in BASELINES}
    candidates = [{"name": titles.get(name, name), "telling": float(telling)} for name, _, _, telling in rows]
    assert len(candidates) == 11
    (best, rounds, *_), scores = rows[0], {one["name"]: one["telling"] for one in candidates}
    assert scores["own"] - scores[best] == pytest.approx(0.0757, abs=0.001)
    users = [int(number) for number in re.findall(r"(\d+) (?:other )?users", text.partition("┡")[0])]
    said = " ".join(text.partition("┘")[2].split())
    gained = [
        {"mean": float(mean), "half": float(half), "users": users[1]}
        for mean, half in re.findall(r"by (\d\.\d+) ± (\d\.\d+)", said)
    ]
    gains = dict(zip(("own rows", "one model"), gained, strict=True))
    lost = re.findall(r"(\d+) \(([\d.]+) alone, ([\d.]+)\)", said)
    losers = [{"task": task, "own": float(own), "model": float(model)} for task, own, model in lost]
    losers += [losers[-1]] * 5
    model = {"algorithm": best.split(", ")[0], "model": best.split(", ")[1], "rounds": int(rounds)}
    found = {"metric": "rmse", "take": best, "kind": "model", "model": model, "candidates": candidates, "gains": gains}
    found |= {"own_rows": "own", "one_model": "global", "losers": losers, "few_users": False}
    found |= {"shots": [{"shots": 5, "score": 2.0}, {"shots": 10, "score": 1.0}]}
    found |= {"users": {"chose": users[0], "told": users[1]}, "cost": {"rounds": 100, "bytes_per_node": 31200, "seconds": 2.96}}
    for line in lines(found):
        assert line in said, line
    command = said.partition("To do it: ")[2]
    assert parse(server.cli, shlex.split(command)[1:])["algorithm"] == model["algorithm"]


def predictions(text: str) -> None:
    from quickbloom.client_app.offline.predictions import Predictions

    file = io.StringIO()
    Predictions([dict.fromkeys(text.splitlines()[0].split(","))], []).write_csv(file)
    assert next(csv.reader(file.getvalue().splitlines())) == text.splitlines()[0].split(",")


def said_by_adapt(text: str) -> None:
    from quickbloom.client_app.personal_models import in_words
    from quickbloom.common.maths.intervals import wilson
    from quickbloom.common.personal.model import Personal

    score = {"name": "accuracy", "before": 0.7167, "after": 0.8667, "constant": 0.5333, "test": 60, "folds": 5, "kept": "after"}
    score |= {"own": 0.8667, "interval": {"after": wilson(52 / 60, 60)}}
    adapted = {"support": 60, "steps": 1, "tried": 1, "whole": True}
    card = {"task": "ward-7", "run": {"round": 50}, "adapted": adapted, "score": score, "preparation": {}}
    assert " ".join(text.split()) == in_words(Personal({}, card))


def explained(text: str) -> None:
    """The lines are those of `Explanation.lines` for the numbers in them."""
    from quickbloom.client_app.offline.explaining import Explanation, Importance

    first, _, *rows = text.strip().splitlines()
    numbers = [re.findall(r"-?[\d.]+", row) for row in rows]
    columns = [
        Importance(row.split()[0], *(float(one) / 100 for one in found)) for row, found in zip(rows, numbers, strict=True)
    ]
    expected = Explanation("ward-7", "accuracy", 55 / 60, 43 / 60, 60, 10, True, columns)
    assert [line.strip() for line in text.strip().splitlines()] == list(expected.lines())
    assert first.startswith("ward-7: accuracy 91.7 %")


def in_another_test(text: str) -> None:
    """`test_what_is_documented_of_files_is_in_them` compares it."""


def shown_row(text: str) -> None:
    """The example of the page by hand: mean 60, deviation 10; and the order of the two keys."""
    keys = {sex: hashlib.blake2b(f"sex\x1f{sex}".encode(), digest_size=8).hexdigest() for sex in "MF"}
    assert [sex for sex, _ in sorted(keys.items(), key=lambda item: item[1])] == ["M", "F"]
    assert f"age {(80 - 60) / 10:.0f}, sex=M 1, sex=F 0, sex: other 0, sex: missing 0; target ill (class 0)" in text


def said_by_check_data(text: str) -> None:
    from quickbloom.client_app.check_data import describe

    assert text.strip() in list(describe("hospitals.csv", "hospital", "outcome"))


TEXTS: dict[str, Callable[[str], None]] = {
    "6 % of the variance": said_by_check_data,
    "[superlink.": superlink_toml,
    "[Unit]": unit_file,
    "Round 7, training": said_by_a_node,
    "Device of fl.example.org:9092, folder": said_by_status,
    "Personal model of ward-7 (round 50)": said_by_adapt,
    "ward-7: accuracy 91.7 %": explained,
    "STATE/personal/TASK": files_of_a_node,
    "adaptation_path(meta, support)": idea,
    "ridge on digits": result_table,
    "$ make demo": recording,
    "what was tried: rmse": advice,
    "row,hospital,age": predictions,
    "row 3: task A, test": shown_row,
    '{"schema": 1, "algorithm"': in_another_test,
    '{"round": 10': in_another_test,
    '{"kind": "started"': in_another_test,
    "common/      modules": rooms,
    '{"schema": 1, "dataset"': in_another_test,
}
"""Blocks that nobody can run, by how they begin: what they must agree with instead."""


def names(text: str) -> set[str]:
    return set(re.findall(r'"(\w+)":', text))


def test_what_is_documented_of_files_is_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    summary, round_, events, comparison = (
        block.text for block in blocks(ROOT / "docs" / "run-directory.md") if block.text.startswith("{")
    )
    options = [
        "--rounds",
        "2",
        "--set",
        "evaluate-every=1",
        "--set",
        "test-shots=1",
        "--no-report",
        "--output",
        "run",
    ]
    assert CliRunner().invoke(server.cli, ["run", *options]).exit_code == 0
    written = json.loads(Path("run/summary.json").read_text())
    assert names(summary) >= set(written)
    assert names(summary) <= names(json.dumps(written)) | {
        "privacy",
        "epsilon",
        "delta",
        "steps",
        "sampling",
        "noise_multiplier",
        "clip",
        *("steps_per_minute", "steps_per_virtual_hour", "staleness", "dropped"),  # of mode async
        *("contributions", "least", "median", "most", "rarely", "0", "1", "2"),
    }
    line = json.loads(Path("run/history.jsonl").read_text().splitlines()[-1])
    assert names(round_) >= set(line)
    told = [json.loads(event) for event in Path("run/events.jsonl").read_text().splitlines()]
    assert {event["kind"] for event in told} >= {"started", "roll-call", "round", "scores", "end"}
    for event in told:
        assert f'{{"kind": "{event["kind"]}"' in events
        assert names(events) >= set(event), event["kind"]
    source = "".join(path.read_text() for path in (ROOT / "server_app" / "comparing").glob("*.py"))
    assert all(f'"{name}"' in source or f"{name}=" in source or f" {name}:" in source for name in names(comparison))


def test_the_tutorial_keeps_its_promise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No better than a coin before, 85 of 100 after."""
    monkeypatch.chdir(tmp_path)
    hospitals.write_all(tmp_path)
    (command,) = (
        line for block in blocks(ROOT / "docs" / "tutorial.md") for line in commands(block) if "--output runs/hospitals" in line
    )
    Reader(tmp_path).run(command)
    accuracy = json.loads(Path("runs/hospitals/summary.json").read_text())["test"]["accuracy"]["mean"]
    assert accuracy[0] < 0.55
    assert accuracy[-1] > 0.8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_text_are_understood(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those between backticks, where they have options or arguments."""
    text = re.sub(r"\s+", " ", prose(page))
    for command in re.findall(r"`((?:quickbloom|quickbloom-edge|flwr|make|python -m) [^`]*)`", text):
        words = command.replace(" ..", "").split()
        if words[0] in ("quickbloom", "quickbloom-edge"):
            program: Any = typer.main.get_command({"quickbloom": server.cli, "quickbloom-edge": edge.cli}[words[0]])
            assert words[1] in program.commands, f"{page.name}: {command}"
            called = program.commands[words[1]]
            if hasattr(called, "commands") and len(words) > 2:
                assert words[2] in called.commands, f"{page.name}: {command}"
                called = called.commands[words[2]]
            options = {option for part in called.params for option in part.opts}
            assert {word for word in words[2:] if word.startswith("--")} <= options, f"{page.name}: {command}"
        elif words[0] == "make":
            look_at(command, monkeypatch)
        elif words[0] == "python":
            module = words[2].replace("NAME", "digits")
            assert importlib.util.find_spec(module) is not None, f"{page.name}: {command}"


def test_every_reason_not_to_run_is_needed() -> None:
    found = [command for page in PAGES for block in blocks(page) if is_shell(block) for command in commands(block)]
    found += [command for page in PAGES for command in re.findall(r"`([^`\n]+)`", page.read_text())]
    for pattern, reason in LOOKED_AT:
        assert any(re.match(pattern, re.sub(r"^([A-Z_]+=\S+ )+", "", command)) for command in found), (pattern, reason)
        for test in re.findall(r"tests/[\w/.]+|benchmarks/[\w/.]+", reason):
            assert (ROOT / test).exists(), test


def test_an_unknown_option_or_setting_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for command in (
        "quickbloom run --no-such 1",
        "quickbloom-edge join --server a:1 --secrets s --no-such",
        "flwr run . --no-such",
    ):
        with pytest.raises(Exception, match="no-such"):
            look_at(command, monkeypatch)
    with pytest.raises(Exception, match="there is no"):
        look_at("quickbloom run --set maml.inner-rate=1", monkeypatch)
    with pytest.raises(SystemExit):
        look_at("python -m benchmarks.digits --no-such", monkeypatch)
    with pytest.raises(SystemExit):
        look_at("flower-superlink --no-such", monkeypatch)
    with pytest.raises(AssertionError):
        look_at("docker compose run --rm no-such", monkeypatch)
