"""Every example runs as a user would run it, and does what it says."""

import csv
import json
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from documents import PAGES, blocks
from nbclient import NotebookClient

from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.datasets.base import DataSpec
from quickbloom.common.engine.build import try_out_with
from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.batch import Batch, Episode, Minibatches
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params
from quickbloom.common.system.package import FOLDERS
from quickbloom.server_app.launch.flower_run import LocalSuperLink, Run, environment

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
NOTEBOOK, COMMANDS = EXAMPLES / "new_writer.ipynb", EXAMPLES / "new_commands.ipynb"


def python(*arguments: str | Path, cwd: Path, path: Path = ROOT) -> str:
    """What a program in a Python process of its own prints on stdout. `path`: the source tree that it imports from."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, env={**environment(), "PYTHONPATH": str(path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_tables_say_what_their_header_promises_and_are_the_same_every_time(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    for folder in (tmp_path, tmp_path / "again"):
        python(EXAMPLES / "hospitals.py", folder, cwd=tmp_path)
    rows = list(csv.DictReader((tmp_path / "hospitals.csv").read_text().splitlines()))
    assert {row["hospital"] for row in rows} == {f"hospital-{letter}" for letter in "ABCDEFGHIJKLMNOP"}
    assert {row["outcome"] for row in rows} == {"ill", "well"}
    assert sum(row["age"] == "" for row in rows) == 16 * 5
    assert (tmp_path / "new-patients.csv").read_text().startswith("hospital,age,marker,sex\n")
    for name in ("hospitals.csv", "ward.csv", "new-patients.csv"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_own_algorithm_trains_with_its_own_setting(tmp_path: Path) -> None:
    settings = ["--rounds", "20", "--set", "prox.mu=0.1", "--set", "evaluate-every=0", "--no-report", "--json"]
    said = python(EXAMPLES / "own_algorithm.py", "run", "--algorithm", "prox", *settings, cwd=tmp_path)
    summary = json.loads(said)
    accuracy = summary["test"]["accuracy"]["mean"]
    # Chance is 20 %.
    assert accuracy[-1] > 0.5 > accuracy[0]
    assert json.loads((Path(summary["run_dir"]) / "config.json").read_text())["prox.mu"] == 0.1


def test_the_own_data_set_is_learned_by_every_device_with_its_own_setting(tmp_path: Path) -> None:
    shutil.copy(EXAMPLES / "own_dataset.py", tmp_path / "my_dataset.py")
    settings = ["--rounds", "30", "--set", "moons.clients=40", "--set", "evaluate-every=0", "--no-report", "--json"]
    run = ["run", "--dataset", "moons", "--algorithm", "fomaml", "--in-process", *settings]
    summary = json.loads(python(tmp_path / "my_dataset.py", *run, cwd=tmp_path))
    accuracy = summary["test"]["accuracy"]["mean"]
    # Devices are turned anyhow, so a model that was not adapted guesses.
    assert accuracy[-1] > 0.8 > 0.65 > accuracy[0]
    config = json.loads((Path(summary["run_dir"]) / "config.json").read_text())
    assert (config["moons.clients"], config["moons.noise"]) == (40, 0.1)


def without_registration(file: Path, registry: str) -> str:
    """An example without its last lines and without the import of the registry."""
    text = file.read_text().split(f"\n\n{registry}[")[0] + "\n"
    (line,) = (line for line in text.splitlines() if line.endswith(f"import {registry}"))
    return text.replace(f"{line}\n", "")


def shown(page: str, title: str) -> str:
    """The code that a page shows under this title."""
    (block,) = (block for block in blocks(ROOT / "docs" / page) if block.title == title)
    return block.text + "\n"


IN_THE_TREE = {
    "algorithms": ("prox", "--algorithm prox --set prox.mu=0.2"),
    "datasets": ("moons", "--dataset moons --set moons.clients=12"),
    "models": ("small", "--set model=small --set small.units=8"),
}


@pytest.mark.parametrize("room", IN_THE_TREE)
def test_in_the_tree_it_is_one_file_and_one_line(room: str, tmp_path: Path) -> None:
    """As own-algorithm.md, own-dataset.md and own-model.md have it; then the plain command and `make config` know it."""
    name, flags = IN_THE_TREE[room]
    text = {
        "algorithms": lambda: without_registration(EXAMPLES / "own_algorithm.py", "ALGORITHMS"),
        "datasets": lambda: without_registration(EXAMPLES / "own_dataset.py", "DATASETS"),
        "models": lambda: shown("own-model.md", "small.py"),
    }[room]()
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "common" / room / f"{name}.py").write_text(text)
    listed = tmp_path / "common" / room / "__init__.py"
    listed.write_text(listed.read_text().replace("\n)", f'\n    "{name}",\n)', 1))
    run = ["run", "--in-process", *flags.split(), "--rounds", "1", "--no-report", "--json"]
    said = python("-m", "quickbloom.server_app.cli.main", *run, cwd=tmp_path, path=tmp_path)
    assert json.loads(said)["test"]["accuracy"]["mean"]
    python("-m", "quickbloom.common.config.write_toml", cwd=tmp_path, path=tmp_path)
    assert f"[tool.flwr.app.config.{name}]" in (tmp_path / "pyproject.toml").read_text()


@pytest.mark.slow
def test_the_own_algorithm_is_compared_with_another_from_its_own_file(tmp_path: Path) -> None:
    """Every run is a process of its own, which knows the algorithm too; a change of the file is another run."""
    file = tmp_path / "mine.py"
    shutil.copy(EXAMPLES / "own_algorithm.py", file)
    command = ["compare", "--algorithms", "fedavg,prox", "--dataset", "digits", "--seeds", "1", "--rounds", "2"]
    command += ["--inner-lrs", "0.3", "--set", "adapt-steps=2", "--set", "prox.mu=0", "--json"]
    fedavg, prox = json.loads(python(file, *command, cwd=tmp_path))["algorithms"]
    assert (prox["algorithm"], prox["failed"]) == ("prox", 0)
    # Without its extra term it is the other one.
    assert prox["runs"][0]["steps"] == pytest.approx(fedavg["runs"][0]["steps"])
    directory = tmp_path / "runs" / "compare-digits"
    before = set(directory.glob("prox-*"))
    file.write_text(file.read_text() + "\n")
    python(file, *command, cwd=tmp_path)
    assert len(set(directory.glob("prox-*")) - before) == 1
    assert len(list(directory.glob("fedavg-*"))) == 1


@pytest.mark.slow
@pytest.mark.simulation
def test_the_other_app_trains_with_the_strategy_under_flowers_own_runtime(tmp_path: Path) -> None:
    app = shutil.copytree(EXAMPLES / "flower_app", tmp_path / "flower_app")
    with LocalSuperLink(ROOT) as link:
        run = Run(app, link, {"rounds": 3, "seed": 1, "node-deadline": 300.0}, 2)
        try:
            log = list(run.lines())
            status, details = run.status()
        finally:
            run.close()
    assert status == "finished:completed", details + "\n".join(log)
    (said,) = (line for line in log if "new users" in line)
    assert "11 new users: accuracy 0." in said
    assert "[ROUND 3/3]" in "\n".join(log)


def test_the_page_has_the_files_of_the_app_that_trains_by_itself() -> None:
    page = next(page for page in PAGES if page.name == "flower-app.md")
    shown = [block.text.strip() for block in blocks(page) if block.language == "python"]
    files = [(EXAMPLES / "own_trainer" / "pads" / name).read_text() for name in ("client_app.py", "server_app.py")]
    assert [file.split('"""', 2)[2].strip() for file in files] == shown


@pytest.mark.slow
@pytest.mark.simulation
def test_the_app_that_trains_by_itself_is_personalised_under_flowers_own_runtime(tmp_path: Path) -> None:
    app = shutil.copytree(EXAMPLES / "own_trainer", tmp_path / "own_trainer")
    with (app / "pyproject.toml").open("a") as file:  # settings of this project beside the app's own
        file.write(f'node-deadline = 300.0\noutput-dir = "{tmp_path / "run"}"\n')
    with LocalSuperLink(ROOT) as link:
        run = Run(app, link, {"num-server-rounds": 4, "evaluate-every": 4}, 20)
        try:
            log = list(run.lines())
            status, details = run.status()
        finally:
            run.close()
    assert status == "finished:completed", details + "\n".join(log)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["rounds"], summary["failures"], sum(summary["tasks"].values())) == (4, 0, 20)
    scores = summary["test"]["accuracy"]["mean"]
    assert scores[-1] > scores[0]  # a new user's own pad is learned


@pytest.mark.slow
@pytest.mark.parametrize("data", ["digits", "uji"])
def test_the_notebook_runs_and_the_new_writer_gains(data: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue("data_dir") if data == "uji" else tmp_path
    rounds = {"digits": "40", "uji": "2"}[data]
    variables = {"ROUNDS": rounds, "QUICKBLOOM_DATA_DIR": str(folder), "TMPDIR": str(tmp_path)}
    variables["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # as in a notebook, whatever this machine has set
    outputs = executed(NOTEBOOK, variables)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    (said,) = (output["text"] for output in outputs if "right before" in output.get("text", ""))
    before, after = (int(part.split()[0]) for part in said.split("right before: ")[1].split("after: "))
    assert after > before


@pytest.mark.slow
def test_the_notebook_of_commands_runs_and_the_later_user_is_understood(tmp_path: Path) -> None:
    variables = {"ROUNDS": "20", "TMPDIR": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    outputs = executed(COMMANDS, {**variables, "MPLBACKEND": "module://matplotlib_inline.backend_inline"})
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    (said,) = (output["text"] for output in outputs if "new sentences right" in output.get("text", ""))
    right, number = (int(word) for word in said.split() if word.isdigit())
    # Chance is 3 of 15. With MiniLM nearly all are right, with letters alone half of them.
    assert number == 15
    assert right >= 6


def executed(path: Path, variables: dict[str, str]) -> list[Any]:
    """The outputs of a notebook, run in a kernel of its own."""
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(EXAMPLES)}})
    client.execute(env={**environment(), "PYTHONPATH": str(ROOT), **variables})
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


@pytest.mark.parametrize("path", [NOTEBOOK, COMMANDS], ids=lambda path: path.name)
def test_a_notebook_is_kept_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    for cell in notebook.cells:
        assert not cell.get("outputs"), cell.source
        assert cell.get("execution_count") is None, cell.source


class Quadratic(Learner):
    """L(w) = (w - 3)^2 / 2, whatever the examples."""

    def loss(self, params: Params, batch: Batch) -> torch.Tensor:
        return (params["w"] - 3).square().sum() / 2


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The file of the own algorithm as a module; what it registers is forgotten afterwards."""
    monkeypatch.setattr("quickbloom.common.algorithms.ALGORITHMS", dict(ALGORITHMS))
    return loaded(EXAMPLES / "own_algorithm.py")


def loaded(path: Path) -> Any:
    """An example as a module."""
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_curves_agree_only_if_all_their_numbers_do(tmp_path: Path) -> None:
    both = loaded(EXAMPLES / "both_runtimes.py")
    line: dict[str, Any] = {"round": 1, "train": {"loss": 1.5, "tasks": 4}, "validation": {"accuracy": [0.25, 0.5]}}
    moved = {**line, "validation": {"accuracy": [0.25, 0.503]}}
    histories: dict[str, list[Any]] = {
        "one": [line, line],
        "same": [line, line],
        "other": [line, moved],
        "short": [line],
        "less": [line, {"round": 2}],
    }
    for name, lines in histories.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "history.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in lines))
    found = {name: both.difference(tmp_path / "one", tmp_path / name) for name in histories}
    assert found["same"] == (0, 2)
    assert found["other"] == (pytest.approx(0.003), 2)
    assert found["short"] == (float("inf"), 1)
    assert found["less"] == (float("inf"), 2)


@pytest.mark.slow
def test_both_runtimes_of_a_small_run_agree(tmp_path: Path) -> None:
    said = python(EXAMPLES / "both_runtimes.py", "--algorithm", "reptile", "--rounds", "2", cwd=tmp_path)
    assert "The two learning curves agree: over 2 rounds" in said
    folder = next((tmp_path / "runs").iterdir())
    runtimes = [json.loads((folder / name / "summary.json").read_text())["runtime"] for name in ("in-process", "simulation")]
    assert runtimes == ["in-process", "simulation"]


@pytest.mark.parametrize("limit", [1000, 0])
def test_a_mistake_in_an_own_algorithm_is_named_with_its_line(own: Any, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr("sys.tracebacklimit", limit)  # 0 in Flower's process of a ServerApp

    class Mistaken(own.Prox):  # type: ignore[misc]
        def meta_gradient(self, meta: Params, episode: Episode, minibatches: Minibatches) -> Any:
            return self.options.no_such_setting

    learner = Learner(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2, 3)), "classification", 3)
    with pytest.raises(ConfigError, match=r"`algorithm = \"prox\"` must .*no_such_setting.* \(test_examples.py, line \d+\)"):
        try_out_with(Mistaken(own.ProxOptions(inner_lr=0.5), learner), "mlp", DataSpec("classification", (2,), 3))


def test_an_own_algorithm_is_refused_where_other_processes_would_not_know_it(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "own_algorithm.py"), "run", "--runtime", "simulation", "--algorithm", "prox"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**environment(), "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "is known to this process alone: choose `--runtime in-process`" in " ".join(done.stderr.split())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("mu", "end"), [(2.0, 1.625), (0.0, 2.5)])
def test_the_own_algorithm_lands_where_a_hand_says(own: Any, mu: float, end: float) -> None:
    """From 1 at rate 1/2: phi <- (phi - (phi - 3) / 2 + mu / 2) / (1 + mu / 2), so 1.5, 1.625 and without mu 2, 2.5."""
    learner = Quadratic(torch.nn.Linear(1, 1), "regression")
    batch = Batch.of(torch.zeros(1, 1), torch.zeros(1, 1))
    minibatches = Minibatches(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))
    algorithm = own.Prox(own.ProxOptions(inner_lr=0.5, mu=mu, inner_steps=2), learner)
    gradient, loss = algorithm.meta_gradient({"w": torch.tensor([1.0])}, Episode(batch, batch), minibatches)
    torch.testing.assert_close(gradient, {"w": torch.tensor([1 - end])})
    torch.testing.assert_close(loss, torch.tensor((end - 3) ** 2 / 2))
    assert algorithm.weight(7) == 7
