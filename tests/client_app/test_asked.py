"""A node scores no task that it trains on, and under secure sums one model per round, as the run's settings want it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict
from loopback import LoopbackGrid

from quickbloom.client_app.asked import Asked
from quickbloom.client_app.node import node_of
from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.datasets import load_dataset
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.maths.params import Params
from quickbloom.common.wire.messages import EVALUATE, TRAIN, EvaluateRequest, TrainRequest, error_reason, tell_settings
from quickbloom.common.wire.secure.messages import MASKED
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.runs.directory import read_history

FLAT: dict[str, Any] = {"dataset": "gaussian", "gaussian.clients": 12, "model": "linear", "algorithm": "fedavg", "min-nodes": 1}
FLAT |= {"rounds": 6, "evaluate-every": 2, "adapt-steps": 2, "adapt-lrs": "0.1,0.3", "test-shots": "1,2"}
SECURE = {"secure-aggregation": True}


def config(**more: Any) -> RunConfig:
    return parse_run_config({**FLAT, **{key.replace("_", "-"): value for key, value in more.items()}})


def meta(change: float = 0.0) -> Params:
    run = config().resolved()
    spec = load_dataset("gaussian", run.table("gaussian"), Path()).spec
    return {name: value + change for name, value in build_algorithm(run, spec).init().items()}


class OneNode:
    """A node with all twelve tasks, and a server that asks what it likes."""

    def __init__(self, run: RunConfig | None = None, **settings: Any) -> None:
        node = {key.replace("_", "-"): value for key, value in settings.items()}
        self.grid = LoopbackGrid(1, (run or config()).flat(), node_configs={0: node})

    def ask(self, records: RecordDict, kind: str) -> str:
        """Why it refuses; "" if it does not."""
        reply = self.grid.answer(Message(records, 100, kind))
        assert reply is not None
        assert not reply.has_error(), reply.error
        return error_reason(reply.content) or ""

    def train(self, *tasks: str, lineage: str = "one") -> str:
        return self.ask(TrainRequest(meta(), 1, 0, list(tasks), lineage).to_records(), TRAIN)

    def score(
        self,
        *tasks: str,
        number: int = 2,
        lrs: tuple[float, ...] = (0.1, 0.3),
        steps: int = 2,
        shots: int = 0,
        change: float = 0.0,
        lineage: str = "one",
        seen: bool = False,
        told: dict[str, Any] | None = None,
    ) -> str:
        request = EvaluateRequest(meta(change), list(lrs), steps, list(tasks), shots, number, lineage, seen=seen)
        records = request.to_records()
        tell_settings(records, told or {})
        return self.ask(records, EVALUATE)

    def score_seen(self, *tasks: str, **changes: Any) -> str:
        return self.score(*tasks, **{"lrs": (0.1,), "seen": True, **changes})


A, B, C = "client-000", "client-001", "client-002"


# ---- either trained or scored


@pytest.mark.parametrize("run", [config(), config(**SECURE)], ids=["plain", "secure"])
def test_a_task_that_trains_is_never_scored(run: RunConfig) -> None:
    node = OneNode(run)
    # Refused or not, once it was asked to train the task is a training task.
    assert ("no meta-gradient is sent unmasked" in node.train(A, B)) == run.secure_aggregation
    trained = OneNode()
    assert trained.train(A, B) == ""
    for lineage in ("one", "another", ""):
        words = f"this node trains on the task '{B}' in this run, so it gives no scores of it, which would tell its gradient"
        assert trained.score(C, B, lineage=lineage) == words
    assert trained.score(C) == ""


def test_of_training_tasks_one_model_is_scored_once_at_one_rate() -> None:
    node = OneNode()
    assert node.train(A, B) == ""
    assert "it gives no scores of it" in node.score(A)
    others: list[dict[str, Any]] = [{"lrs": (0.1, 0.3)}, {"lrs": (0.2,)}, {"shots": 1}]
    for changes in others:
        assert "at other rates or shots" in node.score_seen(A, **changes)
    assert "at other steps" in node.score_seen(A, steps=1)
    assert node.score_seen(A) == ""
    assert node.score_seen(A, B) == ""  # again, as after a message that was lost
    another = "this node has scored tasks that it trains on by another model, and does so by one in a run"
    models: list[dict[str, Any]] = [{"change": 1e-3}, {"lrs": (0.3,)}]
    for changes in models:
        assert node.score_seen(A, **changes) == another
        assert node.score_seen(B, lineage="two", **changes) == another


def test_a_task_that_is_scored_as_a_seen_user_and_never_trained_does_not_train_afterwards() -> None:
    node = OneNode()
    assert node.score_seen(A) == ""
    assert "does not train on it" in node.train(A)


@pytest.mark.parametrize(
    ("run", "node"),
    [(config(**SECURE), {}), (config(evaluate_users="unseen"), {}), (config(), {"least_in_sum": 3})],
    ids=["secure", "unseen", "least in sum"],
)
def test_a_node_scores_no_training_task_where_the_run_or_the_node_itself_does_not_let_it(
    run: RunConfig, node: dict[str, Any]
) -> None:
    one = OneNode(run, **node)
    one.train(A)
    for task in (A, B):
        said = one.score_seen(task)
        assert said == "this node gives no scores of tasks that train in this run, which would tell their gradients"


def test_a_server_that_tells_other_settings_gets_no_score_of_what_trained_in_sums(tmp_path: Path) -> None:
    """Not in the same run, and with a `state-dir` not in a later one of the same training."""
    told = {"secure-aggregation": False, "evaluate-users": "both"}
    kept: dict[str, Any] = {"state_dir": str(tmp_path)}
    one = OneNode(config(**SECURE), **kept)
    context = one.grid._contexts[100]
    Asked(node_of(context), context.state, "one").to_train([A])  # as the step `masked` does
    assert "it gives no scores of it" in one.score_seen(A, told=told)
    assert "it gives no scores of it" in OneNode(**kept).score_seen(A)
    assert OneNode(**kept).score_seen(A, lineage="two") == ""


def test_finite_differences_of_a_training_task_are_not_to_be_had() -> None:
    """What the fault was: losses at theta + h and theta - h, from a node that sends its gradients in sums alone."""
    node = OneNode(config(**SECURE), least_in_sum=3)
    context = node.grid._contexts[100]
    Asked(node_of(context), context.state, "one").to_train([A, B])  # as the step `masked` does before it computes anything
    for h in (1e-3, -1e-3):
        assert "it gives no scores of it" in node.score(A, change=h)
    # Of a held-out task one model in a round is scored, so there is no difference to take.
    assert node.score(C, change=1e-3) == ""
    assert node.score(C, change=-1e-3) == "this node has scored another model in round 2"


def test_a_task_that_was_scored_does_not_train() -> None:
    node = OneNode()
    assert node.score(A) == ""
    assert node.train(B) == ""
    assert node.train(B, A) == f"this node was asked for scores of the task '{A}' in this run, so it does not train on it"
    assert node.score(A) == ""
    # What was refused is remembered of neither.
    assert node.train(B) == ""


def test_the_masked_step_of_a_secure_sum_remembers_and_refuses_as_well(tmp_path: Path) -> None:
    seen: list[str] = []

    def curious(message: Message, answer: Any) -> Message | None:
        """The server asks for scores of the training tasks right after they were trained on."""
        reply: Message = answer(message)
        if message.metadata.message_type == "train.masked":
            request = TrainRequest.from_records(message.content)
            evaluation = EvaluateRequest(request.meta, [0.1], 2, request.task_ids, 0, 2, request.lineage).to_records()
            seen.append(str(error_reason(answer(Message(evaluation, 101, EVALUATE)).content)))
        return reply

    run = parse_run_config({**FLAT, **SECURE, "rounds": 2, "output-dir": str(tmp_path)})
    summary = run_federation(LoopbackGrid(3, run.flat(), {1: curious}), run)
    assert summary["failures"] == 0
    assert len(seen) == 2
    assert all("it gives no scores of it" in reason for reason in seen)


def test_with_a_state_dir_it_lasts_as_long_as_the_training(tmp_path: Path) -> None:
    assert OneNode(state_dir=str(tmp_path)).train(A) == ""
    # Another process and another run of Flower, as after `--resume`.
    again = OneNode(state_dir=str(tmp_path))
    assert "it gives no scores of it" in again.score(A)
    assert again.score(B) == ""
    assert "does not train on it" in OneNode(state_dir=str(tmp_path)).train(B)
    # Another training may hold out other tasks.
    assert OneNode(state_dir=str(tmp_path)).score(A, lineage="two") == ""
    assert OneNode().score(A) == ""


def test_a_memory_that_cannot_be_read_is_not_taken_for_none(tmp_path: Path) -> None:
    assert OneNode(state_dir=str(tmp_path)).train(A) == ""
    for text in ("", "{}", '{"trained": 3, "scored": []}', "[]"):
        (tmp_path / "one" / "asked.json").write_text(text)
        reason = OneNode(state_dir=str(tmp_path)).score(A)
        assert "cannot be read" in reason
        assert "remove it to begin anew" in reason
    (tmp_path / "one" / "asked.json").unlink()
    assert OneNode(state_dir=str(tmp_path)).score(A) == ""
    (tmp_path / "file").touch()
    assert "`state-dir` must be a directory that can be written" in OneNode(state_dir=str(tmp_path / "file")).train(A)


# ---- the schedule


STRICT = [(config(**SECURE), {}), (config(), {"least_in_sum": 3})]


@pytest.mark.parametrize(("run", "settings"), STRICT, ids=["secure-aggregation", "least-in-sum"])
@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"number": 0}, "scores are asked for in round 0, and this run has none then"),
        ({"number": 7}, "in round 7, and this run has none then"),
        ({"lrs": (0.1, 0.2)}, "at other rates or steps"),
        ({"lrs": (0.1, 1e-9)}, "at other rates or steps"),
        ({"steps": 3}, "at other rates or steps"),
        ({"steps": 0}, "at other rates or steps"),
        ({"shots": 3}, "with 3 shots, which are not in `test-shots`"),
    ],
)
def test_scores_off_the_schedule_are_refused(
    run: RunConfig, settings: dict[str, Any], asked: dict[str, Any], words: str
) -> None:
    assert words in OneNode(run, **settings).score(A, **asked)
    node = OneNode(run, **settings)
    for number in (2, 4, 6):
        assert node.score(A, number=number, lrs=(0.1,), change=number) == ""
        assert node.score(B, number=number, shots=1, change=number) == ""
    assert words in node.score(A, **asked) or asked.get("number") == 0


def test_without_sums_there_is_no_schedule() -> None:
    node = OneNode()
    assert node.score(A, number=5, lrs=(0.7,), steps=9, change=1.0) == ""
    assert node.score(A, number=5, lrs=(0.7,), steps=9, change=2.0) == ""


def test_in_a_round_one_model_is_scored_and_again_with_the_same_answer() -> None:
    node = OneNode(config(**SECURE))
    assert node.score(A) == ""
    assert node.score(B, A, shots=2, lrs=(0.3,)) == ""  # others with few examples, or one that was away
    for change in (1e-6, -1.0):
        assert node.score(B, change=change) == "this node has scored another model in round 2"
    assert node.score(B, change=1e-6, number=4) == ""
    assert node.score(B) == ""


def test_a_training_may_end_early_once() -> None:
    # A budget of privacy ends it after round 3: the server alone knows.
    node = OneNode(config(**SECURE))
    assert node.score(A) == ""
    assert node.score(A, number=3, change=1.0) == ""
    for number, words in ((5, "round 5"), (4, "round 4"), (6, "round 6"), (1, "round 1")):
        assert f"{words}, and this run has none then" in node.score(A, number=number, change=2.0)
    assert node.score(A, number=3, change=1.0, shots=1) == ""
    assert node.score(A, number=2) == ""


def test_more_steps_end_the_training_and_are_those_that_the_run_may_grow_to() -> None:
    grows = config(adapt_steps=0, **SECURE)
    node = OneNode(grows)
    assert node.score(A, steps=10) == ""
    assert "at other rates or steps" in node.score(A, steps=30, number=6)
    assert node.score(A, steps=20, number=4, change=1.0) == ""
    assert node.score(A, steps=40, number=4, change=1.0) == ""
    assert node.score(A, steps=80, number=4, change=2.0) == "this node has scored another model in round 4"
    for steps in (10, 20):  # nor can the schedule go on afterwards
        assert "round 6, and this run has none then" in node.score(A, steps=steps, number=6, change=3.0)
    assert "at other rates or steps" in OneNode(config(adapt_steps=10, **SECURE)).score(A, steps=20, number=6)


def test_a_run_that_keeps_its_best_model_has_the_initial_one_scored_as_well() -> None:
    node = OneNode(config(keep="best", **SECURE))
    assert node.score(A, number=0) == ""
    assert node.score(A, number=0, change=1.0) == "this node has scored another model in round 0"
    assert node.score(A, number=2, change=1.0) == ""
    assert "round 0, and this run has none then" in OneNode(config(keep="last", **SECURE)).score(A, number=0)


def test_after_training_one_of_the_scored_models_may_be_scored_with_more_steps() -> None:
    node = OneNode(config(adapt_steps=0, keep="best", **SECURE))
    for number in (0, 2, 4):
        assert node.score(A, number=number, steps=10, change=number) == ""
    assert node.score(A, number=6, steps=10, change=6) == ""
    assert node.score(A, number=6, steps=20, change=6) == ""
    assert node.score(A, number=2, steps=20, change=3) == "this node has scored another model in round 2"
    assert node.score(A, number=2, steps=20, change=2) == ""
    assert node.score(A, number=2, steps=40, change=2) == ""
    assert "round 4, and this run has none then" in node.score(A, number=4, steps=20, change=4)
    assert "round 3, and this run has none then" in node.score(A, number=3, steps=20, change=2)
    # The last one is kept all the same, and test tasks are scored as always.
    assert node.score(B, number=6, steps=40, change=6) == ""
    last = OneNode(config(adapt_steps=0, keep="last", **SECURE))
    for number in (2, 6):
        assert last.score(A, number=number, steps=10, change=number) == ""
    assert "round 2, and this run has none then" in last.score(A, number=2, steps=20, change=2)


@pytest.mark.parametrize("run", [config(), config(**SECURE)], ids=["plain", "secure"])
def test_a_task_cannot_be_given_another_name_on_the_way(tmp_path: Path, run: RunConfig) -> None:
    """Rows of a ward that trains are those of a year, too: a server that tells another task column would score them."""
    rng = np.random.default_rng(0)
    rows = [
        f"{'AB'[i % 2]},{2020 + i // 2 % 3},{x:.3f},{'ill' if x > 0 else 'well'}" for i, x in enumerate(rng.normal(size=120))
    ]
    (tmp_path / "w.csv").write_text("\n".join(["ward,year,marker,outcome", *rows]))
    settings = {"dataset": "own", "own.path": str(tmp_path / "w.csv"), "own.target-column": "outcome", "model": "linear"}
    own = parse_run_config({**run.flat(), **settings, "own.task-column": "ward"}).resolved()
    grid = LoopbackGrid(1, own.flat())

    def ask(records: RecordDict, kind: str, **told: str) -> str:
        tell_settings(records, told)
        reply = grid.answer(Message(records, 100, kind))
        assert reply is not None
        assert not reply.has_error(), reply.error
        return error_reason(reply.content) or ""

    def model(**told: str) -> Params:
        node = node_of(grid._contexts[100], told)
        return build_algorithm(node.run, node.dataset.spec).init()

    ask(TrainRequest(model(), 1, 0, ["A"], "one").to_records(), MASKED if run.secure_aggregation else TRAIN)
    context = grid._contexts[100]
    Asked(node_of(context), context.state, "one").to_train(["A"])
    told = {"own.task-column": "year", "own.features": "marker"}
    request = EvaluateRequest(model(**told), [0.1], 2, ["2020"], 0, 2, "one")
    assert "that say what its tasks are have changed" in ask(request.to_records(), EVALUATE, **told)
    assert ask(EvaluateRequest(model(), [0.1], 2, ["B"], 0, 2, "one").to_records(), EVALUATE) == ""


@pytest.mark.parametrize("told", [{"partition-seed": 1}, {"users": 7}, {"test-share": 0.5}, {"partition": "shards:2"}])
def test_examples_cannot_be_dealt_anew_on_the_way(told: dict[str, Any]) -> None:
    """Images of a user that trains are those of others in another partition, which a server could have scored."""
    spread = {"dataset": "digits", "partition": "iid", "users": 6, "model": "linear"}
    run = parse_run_config({**config().flat(), **spread}).resolved()
    grid = LoopbackGrid(1, run.flat())
    spec = load_dataset("digits", run.table("digits"), Path()).spec
    start = build_algorithm(run, spec).init()

    def ask(records: RecordDict, kind: str) -> str:
        reply = grid.answer(Message(records, 100, kind))
        assert reply is not None
        assert not reply.has_error(), reply.error
        return error_reason(reply.content) or ""

    assert ask(TrainRequest(start, 1, 0, ["user-00"], "one").to_records(), TRAIN) == ""
    request = EvaluateRequest(start, [0.1], 2, ["user-01"], 0, 2, "one")
    records = request.to_records()
    tell_settings(records, told)
    assert "that say what its tasks are have changed" in ask(records, EVALUATE)
    assert ask(request.to_records(), EVALUATE) == ""


def test_the_schedule_cannot_be_changed_on_the_way() -> None:
    node = OneNode(config(**SECURE))
    assert node.score(A) == ""
    node.grid._contexts[100].run_config["adapt-lrs"] = "0.1,0.3,0.5"
    assert "have changed since the first ones" in node.score(A, lrs=(0.5,))


# ---- honest runs


@pytest.mark.parametrize("more", [{}, SECURE], ids=["plain", "secure"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"on-too-few": "repeat", "min-replies": 0.5},
        {"algorithm": "reptile", "evaluate-every": 4},
        {"evaluate-every": 0},
        {"test-tasks": 0.0},
        {"rounds": 5},
        {"privacy.noise-multiplier": 1.0, "privacy.clip": 1.0, "privacy.epsilon": 60.0, "privacy.delta": 0.01},
    ],
    ids=["plain", "repeat", "reptile", "never", "no test", "odd", "budget"],
)
def test_an_honest_run_is_never_refused(tmp_path: Path, settings: dict[str, Any], more: dict[str, Any]) -> None:
    if "privacy.epsilon" in settings:
        pytest.importorskip("dp_accounting")
        # So that training ends after round 5 of 6, which no schedule knows.
        from quickbloom.server_app.federation.private.privacy import epsilon

        settings = {**settings, "privacy.epsilon": epsilon(1.0, 1.0, 5, 0.01) + 0.01}
        settings |= {"min-replies": 0.0}
    run = parse_run_config({**FLAT, **settings, **more, "output-dir": str(tmp_path / "run")})
    nodes = {i: {"state-dir": str(tmp_path / f"node{i}"), "least-in-sum": 2 if more else 0} for i in range(3)}
    summary = run_federation(LoopbackGrid(3, run.flat(), node_configs=nodes), run)
    assert summary["failures"] == 0, [record["failures"] for record in read_history(tmp_path / "run")]
    if "privacy.epsilon" in settings:
        assert summary["rounds"] == 5
    assert (summary["test"] is None) == (settings.get("test-tasks") == 0.0)


@pytest.mark.parametrize("more", [{}, SECURE], ids=["plain", "secure"])
def test_a_run_that_is_gone_on_with_is_never_refused(tmp_path: Path, more: dict[str, Any]) -> None:
    nodes = {i: {"state-dir": str(tmp_path / f"node{i}")} for i in range(3)}
    first = parse_run_config({**FLAT, **more, "output-dir": str(tmp_path / "run")}).resolved()
    run_federation(LoopbackGrid(3, first.flat(), node_configs=nodes), first)
    checkpoint = tmp_path / "run" / "checkpoints" / "round-000004.safetensors"
    # With other rates, steps and rounds between evaluations, as a run may go on with.
    changes = {"adapt-lrs": "0.2", "adapt-steps": 3, "evaluate-every": 1, "resume-from": str(checkpoint)}
    again = parse_run_config({**FLAT, **more, **changes, "output-dir": str(tmp_path / "again")}).resolved()
    summary = run_federation(LoopbackGrid(3, again.flat(), node_configs=nodes), again)
    assert (summary["failures"], summary["resumed"]) == (0, 1)


@pytest.mark.parametrize("more", [{}, SECURE], ids=["plain", "secure"])
def test_a_node_whose_scores_were_late_is_asked_again_and_answers(tmp_path: Path, more: dict[str, Any]) -> None:
    lost: list[str] = []

    def late(message: Message, answer: Any) -> Message | None:
        reply: Message = answer(message)
        if message.metadata.message_type == EVALUATE and len(lost) < 1:
            lost.append(message.metadata.group_id)
            return None
        return reply

    settings = {"on-too-few": "repeat", "node-deadline": 5.0, "round-deadline": 0.5, "output-dir": str(tmp_path)}
    run = parse_run_config({**FLAT, **more, **settings})
    summary = run_federation(LoopbackGrid(3, run.flat(), dict.fromkeys(range(3), late)), run)
    assert lost == ["2"]
    reasons = [fail["reason"] for record in read_history(tmp_path) for fail in record["failures"]]
    assert reasons == ["it sent no reply within `round-deadline` (0.5 s)"]
    held_out = summary["tasks"]["validation"]
    assert [record["validation"]["tasks"] for record in read_history(tmp_path) if "validation" in record] == [held_out] * 3


def test_models_are_told_apart_by_every_bit() -> None:
    from quickbloom.client_app.asked import _digest

    one = {"w": torch.zeros(3), "s": torch.zeros(()), "n": torch.zeros(0)}
    assert _digest(one) == _digest(dict(reversed(one.items())))
    others = [{**one, "w": torch.tensor([0.0, -0.0, 0.0])}, {**one, "w": torch.zeros(1, 3)}, {**one, "w": torch.zeros(3).int()}]
    others += [{**one, "s": torch.tensor(1e-45)}, {**one, "v": torch.zeros(0)}]
    assert len({_digest(model) for model in [one, *others]}) == 6
