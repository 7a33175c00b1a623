"""Secure rounds: the same model as without masks, whoever drops out; nodes that lie or send nonsense cost their part alone."""

import os
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.error import Error
from hostile import ANYTHING, ERRORS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loopback import Fault, LoopbackGrid

from quickbloom.common.config.run import parse_run_config
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.errors import ConfigError, RunError
from quickbloom.common.maths.params import Params
from quickbloom.common.wire.messages import TRAIN, TrainReply, TrainRequest, WireError, error_reason, to_arrays
from quickbloom.common.wire.secure.messages import (
    KEYS,
    MASKED,
    REVEAL,
    SHARES,
    KeysReply,
    KeysRequest,
    MaskedReply,
    MaskedRequest,
    RevealRequest,
    SharesReply,
    SharesRequest,
)
from quickbloom.common.wire.secure.protocol import PublicKeys, SecureError, envelope_for
from quickbloom.common.wire.secure.updates import from_row, length, to_row
from quickbloom.server_app.federation.outer import OuterOptimizer
from quickbloom.server_app.federation.private.privacy import TaskPrivacy
from quickbloom.server_app.federation.private.secure_sum import check_totals, unfit
from quickbloom.server_app.federation.roll_call import call_roll
from quickbloom.server_app.federation.strategy import MetaStrategy

EXAMPLES = max(int(os.environ.get("QUICKBLOOM_FUZZ", "300")) // 10, 10)
STEPS = (KEYS, SHARES, MASKED, REVEAL)
SECURE: dict[str, Any] = {"secure_aggregation": True}
NODES = 7
SMALL: dict[str, Any] = {"dataset": "gaussian", "gaussian.clients": 21, "model": "linear", "algorithm": "fedavg", "rounds": 1}
SMALL |= {"min-nodes": 1, "adapt-steps": 2, "round-deadline": 0.5, "validation-tasks": 2, "test-tasks": 2}


class Run:
    """A strategy on a loopback grid: 7 nodes with 3 tasks each, of which 5 must stay by default."""

    def __init__(self, faults: Mapping[int, Fault] | None = None, nodes: int = NODES, **more: Any) -> None:
        flat = {**SMALL, **{key.replace("_", "-").replace("--", "."): value for key, value in more.items()}}
        self.config = parse_run_config(flat).resolved()
        self.grid = LoopbackGrid(nodes, self.config.flat(), faults)
        self.population = call_roll(LoopbackGrid(nodes, self.config.flat()), self.config)
        algorithm = build_algorithm(self.config, self.population.spec)
        outer = OuterOptimizer(algorithm.options, algorithm.init(), self.config.rounds)
        train = len(self.population.splits["train"])
        privacy = TaskPrivacy(self.config.privacy, train, self.config.tasks_in_round(train)) if self.config.privacy.on else None
        self.records: list[dict[str, Any]] = []
        self.strategy = MetaStrategy(
            self.config, self.population, algorithm, outer, self.records.append, privacy=privacy, lineage="one"
        )

    def start(self) -> "Run":
        meta = to_arrays(self.strategy.outer.meta)
        self.strategy.start(self.grid, meta, num_rounds=self.config.rounds, timeout=self.config.round_deadline)
        return self

    @property
    def meta(self) -> Params:
        return self.strategy.outer.meta


def silent(*kinds: str) -> Fault:
    """Never answers messages of these kinds."""
    return lambda message, answer: None if message.metadata.message_type in kinds else answer(message)


def says(kind: str, content: Callable[[RecordDict], RecordDict | Error]) -> Fault:
    """Answers messages of this kind with something made of the true answer."""

    def fault(message: Message, answer: Callable[[Message], Message]) -> Message:
        true = answer(message)
        return Message(content(true.content), reply_to=message) if message.metadata.message_type == kind else true

    return fault


def farthest(one: Params, other: Params) -> float:
    return max(float((value - other[name]).abs().max()) for name, value in one.items())


@cache
def plain(missing: frozenset[int] = frozenset()) -> Params:
    """The model after the same round without masks, in which these nodes send nothing."""
    return Run({node: silent(TRAIN) for node in missing}).start().meta


# ---- the same model


@pytest.mark.parametrize("gone", [[], [1], [1, 3]])
@pytest.mark.parametrize("step", STEPS)
def test_the_model_is_that_of_the_plain_round_whoever_drops_out(step: str, gone: list[int]) -> None:
    run = Run({node: silent(step) for node in gone}, **SECURE).start()
    # Whoever is silent only at the end has sent its part already.
    expected = plain(frozenset() if step == REVEAL else frozenset(gone))
    assert farthest(run.meta, expected) < 1e-6
    assert {failure["who"] for failure in run.records[0]["failures"]} == {f"node {100 + node}" for node in gone}
    hosted = sum(run.population.homes[task] - 100 not in gone for task in run.population.splits["train"])
    assert run.records[0]["train"]["tasks"] == (17 if step == REVEAL else hosted)


def test_the_sum_itself_is_exact_to_1e_4() -> None:
    secure, open_ = Run(**SECURE, rounds=3), Run(rounds=3)
    for run in (secure, open_):
        run.start()
    assert farthest(secure.meta, open_.meta) < 1e-6
    for one, other in zip(secure.records, open_.records, strict=True):
        weight = 17 * 32  # of all tasks, and more
        assert abs(one["train"]["loss"] - other["train"]["loss"]) * weight < 1e-4


@pytest.mark.parametrize("algorithm", ["maml", "heads", "local", "metasgd", "scaffold", "feddyn", "fedproto", "fedpac"])
def test_algorithms_with_state_or_without_a_gradient_work_alike(algorithm: str) -> None:
    runs = [Run(algorithm=algorithm, rounds=2, mlp__hidden="8", model="mlp", **more).start() for more in ({}, SECURE)]
    losses = [[record["train"]["loss"] for record in run.records] for run in runs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert not runs[0].meta or farthest(runs[0].meta, runs[1].meta) < 1e-5


def test_with_privacy_the_noise_is_the_same_and_nodes_without_a_task_take_part() -> None:
    private: dict[str, Any] = {
        "privacy__noise_multiplier": 0.5,
        "privacy__clip": 1.0,
        "privacy__noise_seed": 3,
        "tasks_per_round": 3,
    }
    runs = [Run(rounds=3, **private, **more).start() for more in ({}, SECURE)]
    assert farthest(runs[0].meta, runs[1].meta) < 1e-5
    assert [record["train"]["tasks"] for record in runs[0].records] == [record["train"]["tasks"] for record in runs[1].records]
    asked = [message.metadata.dst_node_id for message in runs[1].grid.requests if message.metadata.message_type == MASKED]
    assert sorted(asked) == sorted([*range(100, 107)] * 3)


# ---- what the server sees


def test_the_server_sees_masked_numbers_alone_and_fresh_keys_in_every_round() -> None:
    seen: dict[str, list[RecordDict]] = {kind: [] for kind in STEPS}

    def watch(message: Message, answer: Callable[[Message], Message]) -> Message:
        reply = answer(message)
        seen.get(message.metadata.message_type, []).append(reply.content)
        return reply

    run = Run(dict.fromkeys(range(NODES), watch), **SECURE, rounds=3, fedavg__outer_lr=1e-9).start()
    keys = [key for records in seen[KEYS] for key in vars(KeysReply.from_records(records).keys).values()]
    assert len(set(keys)) == len(keys) == 2 * NODES * 3
    # With such an outer rate the model stays, so the plain updates of two rounds are alike; the masked ones are not.
    for records in seen[MASKED]:
        assert set(records) == {"masked"}
    sent = np.array([MaskedReply.from_records(records, length(run.meta)).masked for records in seen[MASKED]])
    assert len(np.unique(sent)) == sent.size
    assert abs(sent.astype(np.float64).mean() / 2.0**64 - 0.5) < 5 * np.sqrt(1 / 12 / sent.size)
    assert not any(message.metadata.message_type == "train" for message in run.grid.requests)


def test_after_a_round_no_node_knows_anything_of_it() -> None:
    run = Run(**SECURE).start()
    # But for which tasks it trains on: of these it gives no scores.
    assert [list(context.state) for context in run.grid._contexts.values()] == [["asked"]] * NODES


# ---- a server that lies, to real nodes


class LyingServer:
    """Drives three real nodes step by step, as it likes."""

    def __init__(self, node_configs: Mapping[int, Mapping[str, Any]] | None = None) -> None:
        run = Run(nodes=3, **SECURE)
        self.grid = LoopbackGrid(3, run.config.flat(), node_configs=node_configs)
        self.meta = run.meta
        self.tasks = {node: [t for t, home in run.population.homes.items() if home == node][:1] for node in (100, 101, 102)}
        self.session = os.urandom(16)

    def ask(self, node: int, kind: str, records: RecordDict) -> RecordDict:
        reply = self.grid.answer(Message(records, node, kind))
        assert reply is not None
        assert not reply.has_error(), reply.error
        return reply.content

    def train(self, node: int) -> TrainRequest:
        return TrainRequest(self.meta, 1, 0, self.tasks[node], "one")

    def until_shared(self) -> None:
        self.keys = {
            node: KeysReply.from_records(self.ask(node, KEYS, KeysRequest(self.session).to_records())).keys
            for node in self.tasks
        }
        request = SharesRequest(self.session, 2, list(self.keys.values())).to_records()
        self.shares = {node: SharesReply.from_records(self.ask(node, SHARES, request), 3).shares for node in self.tasks}

    def masked(self, node: int) -> RecordDict:
        at = list(self.keys).index(node)
        envelopes = {self.keys[owner].masking: envelope_for(made, at) for owner, made in self.shares.items()}
        return self.ask(node, MASKED, MaskedRequest(self.train(node), self.session, envelopes).to_records())

    def reveal(self, node: int, survivors: list[int], dropped: list[int]) -> RecordDict:
        names = [[self.keys[i].masking for i in part] for part in (survivors, dropped)]
        return self.ask(node, REVEAL, RevealRequest(self.session, *names).to_records())

    def known(self, node: int) -> list[str]:
        return [name for name in self.grid._contexts[node].state if name != "asked"]


def test_a_node_that_is_asked_for_both_shares_refuses_and_forgets() -> None:
    server = LyingServer()
    server.until_shared()
    for node in server.tasks:
        assert error_reason(server.masked(node)) is None
    assert "both shares of one node" in str(error_reason(server.reveal(100, [100, 101, 102], [102])))
    assert server.known(100) == []
    # The true question comes too late.
    assert "knows nothing of this session" in str(error_reason(server.reveal(100, [100, 101, 102], [])))
    assert error_reason(server.reveal(101, [100, 101, 102], [])) is None
    # First survived, then dropped out: the second story is not answered.
    assert "knows nothing" in str(error_reason(server.reveal(101, [100, 101], [102])))


def test_a_node_masks_once_and_takes_no_step_out_of_order() -> None:
    server = LyingServer()
    server.until_shared()
    assert error_reason(server.masked(100)) is None
    assert "after 'masked'" in str(error_reason(server.masked(100)))
    assert server.known(100) == []
    assert "after 'shared'" in str(error_reason(server.reveal(101, [100, 101, 102], [])))
    request = SharesRequest(server.session, 2, list(server.keys.values())).to_records()
    assert "after 'shared'" in str(error_reason(server.ask(102, SHARES, request)))
    assert server.known(102) == []


def test_another_session_finds_nothing() -> None:
    server = LyingServer()
    server.until_shared()
    server.session = os.urandom(16)
    assert "knows nothing of this session" in str(error_reason(server.masked(100)))
    assert server.known(100) == []


def test_a_secure_run_sends_no_plain_meta_gradient_even_if_asked() -> None:
    server = LyingServer()
    reply = server.ask(100, TRAIN, server.train(100).to_records())
    assert error_reason(reply) == "this run has `secure-aggregation`, so no meta-gradient is sent unmasked"


def test_a_node_may_insist_on_secure_sums_of_many() -> None:
    insists = {1: {"least-in-sum": 3}}
    server = LyingServer(insists)
    with pytest.raises(WireError, match="unexpected field `error`"):
        server.until_shared()  # two of three would do for this server
    assert (server.known(100), server.known(101)) == (["secure"], [])
    run = Run(nodes=3)
    grid = LoopbackGrid(3, run.config.flat(), node_configs=insists)
    request = TrainRequest(run.meta, 1, 0, server.tasks[101], "one").to_records()
    (reply,) = grid.send_and_receive([Message(request, 101, TRAIN)])
    assert "`least-in-sum` is 3, so this node takes part only in runs with `secure-aggregation" in str(
        error_reason(reply.content)
    )


# ---- nodes that lie


def replaced(field: str, change: Callable[[list[Any]], list[Any]]) -> Callable[[RecordDict], RecordDict]:
    def content(true: RecordDict) -> RecordDict:
        fields: dict[str, Any] = dict(true.config_records["secure"])
        return RecordDict({"secure": ConfigRecord({**fields, field: change(fields[field])})})

    return content


def flipped(values: list[bytes]) -> list[bytes]:
    return [bytes(255 - byte for byte in value) for value in values]


def test_a_wrong_share_costs_that_node_and_the_sum_comes_from_the_others() -> None:
    run = Run({1: says(REVEAL, replaced("shares", flipped))}, **SECURE).start()
    assert farthest(run.meta, plain()) < 1e-6
    (failure,) = run.records[0]["failures"]
    assert failure["who"] == "node 101"
    assert "is not the one that was entrusted to it" in failure["reason"]


@pytest.mark.parametrize("field", ["sealed", "own_digests", "own_digest"])
def test_a_node_whose_secrets_cannot_be_restored_is_named_and_after_three_rounds_left_out(field: str) -> None:
    run = Run({1: says(SHARES, replaced(field, flipped))}, **SECURE, rounds=5, on_too_few="skip").start()
    blamed = [{failure["who"] for failure in record["failures"]} for record in run.records]
    skipped = ["skipped" in record for record in run.records]
    assert skipped == [True] * 3 + [False] * 2
    assert blamed == [{"node 101"}] * 3 + [set()] * 2


def test_keys_that_would_break_all_others_are_not_handed_on() -> None:
    run = Run({1: says(KEYS, replaced("keys", lambda keys: [bytes(32), keys[1]]))}, **SECURE).start()
    assert farthest(run.meta, plain(frozenset([1]))) < 1e-6
    (failure,) = run.records[0]["failures"]
    assert "its keys cannot be used" in failure["reason"]


def spoilt(true: RecordDict) -> RecordDict:
    numbers = true.array_records["masked"]["sum"].numpy().copy()
    numbers[-4:] += 2**40
    return RecordDict({**true, "masked": to_arrays({"sum": torch.from_numpy(numbers)})})


@pytest.mark.parametrize("swap", [False, True])
def test_keys_of_another_node_are_not_handed_on(swap: bool) -> None:
    """A node that repeats another's keys, or one of them: all others would refuse such a sum, and the round would be lost."""
    seen: list[PublicKeys] = []

    def first(message: Message, answer: Callable[[Message], Message]) -> Message:
        reply = answer(message)
        if message.metadata.message_type == KEYS:
            seen.append(KeysReply.from_records(reply.content).keys)
        return reply

    def copied(records: RecordDict) -> RecordDict:
        own = KeysReply.from_records(records).keys
        return KeysReply(PublicKeys(seen[-1].masking, own.masking) if swap else seen[-1]).to_records()

    run = Run({0: first, 2: says(KEYS, copied)}, **SECURE).start()
    (failure,) = run.records[0]["failures"]
    assert failure["who"] == "node 102"
    assert "are those of another node" in failure["reason"]
    assert farthest(run.meta, plain(frozenset({2}))) < 1e-5


def test_a_sum_that_no_honest_nodes_can_have_is_not_used() -> None:
    run = Run({1: says(MASKED, spoilt)}, **SECURE, on_too_few="skip").start()
    assert "cannot be right, and it does not tell who is to blame" in run.records[0]["skipped"]
    assert farthest(run.meta, Run().meta) == 0.0


LIKE: Params = {"w": torch.zeros(2)}


@pytest.mark.parametrize(
    ("row", "right"),
    [
        ([3.0, 0.0, 2.0, 1.5, 2.0, 1.0], True),
        ([3.0, 0.0, 2.0, 1.5, 3.0, 1.0], False),  # more tasks than asked for
        ([3.0, 0.0, 0.0, 1.5, 2.0, 0.0], False),  # tasks without weight
        ([3.0, 0.0, -2.0, 1.5, 2.0, 0.0], False),
        ([3.0, 0.0, 9.0, 1.5, 2.0, 0.0], False),
        ([3.0, 0.0, 2.0, -1.5, 2.0, 0.0], False),
        ([3.0, 0.0, 2.0, 1.5, 2.0, 3.0], False),
        ([30.0, 0.0, 2.0, 1.5, 2.0, 1.0], False),  # norm 15
        ([0.0, 0.0, 0.0, 0.0, 0.0, 0.0], True),
    ],
)
def test_sums_are_checked(row: list[float], right: bool) -> None:
    assert (check_totals(from_row(np.array(row), LIKE), 2, 4.0, 10.0) is None) == right


CUT = st.sampled_from([-1, 1, 5])
BYTES = st.lists(st.binary(max_size=70), max_size=9)


def changes(kind: str) -> st.SearchStrategy[Callable[[RecordDict], RecordDict | Error]]:
    """Replies in which one field is wrong."""
    fields = {
        KEYS: ["keys"],
        SHARES: ["sealed", "own_digests", "masking_digests", "own_digest"],
        REVEAL: ["shares"],
        MASKED: [],
    }
    wrong = st.one_of(
        CUT.map(lambda n: lambda values: values[:n] if n < 0 else values + values[:n]),
        BYTES.map(lambda other: lambda values: other),
        st.binary(min_size=1, max_size=40).map(lambda other: lambda values: [other + values[0], *values[1:]]),
    )
    lists = [st.builds(replaced, st.just(field), wrong) for field in fields[kind]]
    anything: list[st.SearchStrategy[Any]] = [ANYTHING, ERRORS]
    return st.one_of(*lists, *lists, *(made.map(lambda content: lambda true: content) for made in anything))


@pytest.mark.parametrize("kind", STEPS)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(data=st.data())
def test_no_hostile_reply_in_any_step_raises_or_costs_more_than_its_node(kind: str, data: st.DataObject) -> None:
    run = Run({1: says(kind, data.draw(changes(kind)))}, **SECURE).start()
    expected = plain(frozenset() if kind == REVEAL else frozenset([1]))
    assert farthest(run.meta, expected) < 1e-6
    assert [failure["who"] for failure in run.records[0]["failures"]] == ["node 101"]


# ---- too few, and what cannot go together


@pytest.mark.parametrize(
    ("step", "gone", "few"),
    [
        (KEYS, [0, 1, 3, 4, 5], "2 of 7 nodes are left for a secure sum that needs 3"),
        (SHARES, [0, 1, 3], "4 of 7 nodes are left for a secure sum that needs 5"),
        (MASKED, [0, 1, 3], "4 of 7 nodes are left for a secure sum that needs 5"),
        (REVEAL, [0, 1, 3], "4 of 7 nodes are left for a secure sum that needs 5"),
    ],
)
def test_below_the_threshold_the_round_follows_on_too_few(step: str, gone: list[int], few: str) -> None:
    faults = {node: silent(step) for node in gone}
    run = Run(faults, **SECURE, on_too_few="skip").start()
    assert few in run.records[0]["skipped"]
    assert farthest(run.meta, Run().meta) == 0.0
    with pytest.raises(RunError, match=f"round 1: {few}"):
        Run(faults, **SECURE, on_too_few="stop").start()


def test_a_repeated_round_waits_until_there_are_enough_nodes_for_a_sum() -> None:
    run = Run(nodes=3, **SECURE, on_too_few="repeat", node_deadline=30.0)
    everybody, looks = run.grid.node_ids, 0

    def connected() -> list[int]:
        nonlocal looks
        looks += 1
        return everybody[:2] if looks < 3 else everybody

    run.grid.get_node_ids = connected  # type: ignore[method-assign]
    run.start()
    assert looks >= 3
    assert run.records[0]["train"]["tasks"] == 17
    assert run.records[0]["failures"] == []


def test_a_lost_round_is_repeated_with_new_keys() -> None:
    lost: list[int] = []

    def once(message: Message, answer: Callable[[Message], Message]) -> Message | None:
        if message.metadata.message_type == MASKED and len(lost) < 3:
            lost.append(message.metadata.dst_node_id)
            return Message(Error(code=0, reason="out of memory"), reply_to=message)
        return answer(message)

    run = Run(dict.fromkeys((0, 1, 3), once), **SECURE, on_too_few="repeat").start()
    assert lost == [100, 101, 103]
    assert farthest(run.meta, plain()) < 1e-6
    sessions = {
        bytes(KeysRequest.from_records(m.content).session) for m in run.grid.requests if m.metadata.message_type == KEYS
    }
    assert len(sessions) == 2


@pytest.mark.parametrize(
    ("setting", "value", "why"),
    [
        ("aggregate", "median", "compares the updates of single nodes"),
        ("max-update-norm", 3.0, "cannot see the norm of a masked update"),
        ("update-dtype", "int8", "leaves nothing to save"),
        ("update-dtype", "top-k", "leaves nothing to save"),
        ("over-select", 1.5, "is a drop-out"),
    ],
)
def test_what_needs_single_updates_is_refused_with_the_reason(setting: str, value: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=rf"`{setting}` must be .* with `secure-aggregation`, because .*{why}.*got"):
        parse_run_config({**SMALL, "secure-aggregation": True, setting: value})


def test_too_few_nodes_are_refused_before_training() -> None:
    with pytest.raises(
        ConfigError, match=r"`secure-aggregation` cannot work in round 1: it has 2 nodes, and a secure sum needs 3"
    ):
        Run(nodes=2, **SECURE)
    with pytest.raises(ConfigError, match=r"it has 1 node, .* let more tasks take part"):
        Run(**SECURE, tasks_per_round=1)


def test_more_nodes_than_a_sum_can_hold_are_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unfit(4096) is None
    monkeypatch.setattr("quickbloom.server_app.federation.private.secure_sum.MOST_NODES", 5)
    with pytest.raises(
        ConfigError,
        match=r"`secure-aggregation` cannot work in round 1: it has 7 nodes, and a secure sum takes at most 5; .* fewer tasks",
    ):
        Run(**SECURE)
    Run(**SECURE, tasks_per_round=4)  # on five nodes at most
    Run()


def test_a_weight_that_would_be_clipped_is_refused() -> None:
    like = {"w": torch.ones(2)}
    assert from_row(to_row(like, 2.0**20, [1.0], 0.0), like).weight == 2.0**20
    with pytest.raises(SecureError, match="weigh 1048577 together, and in a secure sum a node can have at most 1048576"):
        to_row(like, 2.0**20 + 1, [1.0], 0.0)


def test_a_row_is_as_long_as_the_model_and_four_counts() -> None:
    meta = Run().meta
    reply = TrainReply(meta, 1.0, [0.5])
    assert len(to_row(reply.gradient, reply.weight, reply.losses, reply.within)) == length(meta)
