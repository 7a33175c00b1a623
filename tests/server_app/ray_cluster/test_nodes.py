"""A run whose nodes are computed on a Ray cluster: the result of one process, also where a machine is lost."""

import json
import logging
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from ray_machines import Cluster, free_port, wait_until

import quickbloom
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.errors import ConfigError, RunError
from quickbloom.common.system import user_code
from quickbloom.server_app.cli import main
from quickbloom.server_app.comparing.fingerprint import of_run
from quickbloom.server_app.events.kinds import Event, RoundEnded
from quickbloom.server_app.launch.follow import run_here
from quickbloom.server_app.messaging.in_process_grid import client_app
from quickbloom.server_app.ray_cluster.connecting import Processors, is_same
from quickbloom.server_app.ray_cluster.nodes import ComputesNodes, Facts, RayNodes, gpu_share, nodes_on

SETTINGS: dict[str, Any] = {
    "dataset": "digits",
    "algorithm": "ditto",  # a node keeps a model for each of its tasks
    "rounds": 4,
    "min-nodes": 5,
    "baselines": False,
    "personal": False,
    "evaluate-every": 0,
}


def lines(directory: Path) -> list[Any]:
    """What the history says of every round, without seconds and memory."""
    history = [json.loads(line) for line in (directory / "history.jsonl").read_text().splitlines()]
    return [[line["round"], line.get("train"), line.get("validation"), line.get("failures")] for line in history]


@pytest.mark.slow
def test_a_run_on_a_cluster_is_that_of_one_process_and_outlives_a_lost_machine(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = parse_run_config({**SETTINGS, "output-dir": str(tmp_path / "here")})
    there = parse_run_config({**SETTINGS, "output-dir": str(tmp_path / "there")})
    summary = run_here(here, 5, shown=False)
    elsewhere = nodes_on(cluster.address, there)
    ray: Any = import_module("ray")
    wait_until(lambda: ray.cluster_resources().get("CPU") == 2)  # the other machine may come late
    found = run_here(there, 5, shown=False, elsewhere=elsewhere)
    assert lines(tmp_path / "there") == lines(tmp_path / "here")
    assert found["test"] == summary["test"]
    assert (found["runtime"], summary["workers"]) == ("in-process", 1)
    assert found["workers"] in (1, 2)  # the other machine may be ready late
    assert (tmp_path / "there" / "per_task.csv").read_bytes() == (tmp_path / "here" / "per_task.csv").read_bytes()
    wait_until(lambda: not cluster.actors(cluster.head) + cluster.actors(cluster.other))

    longer = parse_run_config({**SETTINGS, "rounds": 12, "output-dir": str(tmp_path / "lost")})
    alone = parse_run_config({**SETTINGS, "rounds": 12, "output-dir": str(tmp_path / "alone")})
    run_here(alone, 5, shown=False)
    made: list[RayNodes] = []

    def lose(event: Event) -> None:
        if isinstance(event, RoundEnded) and event.round == 2:  # until both machines help
            ray.wait(list(made[0]._coming), timeout=90)
        if isinstance(event, RoundEnded) and event.round == 6:
            assert made[0].number == 2
            cluster.lose(cluster.other)

    start = nodes_on(cluster.address, longer)

    def start_and_keep(contexts: Mapping[int, Context]) -> RayNodes:
        nodes = start(contexts)
        assert isinstance(nodes, RayNodes)
        made.append(nodes)
        return nodes

    found = run_here(longer, 5, shown=False, listeners=[lose], elsewhere=start_and_keep)
    assert found["workers"] >= 2
    assert lines(tmp_path / "lost") == lines(tmp_path / "alone")
    assert "is gone (" in capsys.readouterr().err


@pytest.mark.slow
def test_from_python_a_connection_of_the_callers_stays(cluster: Cluster, tmp_path: Path) -> None:
    ray: Any = import_module("ray")
    settings: dict[str, Any] = {"dataset": "gaussian", "rounds": 1, "nodes": 2, "progress": False}
    alone = quickbloom.run("fedavg", output=tmp_path / "alone", **settings)
    there = quickbloom.run("fedavg", output=tmp_path / "there", ray=cluster.address, **settings)
    assert there.summary["test"] == alone.summary["test"]
    assert not ray.is_initialized()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    table = quickbloom.compare(["fedavg"], dataset="gaussian", rounds=1, seeds=1, ray="auto", output=tmp_path / "table")
    assert [row["algorithm"] for row in table["algorithms"]] == ["fedavg"]
    assert ray.is_initialized()
    with pytest.raises(ConfigError, match="`ray` must be the cluster that this program is connected to"):
        quickbloom.run("fedavg", output=tmp_path / "other", ray="127.0.0.1:1", **settings)


def test_from_python_too_some_exclude_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`ray` excludes `simulation` and `workers`"):
        quickbloom.run("fedavg", dataset="gaussian", ray="auto", workers=2, output=tmp_path)
    with pytest.raises(ConfigError, match="`ray` excludes `jobs`"):
        quickbloom.compare(["fedavg"], dataset="gaussian", rounds=1, ray="auto", jobs=2, output=tmp_path)


@pytest.mark.slow
def test_ctrl_c_ends_what_computes_the_nodes(cluster: Cluster, tmp_path: Path) -> None:
    words = ["run", "--algorithm", "fedavg", "--dataset", "gaussian", "--rounds", str(10**6), "--nodes", "4"]
    words += ["--ray", cluster.address, "--output", str(tmp_path / "out"), "--no-report"]
    program = "import sys; from quickbloom.server_app.cli.main import main; sys.argv[0] = 'quickbloom'; main()"
    run = subprocess.Popen(
        [sys.executable, "-c", program, *words], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    try:
        wait_until(lambda: bool(cluster.actors(cluster.head)) and (tmp_path / "out" / "history.jsonl").exists())
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130, said
    assert "Stopped; what was finished is in" in said
    assert "Traceback" not in said
    wait_until(lambda: not cluster.actors(cluster.head) + cluster.actors(cluster.other))


@pytest.mark.parametrize(
    "more",
    [("--workers", "2"), ("--connection", "ours"), ("--runtime", "simulation"), ("--leave-one-out",)],
    ids=lambda it: it[0],
)
def test_what_excludes_a_cluster_is_told(monkeypatch: pytest.MonkeyPatch, capsys: Any, more: tuple[str, ...]) -> None:
    monkeypatch.setattr("sys.argv", ["quickbloom", "run", "--dataset", "gaussian", "--ray", "127.0.0.1:1", *more])
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 2
    assert f"`--ray` excludes `{' '.join(more) if more[0] == '--runtime' else more[0]}`" in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.parametrize("address", ["127.0.0.1:PORT", "", "localhost"])
def test_an_address_that_does_not_answer_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path, address: str
) -> None:
    address = address.replace("PORT", str(free_port()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["quickbloom", "run", "--dataset", "gaussian", "--rounds", "1", "--ray", address])
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"`--ray` must be the address of a Ray cluster that is running, HOST:PORT or auto, got '{address}'" in said
    assert "Traceback" not in said


def test_other_data_or_another_release_on_a_machine_are_told_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What `begin` changes in its own process.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(user_code.FOLDER, "")
    monkeypatch.setattr(logging.getLogger("flwr"), "handlers", [])
    data = tmp_path / "data.csv"
    data.write_text("task,x,target\n" + "".join(f"t{i % 8},{i},{i % 3 + 0.5}\n" for i in range(160)))
    own = {"own.path": str(data), "own.task-column": "task", "own.target-column": "target"}
    config = parse_run_config({"dataset": "own", "algorithm": "ridge", **own})
    facts = Facts(config.flat(), of_run(config, {}).digest, str(tmp_path))
    machine = ComputesNodes()
    assert machine.begin(facts)[1] == ""
    assert machine.begin(replace(facts, release="0.0.1"))[1].endswith("instead of 0.0.1")
    data.write_text(data.read_text().replace("t0,0,", "t0,1,"))
    assert machine.begin(facts)[1] == "its data are not those of the machine where the run was started"
    data.unlink()
    assert machine.begin(facts)[1] == "its data are not those of the machine where the run was started"


def test_an_address_has_several_names() -> None:
    assert all(is_same(name, "192.0.2.2:6379") for name in ("192.0.2.2:6379", "127.0.0.1:6379", "localhost:6379"))
    assert not any(is_same(name, "192.0.2.2:6379") for name in ("192.0.2.2:6380", "192.0.2.3:6379", "no.where.invalid:6379"))


def test_a_gpu_is_shared_by_the_nodes_beside_it() -> None:
    assert gpu_share({"CPU": 16.0, "GPU": 2.0}, 100) == 0.125
    assert gpu_share({"CPU": 16.0, "GPU": 2.0}, 3) == 0.6666  # not rounded up: three must fit
    assert gpu_share({"CPU": 4.0, "GPU": 8.0}, 100) == 1.0
    assert gpu_share({"CPU": 4.0}, 100) == 0.0


class LostError(Exception):
    """As Ray tells of a process or a machine that is gone."""


class FailedError(LostError):
    """As Ray tells of an exception of the code."""

    cause = ModuleNotFoundError("No module named 'quickbloom'")


class Reference:
    """To a result, as Ray's: hashable whatever that is."""

    def __init__(self, result: Any) -> None:
        self.result = result


class Actor:
    """One actor that Ray would start. `begins`: what `begin` gives; `losses`: how many messages are lost with it.

    `lost`: whether its machine is gone.
    """

    def __init__(self, begins: Any, losses: int = 0) -> None:
        self.computed: list[int] = []
        self.lost = False
        self.begin = SimpleNamespace(remote=lambda _: Reference(begins))
        self.there = SimpleNamespace(remote=lambda: Reference(LostError("it died") if self.lost else begins))
        self.answer = SimpleNamespace(remote=self._answer)
        self._losses = losses

    def _answer(self, message: Message, context: Context) -> Reference:
        node = message.metadata.dst_node_id
        self.computed.append(node)
        if self.lost or len(self.computed) <= self._losses:
            return Reference(LostError("the machine is gone. See https://example.com"))
        return Reference((message, context, [], 1.0))


NEVER = object()
"""The result of what does not end: an actor for which there is no room does not begin."""


class FakeRay:
    """A cluster that gives these actors in turn, and has room for no more."""

    exceptions = SimpleNamespace(RayError=LostError, RayTaskError=FailedError)

    def __init__(self, *actors: Actor) -> None:
        self.actors, self._given = actors, iter(actors)
        self.processors = len(actors)
        self.early = False
        """Whether actors are ready, or lost, before there are replies."""
        self.killed: list[Actor] = []

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(self.processors)}

    def remote(self, kind: type) -> Any:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: next(self._given, Actor(NEVER))))

    def wait(self, references: Sequence[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        there = [reference for reference in references if reference.result is not NEVER]
        assert there, "it would wait for ever"
        return (there[-1:] if self.early else there[:1]), []

    def get(self, reference: Reference) -> Any:
        if isinstance(reference.result, Exception):
            raise reference.result
        return reference.result

    def kill(self, actor: Actor) -> None:
        self.killed.append(actor)


def asked(
    *actors: Actor, times: int = 2, before: Callable[[int, FakeRay], None] = lambda *_: None, nodes: Sequence[int] = (3,)
) -> FakeRay:
    """Some nodes are asked by these actors. `before`: is called before each time, from 0; `nodes`: asked at each time."""
    client_app()  # messages need an identity
    ids = range(100, 100 + nodes[0])
    contexts = {i: Context(run_id=1, node_id=i, node_config={}, state=RecordDict(), run_config={}) for i in ids}
    ray = FakeRay(*actors)
    on_ray = RayNodes(ray, contexts, Facts({}, "", ""))
    for i in range(times):
        before(i, ray)
        now = ids[: nodes[i % len(nodes)]]
        messages = [Message(RecordDict(), node, "train") for node in now]
        for number, message in enumerate(messages):
            message.metadata.__dict__["_message_id"] = f"{number}"
        found = list(on_ray.replies(messages))
        assert sorted(message.metadata.dst_node_id for message, _ in found) == [*now]
        assert all(reply is message for message, reply in found)
    on_ray.close()
    return ray


def test_a_message_that_is_lost_goes_to_another_and_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    lost, good = Actor(("a", ""), losses=1), Actor(("b", ""))
    ray = asked(lost, good)
    assert len(lost.computed) == 1
    assert sorted(good.computed) == [100, 100, 101, 101, 102, 102]
    assert "What computed a node on a is gone (LostError: the machine is gone); another one does it" in capsys.readouterr().err
    assert good in ray.killed
    assert lost not in ray.killed


def test_a_message_that_is_lost_every_time_ends_the_run() -> None:
    with pytest.raises(RunError, match="a message to a node was lost 3 times with what computed it"):
        asked(*[Actor(("a", ""), losses=1) for _ in range(3)])


def test_a_machine_that_cannot_help_is_told_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    other, good = Actor(("a", "it has quickbloom 0.1.0 instead of 0.2.0")), Actor(("b", ""))
    ray = asked(other, good)
    assert not other.computed
    assert "Remark: the machine a of the Ray cluster cannot compute nodes: it has quickbloom 0.1.0" in capsys.readouterr().err
    assert set(map(id, ray.killed)) == {id(other), id(good)}
    with pytest.raises(RunError, match="the machine a of the Ray cluster cannot compute nodes"):
        asked(Actor(("a", "its data are not those")))


def test_a_machine_that_is_lost_while_it_is_idle_takes_one_message_along(capsys: pytest.CaptureFixture[str]) -> None:
    here, gone = Actor(("a", "")), [Actor(("b", "")) for _ in range(4)]

    def lose(time: int, ray: FakeRay) -> None:
        ray.early = True
        for actor in gone:
            actor.lost = time == 1

    asked(here, *gone, before=lose, nodes=(5, 1))
    # Else the message would be lost with the next of them, and with one more, and the run would end.
    assert capsys.readouterr().err.count("is gone (") == 1


def test_a_machine_that_cannot_help_stands_in_nobodys_way(capsys: pytest.CaptureFixture[str]) -> None:
    others, good = [Actor(("a", "its data are not those")) for _ in range(4)], Actor(("b", ""))
    # Three actors are asked for first, and Ray starts them all on the other machine.
    asked(*others, good)
    assert len(good.computed) == 6
    assert capsys.readouterr().err.count("Remark: the machine a") == 1


def test_a_machine_without_quickbloom_stands_in_nobodys_way(capsys: pytest.CaptureFixture[str]) -> None:
    good = Actor(("b", ""))

    def first(_: int, ray: FakeRay) -> None:
        ray.early = True

    ray = asked(good, *[Actor(LostError("died in its creation")) for _ in range(8)], times=4, before=first)
    assert len(good.computed) == 12
    assert capsys.readouterr().err.count("Remark: Ray's machines could not start what computes nodes") == 1
    assert next(ray._given) in ray.actors  # it is not tried for ever


def test_a_machine_in_place_of_one_that_could_not_help_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quickbloom.server_app.ray_cluster.connecting._KNOWN_FOR", 0.0)
    good, other, mended = Actor(("b", "")), Actor(("a", "its data are not those")), Actor(("a", ""))

    def mend(time: int, ray: FakeRay) -> None:
        other.lost = time >= 1
        ray.processors = 1 if time == 1 else 2

    asked(good, other, mended, times=3, before=mend)
    assert mended.computed


def test_a_connection_that_has_ended_ends_the_run_with_a_sentence() -> None:
    def end(time: int, ray: FakeRay) -> None:
        def ended(*_: Any, **__: Any) -> Any:
            raise ConnectionError("Client is shutting down.")

        ray.wait = ended  # type: ignore[method-assign]

    with pytest.raises(
        RunError, match=r"the connection to the Ray cluster is lost \(ConnectionError: Client is shutting down\): see that its"
    ):
        asked(Actor(("a", "")), before=end)


def test_a_head_that_is_lost_is_told_before_ray_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("quickbloom.server_app.ray_cluster.connecting.time", SimpleNamespace(monotonic=lambda: now[0]))
    answers = [True]

    def check(_: str) -> None:
        if not answers[0]:
            raise ConnectionRefusedError("refused")

    monkeypatch.setattr("quickbloom.server_app.ray_cluster.connecting.check_answers", check)
    asked_of_ray: list[float] = []

    def resources() -> dict[str, float]:
        asked_of_ray.append(now[0])
        return {"CPU": 3.0}

    processors = Processors(SimpleNamespace(cluster_resources=resources), "one:1")
    assert processors() == 3
    answers[0] = False
    for _ in range(6):
        now[0] += 5
        assert processors() == 3
    assert asked_of_ray == [1000.0]  # Ray would wait for its answer
    now[0] += 5
    with pytest.raises(RunError, match=r"the head of the Ray cluster at one:1 is lost \(.*refused"):
        processors()
    assert processors.silent


def test_actors_are_not_ended_through_a_head_that_is_silent() -> None:
    silent = Processors(SimpleNamespace(), "127.0.0.1:1")
    assert (silent(), silent.silent) == (1, True)
    ray = FakeRay(Actor(("a", "")))
    on_ray = RayNodes(ray, {}, Facts({}, "", ""))
    on_ray._processors = silent
    on_ray._free.append(ray.actors[0])
    on_ray.close()  # Ray would wait for the head for a minute, deaf to Ctrl-C
    assert not ray.killed
    on_ray._processors = Processors(ray)
    on_ray.close()
    assert ray.killed == [ray.actors[0]]


def test_an_exception_of_the_code_ends_the_run_at_once() -> None:
    with pytest.raises(RunError, match=r"a Ray task of this run failed \(ModuleNotFoundError: No module named 'quickbloom'\)"):
        asked(Actor(FailedError("a long story")))
    with pytest.raises(RunError, match="each of them needs quickbloom in the Python of its Ray"):
        asked(*[Actor(LostError("died in its creation")) for _ in range(5)])  # three, and two that are asked for beside them


def test_a_node_stays_with_the_process_that_has_read_its_data() -> None:
    one, other = Actor(("a", "")), Actor(("b", ""))
    asked(one, other, times=4)
    assert {*one.computed} | {*other.computed} == {100, 101, 102}
    for node in (100, 101, 102):
        assert node in one.computed or node in other.computed
    assert max(one.computed.count(node) for node in one.computed) >= 3
