"""What a file from elsewhere may make this program do: compute, and nothing else."""

import copy
import json
import resource
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loopback import LoopbackGrid
from typer.testing import CliRunner

from quickbloom import adapt, predict
from quickbloom.client_app.cli import cli as edge
from quickbloom.client_app.export import export
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.errors import ConfigError, DataError, QuickbloomError
from quickbloom.common.personal import checkpoint, trust
from quickbloom.common.personal import model as personal_model
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.cli.main import cli as quickbloom
from quickbloom.server_app.runs import resume, trackers

ROWS = "\n".join(f"{task},{row % 7}.5,{'ab'[row % 2]}" for task in "ABCDE" for row in range(20))
MODEL = """
from pathlib import Path
from torch import nn
Path(__file__).with_suffix(".mark").touch()
def small(shape, outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0], outputs))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data.csv, the run directory `run` and the state directory `state` of its one node."""
    folder = tmp_path_factory.mktemp("trained")
    train(folder)
    return folder


def train(folder: Path, **more: Any) -> None:
    (folder / "data.csv").write_text(f"task,x,target\n{ROWS}\n")
    flat = {"dataset": "own", "own.path": str(folder / "data.csv"), "rounds": 2, "min-nodes": 1, "mlp.hidden": "8"}
    flat |= {"adapt-steps": 2, "evaluate-every": 0, "output-dir": str(folder / "run")}
    config = parse_run_config({**flat, **{key.replace("_", "-"): value for key, value in more.items()}})
    nodes = {0: {"state-dir": str(folder / "state")}}
    run_federation(LoopbackGrid(1, config.flat(), node_configs=nodes), config)
    (folder / "run" / "summary.json").unlink()  # as if it had been cut off


def changed(source: Path, target: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a file whose facts are other ones, as anybody can make it: the checksum holds."""
    form = personal_model.PERSONAL if "personal" in source.parts else checkpoint.CHECKPOINT
    found = checkpoint.read(source, form, "file")
    facts = copy.deepcopy(found.facts)
    change(facts)
    checkpoint.write(target, found.tensors, facts, form, wait=False)
    return target


def card(trained: Path, target: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    return changed(trained / "state" / "personal" / "A.safetensors", target, change)


def config(**more: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda facts: facts["config"].update({key.replace("__", ".").replace("_", "-"): v for key, v in more.items()})


def offline(model: Path, data: Path, folder: Path, *more: str) -> list[list[str]]:
    return [
        ["predict", "--model", str(model), "--input", str(data), *more],
        ["export", "--model", str(model), "--output", str(folder / "m.pt2"), "--format", "torch", *more],
    ]


# ---- code


def test_a_card_cannot_have_a_function_called(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr(subprocess, "call", lambda *arguments: called.append(arguments))
    model = card(trained, tmp_path / "m.safetensors", config(model="subprocess:call"))
    meta = changed(trained / "state" / "meta.safetensors", tmp_path / "meta.safetensors", config(model="subprocess:call"))
    commands = offline(model, trained / "data.csv", tmp_path)
    commands += [["adapt", "--checkpoint", str(meta), "--data", str(trained / "data.csv"), "--output", str(tmp_path / "out")]]
    for command in commands:
        for more in ([], ["--trust-model", "subprocess:run"]):
            with pytest.raises(ConfigError, match=r"add --trust-model subprocess:call$"):
                CliRunner().invoke(edge, [*command, *more], catch_exceptions=False)
    assert called == []
    # And with the flag it would be: the test can fail.
    CliRunner().invoke(edge, [*commands[0], "--trust-model", "subprocess:call"])
    assert called


def test_a_module_is_imported_only_if_it_is_named_by_hand(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "leaves_a_mark.py").write_text(MODEL)
    model = card(trained, tmp_path / "m.safetensors", config(model="leaves_a_mark:small"))
    for use in (predict, lambda *arguments: export(arguments[0], tmp_path / "m.pt2", "torch")):
        with pytest.raises(ConfigError, match="--trust-model leaves_a_mark:small"):
            use(model, trained / "data.csv")
    with pytest.raises(ConfigError, match="--trust-model"):
        predict(model, trained / "data.csv", ["leaves_a_mark:large", "leaves_a_mark"])
    assert not (tmp_path / "leaves_a_mark.mark").exists()
    with pytest.raises(DataError):  # it is another model than the one whose numbers these are
        predict(model, trained / "data.csv", ["leaves_a_mark:small"])
    assert (tmp_path / "leaves_a_mark.mark").exists()


def test_models_of_a_run_with_an_own_model_are_used_with_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "nets_of_mine.py").write_text(MODEL)
    train(tmp_path, model="nets_of_mine:small")
    state, data = tmp_path / "state", tmp_path / "data.csv"
    flag = ["--trust-model", "nets_of_mine:small"]
    for command in (
        *offline(state / "personal" / "A.safetensors", data, tmp_path, *flag),
        ["adapt", "--checkpoint", str(state), "--data", str(data), "--output", str(tmp_path / "new"), *flag],
        ["adapt", "--checkpoint", str(tmp_path / "run"), "--data", str(data), "--output", str(tmp_path / "new2"), *flag],
    ):
        done = CliRunner().invoke(edge, command, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        with pytest.raises(ConfigError, match="--trust-model nets_of_mine:small"):
            CliRunner().invoke(edge, command[:-2], catch_exceptions=False)
    for name in "ABCDE":
        of_state = predict(tmp_path / "new" / f"{name}.safetensors", data, [flag[1]])
        assert of_state.rows
        assert of_state.rows == predict(tmp_path / "new2" / f"{name}.safetensors", data, [flag[1]]).rows


# ---- sizes and forms

HUGE: list[Callable[[dict[str, Any]], Any]] = [
    config(mlp__hidden="1000000,1000000"),
    config(mlp__hidden=",".join(["4000"] * 200)),
    config(model="conv4", conv4__filters=1024),
    config(model="resnet", resnet__channels="100000,100000"),
    config(algorithm="protonet", protonet__embedding=1_000_000),
    lambda facts: facts.update(spec=["classification", [10**6, 10**6], 2]),
    lambda facts: facts.update(spec=["classification", [4_000_000], 1_000_000]),
    lambda facts: facts.update(spec=["classification", [10**12], 2]),
    lambda facts: facts["columns"].update({"category-width": 10**9}),
    lambda facts: facts["columns"].update({"image-side": 10**6}),
    lambda facts: facts["preparation"].update(features=["x"] * 500_000),
    lambda facts: facts.update(tokens=True, spec=["classification", [4_000_000], 2]),
]
ODD: list[Callable[[dict[str, Any]], Any]] = [
    lambda facts: facts.clear(),
    lambda facts: facts.update(task=["A"]),
    lambda facts: facts.update(task="A" * 5000),
    lambda facts: facts.update(spec=["classification", [], 2]),
    lambda facts: facts.update(spec=["classification", [True], 2]),
    lambda facts: facts.update(spec=["regression", [2], -1]),
    lambda facts: facts.update(spec=None),
    lambda facts: facts.update(config=[]),
    lambda facts: facts["config"].update(rounds="3; rm"),
    lambda facts: facts["config"].update(model={"a": 1}),
    lambda facts: facts["config"].update({"no-such-thing": 1}),
    lambda facts: facts["adapted"].update(steps=10**9),
    lambda facts: facts["adapted"].update(lr=float("nan")),
    lambda facts: facts["score"].update(name="<script>"),
    lambda facts: facts["score"].update(before=float("inf")),
    lambda facts: facts["preparation"].update(brightest=float("nan")),
    lambda facts: facts.update(data="../../x"),
    lambda facts: facts.update(columns={"path": 3}),
    lambda facts: facts.update(preparation=json.loads("[" * 50 + "]" * 50)),
]


@pytest.mark.parametrize("change", [*HUGE, *ODD])
def test_a_card_that_cannot_be_meant_is_refused_in_one_line_and_takes_no_memory(
    trained: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    model = card(trained, tmp_path / "m.safetensors", change)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(QuickbloomError) as caught:
        predict(model, trained / "data.csv")
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
    assert not (tmp_path / "m.json").exists()


@pytest.mark.parametrize("change", HUGE[:3])
def test_so_is_a_checkpoint(trained: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    meta = changed(trained / "state" / "meta.safetensors", tmp_path / "meta.safetensors", change)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(QuickbloomError):
        adapt(meta, trained / "data.csv", tmp_path / "out")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), lambda inner: st.lists(inner, max_size=3)
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(choice=st.randoms(use_true_random=False), value=ANYTHING)
def test_whatever_a_fact_is_nothing_but_a_sentence_comes(trained: Path, tmp_path: Path, choice: Any, value: Any) -> None:
    def change(facts: dict[str, Any]) -> None:
        place: Any = facts
        while True:
            key = choice.choice(sorted(place))
            if isinstance(place[key], dict) and place[key] and choice.random() < 0.8:
                place = place[key]
                continue
            place[key] = value
            return

    model = card(trained, tmp_path / "m.safetensors", change)
    with suppress(QuickbloomError):
        predict(model, trained / "data.csv")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(choice=st.randoms(use_true_random=False), value=ANYTHING)
def test_so_it_is_with_those_of_a_checkpoint(trained: Path, tmp_path: Path, choice: Any, value: Any) -> None:
    def change(facts: dict[str, Any]) -> None:
        place = choice.choice([facts, facts["config"], facts["adapt"]])
        place[choice.choice(sorted(place))] = value

    def change_schema(facts: dict[str, Any]) -> None:
        schema = json.loads(facts["schema"])
        schema[choice.choice(sorted(schema))] = value
        facts["schema"] = json.dumps(schema)

    meta = changed(
        trained / "state" / "meta.safetensors", tmp_path / "meta.safetensors", choice.choice([change, change_schema])
    )
    with suppress(QuickbloomError):
        adapt(meta, trained / "data.csv", tmp_path / "out")


# ---- places

FOREIGN = {
    "model": ("subprocess:call", "--trust-model subprocess:call"),
    "own.path": ("os:getcwd", "--data os:getcwd"),
    "data-dir": ("/somewhere/else", "--set data-dir=/somewhere/else"),
    "mlflow": ("http://203.0.113.9:5000", "--set mlflow=http://203.0.113.9:5000"),
    "devices": ("/somewhere/devices.csv", "--set devices=/somewhere/devices.csv"),
}


def foreign(trained: Path, target: Path, key: str) -> Path:
    """A checkpoint that goes on, of a run that names this."""

    def change(facts: dict[str, Any]) -> None:
        facts["config"].update({"own.path": "", "rounds": 9, key: FOREIGN[key][0]})
        if key == "data-dir":
            facts["config"].update(dataset="omniglot")

    return changed(sorted((trained / "run" / "checkpoints").iterdir())[-1], target, change)


@pytest.mark.parametrize("key", FOREIGN)
def test_a_run_does_not_go_on_with_code_and_places_that_only_its_checkpoint_names(
    trained: Path, tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "call", lambda *arguments: pytest.fail("it was called"))
    monkeypatch.setattr(trackers, "MLflow", lambda *arguments: pytest.fail("it was told"))
    monkeypatch.chdir(tmp_path)
    file = foreign(trained, tmp_path / "round-000001.safetensors", key)
    value, flag = FOREIGN[key]
    with pytest.raises(ConfigError) as caught:
        CliRunner().invoke(quickbloom, ["run", "--resume", str(file), "--in-process"], catch_exceptions=False)
    assert str(caught.value).endswith(f"add {flag}")
    found = resume.load_checked(file)
    with pytest.raises(ConfigError):  # where the server reads it
        resume.with_settings_of(found, {"resume-from": str(file)})
    with pytest.raises(ConfigError):  # what is given is not what it names
        resume.with_settings_of(found, {"resume-from": str(file), "device": value})
    taken = resume.with_settings_of(found, {"resume-from": str(file), key: value})
    assert taken[key] == value


def test_all_that_is_to_be_typed_is_said_at_once_and_fit_for_a_shell() -> None:
    names = {"model": "nets:small", "dataset": "own", "own.path": "/my data/a.csv", "mlflow": "http://x"}
    assert trust.flags(names) == "--trust-model nets:small --data '/my data/a.csv' --set mlflow=http://x"
    assert trust.flags(names, {"model", "mlflow", "own.path"}) == ""
    assert trust.flags({**names, "model": "mlp", "dataset": "digits", "mlflow": ""}) == ""


def test_models_of_a_run_with_a_root_set_are_used_without_its_file(tmp_path: Path) -> None:
    root = tmp_path / "root.csv"
    rows = [f"volunteer{row.removeprefix('A')}" for row in ROWS.splitlines() if row.startswith("A")]
    root.write_text("\n".join(["task,x,target", *rows]) + "\n")
    train(tmp_path, algorithm="fedavg", aggregate="fltrust", root_path=str(root))
    root.unlink()  # it is the server's
    data = tmp_path / "data.csv"
    for command in (
        *offline(tmp_path / "state" / "personal" / "A.safetensors", data, tmp_path),
        ["adapt", "--checkpoint", str(tmp_path / "run"), "--data", str(data), "--output", str(tmp_path / "new")],
        ["adapt", "--checkpoint", str(tmp_path / "state"), "--data", str(data), "--output", str(tmp_path / "new2")],
    ):
        done = CliRunner().invoke(edge, command, catch_exceptions=False)
        assert done.exit_code == 0, done.output


def test_where_a_run_was_written_is_not_where_another_goes_on(trained: Path, tmp_path: Path) -> None:
    source = sorted((trained / "run" / "checkpoints").iterdir())[-1]
    elsewhere = tmp_path / "elsewhere"
    file = changed(source, tmp_path / "r.safetensors", lambda facts: facts["config"].update({"output-dir": str(elsewhere)}))
    taken = resume.with_settings_of(
        resume.load_checked(file), {"resume-from": str(file), "own.path": str(trained / "data.csv")}
    )
    assert taken["output-dir"] == ""
    assert not elsewhere.exists()


def test_ones_own_run_goes_on_with_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(tmp_path)
    last = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    last.unlink()  # as if it had been cut off after round 1
    with pytest.raises(ConfigError, match="add --data "):
        CliRunner().invoke(quickbloom, ["run", "--resume", str(tmp_path / "run"), "--in-process"], catch_exceptions=False)
    command = ["run", "--resume", str(tmp_path / "run"), "--in-process", "--data", "data.csv", "--no-report"]
    done = CliRunner().invoke(quickbloom, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["resumed"] == 1


@pytest.mark.parametrize(
    "change",
    [
        {"nodes": 10**9},
        {"round": -1},
        {"splits": {"train": [1]}},
        {"so-far": {}},
        {"so-far": {"bytes": {}, "failures": 0, "late": 0, "best": None, "seconds": {}, "resumed": 0, "clip": 0}},
        {"config": {"mlp.hidden": "1," * 1000 + "1"}},
        {"in-process": "yes"},
        {"lineage": 7},
        {"validation": {"tasks": "A", "lrs": []}},
    ],
)
def test_a_checkpoint_whose_facts_cannot_be_meant_is_refused(trained: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    source = sorted((trained / "run" / "checkpoints").iterdir())[-1]
    file = changed(source, tmp_path / "r.safetensors", lambda facts: facts.update(change))
    with pytest.raises(DataError, match=r"cannot be used|lacks"):
        resume.load_checked(file)


SETTINGS_WITH_PLACES = ("encoder", "tokenizer", "directory", "path", "weights", "mlflow", "model")
"""Last parts of the names of settings that name a file, a folder, a server or code."""


def test_every_setting_that_names_code_or_a_place_is_guarded_or_never_taken() -> None:
    guarded = {one.key for one in trust.GUARDED} | set(trust.NEVER)
    flat = parse_run_config({}).flat()
    found = {key for key in flat if key.rpartition(".")[2] in SETTINGS_WITH_PLACES or key.endswith(("-dir", "-from"))}
    assert {"own.encoder", "intents.encoder", "own.tokenizer", "transformer.directory", "weights", "own.path"} <= found
    assert found - guarded == set()


@pytest.mark.parametrize(
    "settings_of_a_file",
    [
        {"dataset": "intents", "intents.encoder": "evil:E"},
        {"dataset": "own", "own.path": "a.csv", "own.encoder": "evil:E"},
        {"dataset": "own", "own.path": "a.csv", "own.tokenizer": "/place", "model": "auto"},
    ],
)
def test_encoders_and_tokenizers_of_a_checkpoint_have_to_be_typed(settings_of_a_file: dict[str, str]) -> None:
    key = next(key for key in settings_of_a_file if key.endswith(("encoder", "tokenizer")))
    with pytest.raises(ConfigError, match="never taken from a file"):
        trust.of_a_run(settings_of_a_file, ("own.path",))
    assert trust.of_a_run(settings_of_a_file, ("own.path", key))
