"""A run that was cut off goes on and ends like one that was not; one that does not fit is refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.run import Run
from loopback import LoopbackGrid

from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.errors import ConfigError, DataError
from quickbloom.common.personal import checkpoint as checkpoint_file
from quickbloom.common.wire.messages import EVALUATE, TRAIN
from quickbloom.common.wire.secure.messages import MASKED
from quickbloom.server_app import app as server
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.events.channel import Events
from quickbloom.server_app.events.file import read_events
from quickbloom.server_app.events.kinds import Ended, Event, RoundEnded, Saved, Scored, Started, Stopped, Warned
from quickbloom.server_app.runs import trackers
from quickbloom.server_app.runs.checkpoints import load
from quickbloom.server_app.runs.directory import MEASURED, RunDirectory, read_history
from quickbloom.server_app.runs.resume import with_settings_of
from quickbloom.server_app.runs.trackers import Trackers

Answer = Callable[[Message], Message]


class Killed(BaseException):
    """The end of the server in the middle of a run."""


def settings(folder: Path, **changes: Any) -> RunConfig:
    flat = {"mlp.hidden": "8", "min-nodes": 1, "rounds": 4, "adapt-steps": 3, "seed": 1, "evaluate-every": 1}
    flat |= {"algorithm": "maml", "output-dir": str(folder)}
    return parse_run_config({**flat, **{key.replace("_", "-").replace("--", "."): v for key, v in changes.items()}}).resolved()


def run(folder: Path, nodes: int = 2, **changes: Any) -> dict[str, Any]:
    config = settings(folder, **changes)
    return run_federation(LoopbackGrid(nodes, config.flat()), config)


def cut(folder: Path, kind: str, number: int, nodes: int = 2, **changes: Any) -> None:
    """A run whose server dies when node 101 gets a message of this kind and round; "test": when it is to score test tasks."""
    rounds = settings(folder).rounds
    seen: list[Message] = []

    def fault(message: Message, answer: Answer) -> Message:
        metadata = message.metadata
        if metadata.message_type == ("evaluate" if kind == "test" else kind) and metadata.group_id == str(number):
            seen.append(message)
            if kind != "test" or len(seen) > 1:
                raise Killed
        return answer(message)

    assert number <= rounds
    config = settings(folder, **changes)
    with pytest.raises(Killed):
        run_federation(LoopbackGrid(nodes, config.flat(), {1: fault}), config)


def result(folder: Path, summary: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All that must be equal bit for bit: the summary and history but for times, places, and how often it was resumed."""
    beside = ("seconds", "run_dir", "resumed", "runtime", "workers")
    rounds = [{key: value for key, value in record.items() if key not in MEASURED} for record in read_history(folder)]
    return {key: value for key, value in summary.items() if key not in beside}, rounds


# ---- the same result


@pytest.mark.parametrize(
    ("kind", "number", "done"),
    [(TRAIN, 1, 0), (EVALUATE, 1, 0), (TRAIN, 3, 2), (EVALUATE, 3, 2), (TRAIN, 4, 3), (EVALUATE, 4, 3), ("test", 4, 4)],
)
def test_a_run_that_was_cut_off_ends_like_one_that_was_not(tmp_path: Path, kind: str, number: int, done: int) -> None:
    whole = run(tmp_path / "whole")
    cut(tmp_path / "cut", kind, number)
    assert [record["round"] for record in read_history(tmp_path / "cut")] == list(range(1, done + 1))
    rest = run(tmp_path / "cut", resume_from=str(tmp_path / "cut"))
    assert result(tmp_path / "cut", rest) == result(tmp_path / "whole", whole)
    assert (whole["resumed"], rest["resumed"]) == (0, 1)
    assert rest["run_dir"] == str(tmp_path / "cut")
    first, second = (load(tmp_path / name) for name in ("whole", "cut"))
    assert all((value == second.tensors[name]).all() for name, value in first.tensors.items())


@pytest.mark.parametrize("algorithm", ["reptile", "metasgd"])
def test_a_run_can_be_cut_off_often_and_counts_how_often(tmp_path: Path, algorithm: str) -> None:
    whole = run(tmp_path / "whole", algorithm=algorithm)
    cut(tmp_path / "cut", TRAIN, 2, algorithm=algorithm)
    for number in (3, 4):
        cut(tmp_path / "cut", EVALUATE, number, algorithm=algorithm, resume_from=str(tmp_path / "cut"))
    rest = run(tmp_path / "cut", algorithm=algorithm, resume_from=str(tmp_path / "cut"))
    assert result(tmp_path / "cut", rest) == result(tmp_path / "whole", whole)
    assert rest["resumed"] == 3


@pytest.mark.parametrize("changes", [{"adapt_steps": 4}, {"adapt_lrs": "0.02,0.2"}])
def test_a_finished_training_is_scored_with_the_steps_and_rates_that_it_is_gone_on_with(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    whole = run(tmp_path / "whole", **changes)
    cut(tmp_path / "cut", "test", 4)
    rest = run(tmp_path / "cut", resume_from=str(tmp_path / "cut"), **changes)
    for name in ("chosen", "test", "validation"):
        assert rest[name] == whole[name]
    assert (tmp_path / "cut" / "per_task.csv").read_text() == (tmp_path / "whole" / "per_task.csv").read_text()


def test_rounds_after_the_checkpoint_stand_in_the_history_once(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    cut(tmp_path / "cut", TRAIN, 4, checkpoint_every=2)  # the checkpoint is of round 2, the history has 1, 2 and 3
    with (tmp_path / "cut" / "history.jsonl").open("a") as file:
        file.write('{"round": 4, "tra')
    assert [record["round"] for record in read_history(tmp_path / "cut")] == [1, 2, 3]
    rest = run(tmp_path / "cut", resume_from=str(tmp_path / "cut"))
    assert result(tmp_path / "cut", rest) == result(tmp_path / "whole", whole)


@pytest.mark.parametrize("torn", ["", '{"round": 2, "tra'])
def test_a_first_round_whose_checkpoint_was_not_written_stands_in_the_history_once(tmp_path: Path, torn: str) -> None:
    whole = run(tmp_path / "whole")
    cut(tmp_path / "cut", TRAIN, 2)
    (tmp_path / "cut" / "checkpoints" / "round-000001.safetensors").unlink()  # as killed between the two
    with (tmp_path / "cut" / "history.jsonl").open("a") as file:
        file.write(torn)
    rest = run(tmp_path / "cut", resume_from=str(tmp_path / "cut"))
    assert result(tmp_path / "cut", rest) == result(tmp_path / "whole", whole)


def test_a_damaged_checkpoint_costs_one_round_more(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    cut(tmp_path / "cut", TRAIN, 4)
    newest = tmp_path / "cut" / "checkpoints" / "round-000003.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    rest = run(tmp_path / "cut", resume_from=str(tmp_path / "cut"))
    assert result(tmp_path / "cut", rest) == result(tmp_path / "whole", whole)


def test_a_checkpoint_file_is_gone_on_from_in_a_new_directory_and_left_alone(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    file = tmp_path / "whole" / "checkpoints" / "round-000002.safetensors"
    before = {path: path.read_bytes() for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    rest = run(tmp_path / "rest", resume_from=str(file))
    assert result(tmp_path / "rest", rest) == result(tmp_path / "whole", whole)
    assert {path: path.read_bytes() for path in (tmp_path / "whole").rglob("*") if path.is_file()} == before
    alone = tmp_path / "alone.safetensors"
    shutil.copy(file, alone)
    third = run(tmp_path / "third", resume_from=str(alone))
    assert third["test"] == whole["test"]
    assert [record["round"] for record in read_history(tmp_path / "third")] == [3, 4]


def test_counts_and_seconds_are_those_of_both_parts(tmp_path: Path) -> None:
    cut(tmp_path, TRAIN, 4)
    so_far = load(tmp_path).facts["so-far"]
    lines = read_history(tmp_path)
    assert so_far["bytes"]["down"] == sum(line["bytes"]["down"] for line in lines) > 0
    assert so_far["best"]["accuracy"] == max(line["validation"]["accuracy"][s] for line in lines for s in (1, 2, 3))
    rest = run(tmp_path, resume_from=str(tmp_path))
    assert rest["seconds"]["total"] > so_far["seconds"]["total"] > 0


# ---- settings


def flower(monkeypatch: pytest.MonkeyPatch, grid: LoopbackGrid, run_config: dict[str, Any], given: dict[str, Any]) -> None:
    """The ServerApp as Flower starts it: `run_config` is what server and nodes know, `given` what the user gave."""
    fake = Run.create_empty(1)
    fake.override_config = given
    monkeypatch.setattr(LoopbackGrid, "run", property(lambda self: fake))
    server.main(grid, Context(1, 1, {}, RecordDict(), run_config))


def test_over_flower_the_directory_alone_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole")
    cut(tmp_path / "cut", TRAIN, 3)
    given = {"resume-from": str(tmp_path / "cut"), "chunk-size": 50}
    known = parse_run_config(given).flat()
    assert known["algorithm"] == "reptile"  # what the nodes would train
    flower(monkeypatch, LoopbackGrid(2, known), known, given)
    rest = json.loads((tmp_path / "cut" / "summary.json").read_text())
    assert result(tmp_path / "cut", rest) == result(tmp_path / "whole", whole)
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["chunk-size"] == 50


def test_over_flower_a_given_setting_that_decides_what_is_learned_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(tmp_path, TRAIN, 3)
    given = {"resume-from": str(tmp_path), "seed": 0}  # 0 is the default, but it was given
    known = parse_run_config(given).flat()
    with pytest.raises(ConfigError, match="`seed` must be 1 as in the run to go on from, got 0"):
        flower(monkeypatch, LoopbackGrid(2, known), known, given)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"algorithm": "reptile"}, "`algorithm` must be 'maml' as in the run to go on from, got 'reptile'"),
        ({"rounds": 9}, "`rounds` must be 4 as in the run to go on from, got 9"),
        ({"mlp__hidden": "9"}, "`mlp.hidden` must be '8' as in the run to go on from, got '9'"),
        ({"test_tasks": 0.5}, "`test-tasks` must be"),
        ({"digits__data_seed": 1}, "`digits.data-seed` must be 0"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_left_alone(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    cut(tmp_path, TRAIN, 3)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=sentence):
        run(tmp_path, resume_from=str(tmp_path), **changes)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("more", [{}, {"bucketing": 2}], ids=["alone", "buckets"])
def test_a_rule_with_a_history_goes_on_from_it(tmp_path: Path, more: dict[str, Any]) -> None:
    changes: dict[str, Any] = {"nodes": 5, "aggregate": "centered-clip", "clip_radius": 0.05, **more}
    whole = run(tmp_path / "whole", **changes)
    cut(tmp_path / "cut", TRAIN, 3, **changes)
    assert any(name.startswith("centre/") for name in load(tmp_path / "cut").tensors)
    rest = run(tmp_path / "cut", resume_from=str(tmp_path / "cut"), **changes)
    assert result(tmp_path / "cut", rest) == result(tmp_path / "whole", whole)
    first, second = (load(tmp_path / name) for name in ("whole", "cut"))
    assert all((value == second.tensors[name]).all() for name, value in first.tensors.items())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_root_set_goes_on_from_what_it_contributed(tmp_path: Path, momentum: float) -> None:
    def nodes(name: str) -> dict[int, dict[str, str]]:
        return {i: {"state-dir": str(tmp_path / name / f"node-{i}")} for i in range(3)}

    def start(name: str, fault: Any = None, **more: Any) -> dict[str, Any]:
        given: dict[str, Any] = {"aggregate": "fltrust", "root_tasks": "any:3", "node_momentum": momentum}
        config = settings(tmp_path / name, **given, personal=False, **more)
        return run_federation(LoopbackGrid(3, config.flat(), {1: fault} if fault else {}, nodes(name)), config)

    def killed(message: Message, answer: Answer) -> Message:
        if (message.metadata.message_type, message.metadata.group_id) == (TRAIN, "3"):
            raise Killed
        return answer(message)

    whole = start("whole")
    with pytest.raises(Killed):
        start("cut", killed)
    # What the next round does not need is in no file that devices may be given.
    assert any(name.startswith("root/") for name in load(tmp_path / "cut").tensors) == bool(momentum)
    rest = start("cut", resume_from=str(tmp_path / "cut"))
    assert result(tmp_path / "cut", rest) == result(tmp_path / "whole", whole)
    first, second = (load(tmp_path / name) for name in ("whole", "cut"))
    assert all((value == second.tensors[name]).all() for name, value in first.tensors.items())


def test_a_root_sets_contribution_must_fit_the_model(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"nodes": 5, "aggregate": "fltrust", "root_tasks": "any:3", "node_momentum": 0.5}
    cut(tmp_path, TRAIN, 2, **changes)
    found = load(tmp_path)
    name = next(name for name in found.tensors if name.startswith("root/"))
    tensors = {key: value for key, value in found.tensors.items() if key != name}
    checkpoint_file.write(found.path, tensors, found.facts, wait=True)
    with pytest.raises(ConfigError, match=rf"another root set's contribution: the tensor `{name.removeprefix('root/')}`"):
        run(tmp_path, resume_from=str(tmp_path), **changes)


def test_the_history_of_a_rule_must_fit_the_model(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"nodes": 5, "aggregate": "centered-clip"}
    cut(tmp_path, TRAIN, 2, **changes)
    found = load(tmp_path)
    name = next(name for name in found.tensors if name.startswith("centre/"))
    tensors = {key: value for key, value in found.tensors.items() if key != name}
    checkpoint_file.write(found.path, tensors, found.facts, wait=True)
    with pytest.raises(ConfigError, match=rf"another centre of `centered-clip`: the tensor `{name.removeprefix('centre/')}`"):
        run(tmp_path, resume_from=str(tmp_path), **changes)


def test_a_secure_run_goes_on_with_another_threshold_to_the_same_result(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", nodes=3, secure_aggregation=True)
    cut(tmp_path / "cut", MASKED, 3, nodes=3, secure_aggregation=True)
    more: dict[str, Any] = {"secure_aggregation": True, "secure_threshold": 1.0}
    rest = run(tmp_path / "cut", nodes=3, resume_from=str(tmp_path / "cut"), **more)
    assert result(tmp_path / "cut", rest) == result(tmp_path / "whole", whole)
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["secure-threshold"] == 1.0


def test_a_tracking_server_sees_one_run_for_every_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Recorder(Trackers):
        name = "recorder"

        def __init__(self, uri: str, run_name: str, branch: str, settings: Any) -> None:
            super().__init__([])
            seen.append(branch)

    monkeypatch.setattr(trackers, "MLflow", Recorder)
    monkeypatch.setattr(trackers, "check", lambda config: None)
    more: dict[str, Any] = {"mlflow": "http://127.0.0.1:9"}
    cut(tmp_path / "cut", TRAIN, 3, **more)
    newest = tmp_path / "cut" / "checkpoints" / "round-000002.safetensors"
    cut(tmp_path / "branch", TRAIN, 4, resume_from=str(newest), **more)
    for name in ("cut", "branch"):
        run(tmp_path / name, resume_from=str(tmp_path / name), **more)
    first, branch, first_again, branch_again = seen
    assert (first, branch) == (first_again, branch_again)
    assert first != branch


def test_a_checkpoint_from_before_a_setting_existed_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole")
    flat = RunConfig.flat
    new = ("secure-aggregation", "maml.zero-head", "transductive")
    monkeypatch.setattr(RunConfig, "flat", lambda self: {key: value for key, value in flat(self).items() if key not in new})
    cut(tmp_path / "cut", TRAIN, 3)
    monkeypatch.undo()
    rest = run(tmp_path / "cut", resume_from=str(tmp_path / "cut"))
    assert result(tmp_path / "cut", rest) == result(tmp_path / "whole", whole)


def test_a_run_from_before_the_setting_goes_on_with_transductive_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat = RunConfig.flat
    monkeypatch.setattr(RunConfig, "flat", lambda self: {k: v for k, v in flat(self).items() if k != "transductive"})
    cut(tmp_path / "cut", TRAIN, 3)
    monkeypatch.undo()
    old = load(tmp_path / "cut")
    assert "transductive" not in old.facts["config"]
    given = {"resume-from": str(tmp_path / "cut")}
    assert with_settings_of(old, given)["transductive"] is True
    assert with_settings_of(old, {**given, "transductive": False})["transductive"] is False


@pytest.mark.parametrize("where", [".", "checkpoints/round-000004.safetensors"])
def test_a_finished_run_is_refused_with_one_sentence(tmp_path: Path, where: str) -> None:
    run(tmp_path / "first")
    with pytest.raises(ConfigError, match="`resume-from` names a run that is finished"):
        run(tmp_path / ("first" if where == "." else "second"), resume_from=str(tmp_path / "first" / where))


def test_a_directory_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no checkpoint"):
        run(tmp_path, resume_from=str(tmp_path))


def test_a_run_that_still_goes_on_is_not_gone_on_with(tmp_path: Path) -> None:
    cut(tmp_path, TRAIN, 3)
    with RunDirectory.create(str(tmp_path), "", again=True).held(), pytest.raises(ConfigError, match="a run is going on in"):
        run(tmp_path, resume_from=str(tmp_path))
    assert run(tmp_path, resume_from=str(tmp_path))["resumed"] == 1


def test_going_on_with_other_tasks_is_refused_so_that_no_trained_task_is_tested(tmp_path: Path) -> None:
    cut(tmp_path, TRAIN, 3)
    again = settings(tmp_path, resume_from=str(tmp_path))
    silent = LoopbackGrid(2, again.flat(), faults={0: lambda message, answer: None})
    with pytest.raises(ConfigError, match="connect the same nodes"):
        run_federation(silent, again)


def test_rounds_are_shown_as_rounds_of_the_whole_run(tmp_path: Path) -> None:
    cut(tmp_path, TRAIN, 3)
    told: list[Event] = []
    config = settings(tmp_path, resume_from=str(tmp_path))
    run_federation(LoopbackGrid(2, config.flat()), config, Events(told.append))
    assert [(event.round, event.rounds) for event in told if isinstance(event, RoundEnded)] == [(3, 4), (4, 4)]
    (started,) = [event for event in told if isinstance(event, Started)]
    assert (started.done, started.rounds, started.run_dir) == (2, 4, str(tmp_path))


def without_times(events: list[Event]) -> list[Event]:
    return [replace(event, seconds=0.0) if isinstance(event, RoundEnded) else event for event in events]


@pytest.mark.parametrize("lost", [False, True])
def test_the_events_go_on_as_the_history_does(tmp_path: Path, lost: bool) -> None:
    run(tmp_path / "whole")
    cut(tmp_path / "cut", TRAIN, 3)
    if lost:  # the newest checkpoint: its round is done again
        (tmp_path / "cut" / "checkpoints" / "round-000002.safetensors").unlink()
    first = read_events(tmp_path / "cut")
    run(tmp_path / "cut", resume_from=str(tmp_path / "cut"))
    whole, both = (without_times(read_events(tmp_path / name)) for name in ("whole", "cut"))
    of_rounds = [event for event in both if isinstance(event, RoundEnded | Scored)]
    assert of_rounds == [event for event in whole if isinstance(event, RoundEnded | Scored)]
    assert [event.round for event in of_rounds if isinstance(event, RoundEnded)] == [1, 2, 3, 4]
    assert [record["round"] for record in read_history(tmp_path / "cut")] == [1, 2, 3, 4]
    assert [event.round for event in both if isinstance(event, Saved)] == [0, 1, 2, 3, 4]
    assert [event.done for event in both if isinstance(event, Started)] == [0, 1 if lost else 2]
    assert both[: 6 if lost else 9] == without_times(first)[: 6 if lost else 9]
    assert [type(event) for event in both].count(Ended) == 1


def test_a_checkpoint_file_gives_its_run_the_events_up_to_its_round(tmp_path: Path) -> None:
    run(tmp_path / "one")
    before = read_events(tmp_path / "one")
    run(tmp_path / "two", resume_from=str(tmp_path / "one" / "checkpoints" / "round-000003.safetensors"))
    assert [e.round for e in read_events(tmp_path / "two") if isinstance(e, RoundEnded)] == [1, 2, 3, 4]
    assert read_events(tmp_path / "one") == before


def test_a_run_that_cannot_go_on_leaves_the_events_as_they_were(tmp_path: Path) -> None:
    cut(tmp_path, TRAIN, 3)
    before = read_events(tmp_path)
    again = settings(tmp_path, resume_from=str(tmp_path))
    told: list[Event] = []
    with pytest.raises(ConfigError, match="connect the same nodes"):
        run_federation(LoopbackGrid(2, again.flat(), faults={0: lambda message, answer: None}), again, Events(told.append))
    assert read_events(tmp_path) == before
    assert isinstance(told[-1], Stopped)
    assert "connect the same nodes" in told[-1].reason


def test_a_damaged_checkpoint_is_a_warning_of_the_run_that_goes_on(tmp_path: Path) -> None:
    cut(tmp_path, TRAIN, 4)
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    told: list[Event] = []
    config = settings(tmp_path, resume_from=str(tmp_path))
    run_federation(LoopbackGrid(2, config.flat()), config, Events(told.append))
    (warning,) = [event for event in told if isinstance(event, Warned) and newest.name in event.sentence]
    assert warning in read_events(tmp_path)
