"""Messages: what is written is read back, and whatever else comes is a WireError."""

import io
import pickle
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st

from quickbloom.common.datasets.base import DataSpec, TaskInfo
from quickbloom.common.maths.params import Params
from quickbloom.common.printable import as_told, flaw_of
from quickbloom.common.wire.messages import (
    EvaluateReply,
    EvaluateRequest,
    KeepReply,
    KeepRequest,
    TrainReply,
    TrainRequest,
    WireError,
    error_reason,
    error_records,
    from_arrays,
    payload_bytes,
    to_arrays,
)
from quickbloom.common.wire.roll_call import PROTOCOL, RollCallReply

# A deadline per example would fail on a busy machine.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

DTYPES = (torch.float32, torch.float64, torch.int64, torch.bool, torch.float16)
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
WORDS = NAMES.filter(lambda name: flaw_of(name) is None)
"""What may be the name of a task."""
FINITE = st.floats(allow_nan=False, allow_infinity=False)
COUNT = st.integers(0, 10**9)
SPECS = st.builds(
    DataSpec,
    kind=st.sampled_from(["classification", "regression"]),
    input_shape=st.lists(st.integers(1, 99), max_size=4).map(tuple),
    outputs=st.integers(1, 99),
    tokens=st.integers(0, 99),
)
SPLIT = st.sampled_from(["", "train", "validation", "test"])
TASKS = st.lists(
    st.builds(TaskInfo, WORDS, COUNT, COUNT, COUNT, st.just("") | WORDS, SPLIT), max_size=4, unique_by=lambda t: t.task_id
)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    values = np.random.default_rng(draw(st.integers(0, 9))).normal(size=shape) * 5
    return torch.as_tensor(values).to(draw(st.sampled_from(DTYPES)))


PARAMS = st.dictionaries(NAMES, tensors(), max_size=4)


def sent(records: RecordDict) -> RecordDict:
    """Through Flower's own bytes and back, as over the network."""
    return recorddict_from_proto(
        type(recorddict_to_proto(records)).FromString(recorddict_to_proto(records).SerializeToString())
    )


def same(one: Params, other: Params) -> bool:
    pairs = [(value, other[name]) for name, value in one.items()]
    return one.keys() == other.keys() and all(a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


@given(PARAMS)
def test_tensors_of_any_shape_and_dtype_come_back_as_copies(params: Params) -> None:
    record = sent(RecordDict({"x": to_arrays(params)})).array_records["x"]
    back = from_arrays(record)
    assert same(params, back)
    for value in back.values():
        value.zero_()
    assert same(params, from_arrays(record))


def test_a_tensor_that_needs_a_gradient_or_is_not_contiguous_can_be_sent() -> None:
    value = torch.arange(6.0).reshape(2, 3).T.requires_grad_()
    assert from_arrays(to_arrays({"w": value}))["w"].tolist() == [[0, 3], [1, 4], [2, 5]]


@given(SPECS, TASKS, st.dictionaries(WORDS, WORDS, max_size=3), st.dictionaries(WORDS, WORDS.map(as_told), max_size=3))
def test_roll_call_comes_back(
    spec: DataSpec, tasks: list[TaskInfo], versions: dict[str, str], left_out: dict[str, str]
) -> None:
    reply = RollCallReply(spec, tasks, versions, left_out=left_out)
    assert RollCallReply.from_records(sent(reply.to_records())) == reply


@given(PARAMS, COUNT, COUNT, st.lists(NAMES, max_size=4))
def test_train_request_comes_back(meta: Params, number: int, seed: int, task_ids: list[str]) -> None:
    back = TrainRequest.from_records(sent(TrainRequest(meta, number, seed, task_ids).to_records()))
    assert (back.round, back.seed, back.task_ids) == (number, seed, task_ids)
    assert same(back.meta, meta)


LOSSES = st.lists(st.floats(0, 3e38) | st.sampled_from([float("nan"), float("inf")]), max_size=4)


@given(PARAMS, st.floats(1e-9, 1e9), LOSSES, st.floats(0, 1))
def test_train_reply_comes_back(gradient: Params, weight: float, losses: list[float], share: float) -> None:
    weight = weight if np.isfinite(losses).any() else 0.0
    within = share * weight
    back = TrainReply.from_records(sent(TrainReply(gradient, weight, losses, within).to_records()), len(losses))
    assert (back.weight, back.within) == (weight, within)
    assert np.array_equal(back.losses, losses, equal_nan=True)
    assert same(back.gradient, gradient)


@given(PARAMS, st.lists(FINITE, max_size=3), COUNT, st.lists(NAMES, max_size=3), COUNT)
def test_evaluate_request_comes_back(meta: Params, lrs: list[float], steps: int, task_ids: list[str], shots: int) -> None:
    back = EvaluateRequest.from_records(sent(EvaluateRequest(meta, lrs, steps, task_ids, shots).to_records()))
    assert (back.lrs, back.steps, back.task_ids, back.shots) == (lrs, steps, task_ids, shots)
    assert same(back.meta, meta)


@given(st.integers(0, 3), st.integers(1, 3), st.integers(0, 3), st.integers(0, 9))
def test_evaluate_reply_comes_back(tasks: int, lrs: int, steps: int, seed: int) -> None:
    losses, metrics = np.random.default_rng(seed).exponential(size=(2, tasks, lrs, steps + 1))
    losses[losses > 1] = np.nan
    back = EvaluateReply.from_records(sent(EvaluateReply(losses, metrics).to_records()), tasks, lrs, steps)
    assert np.array_equal(back.losses, losses, equal_nan=True)
    assert np.array_equal(back.metrics, metrics)


META = {"w": torch.ones(2, 2), "b": torch.zeros(())}
MESSAGES: dict[str, tuple[Callable[[], RecordDict], Callable[[RecordDict], object]]] = {
    "roll call": (
        RollCallReply(DataSpec("regression", (3,), 1), [TaskInfo("a", 1, 2, 3)], {"flwr": "1"}).to_records,
        RollCallReply.from_records,
    ),
    "train request": (TrainRequest(META, 1, 2, ["a", "b"]).to_records, TrainRequest.from_records),
    "train reply": (TrainReply(META, 2.0, [0.1, 0.2], 0.5).to_records, lambda records: TrainReply.from_records(records, 2)),
    "evaluate request": (EvaluateRequest(META, [0.1], 3, ["a"]).to_records, EvaluateRequest.from_records),
    "evaluate reply": (
        EvaluateReply(np.ones((1, 2, 4)), np.ones((1, 2, 4))).to_records,
        lambda records: EvaluateReply.from_records(records, 1, 2, 3),
    ),
    "keep request": (KeepRequest(META, 0.1, 3, 7, "l", "/run").to_records, KeepRequest.from_records),
    "keep reply": (KeepReply(2).to_records, KeepReply.from_records),
}
VALUES = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.floats(), st.booleans(), st.text(max_size=4), st.binary(max_size=4),
    st.lists(st.integers(-5, 5), max_size=3), st.lists(st.floats(), max_size=3), st.lists(st.text(max_size=2), max_size=3),
    st.lists(st.booleans(), max_size=2), st.lists(st.binary(max_size=2), max_size=2),
)  # fmt: skip
BYTES = st.one_of(
    st.binary(max_size=40),
    st.binary(max_size=20).map(lambda tail: b"PK\x03\x04" + tail),
    st.binary(max_size=40).map(lambda tail: b"\x93NUMPY\x01\x00" + tail),
    st.text("{}[]()'\"descr:fortran_shape<f48,TrueFalse 019", max_size=60).map(
        lambda header: b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
    ),
)
ARRAYS = st.builds(
    Array, st.sampled_from(["float32", "object", "x"]), st.just((2,)), st.sampled_from(["numpy.ndarray", "x"]), BYTES
)
GARBAGE = st.one_of(
    st.dictionaries(NAMES, VALUES, max_size=3).map(lambda fields: ConfigRecord(cast(Any, fields))),
    st.dictionaries(NAMES, st.integers(0, 9) | st.lists(st.floats(), max_size=3), max_size=3).map(
        lambda f: MetricRecord(cast(Any, f))
    ),
    st.dictionaries(NAMES, ARRAYS, max_size=2).map(ArrayRecord),
)
RECORD_NAMES = st.sampled_from(["roll-call", "request", "metrics", "meta", "gradient", "error", "x"])


def read(kind: str, records: RecordDict) -> str | None:
    """What a WireError says; None if the message could be read. Any other exception goes through."""
    try:
        MESSAGES[kind][1](records)
    except WireError as error:
        return str(error)
    return None


@settings(max_examples=200)
@given(st.sampled_from(sorted(MESSAGES)), st.dictionaries(RECORD_NAMES, GARBAGE, max_size=3))
def test_garbage_is_refused_and_nothing_else_happens(kind: str, records: dict[str, Any]) -> None:
    assert read(kind, RecordDict(records)) is not None


@settings(max_examples=300)
@given(st.sampled_from(sorted(MESSAGES)), st.data())
def test_a_damaged_field_is_refused_or_harmless(kind: str, data: st.DataObject) -> None:
    records = MESSAGES[kind][0]()
    record: Any = records[data.draw(st.sampled_from(sorted(records)))]
    name = data.draw(st.sampled_from(sorted(record)))
    if isinstance(record, ArrayRecord):
        record[name] = data.draw(ARRAYS)
    elif isinstance(record, MetricRecord):
        record[name] = data.draw(
            st.integers(-9, 9) | st.floats() | st.lists(st.integers(), max_size=9) | st.lists(st.floats(), max_size=9)
        )
    else:
        record[name] = data.draw(VALUES)
    read(kind, records)


@pytest.mark.parametrize("kind", sorted(MESSAGES))
def test_every_record_and_every_field_is_needed(kind: str) -> None:
    for name in MESSAGES[kind][0]():
        records = MESSAGES[kind][0]()
        del records[name]
        assert f"'{name}' is missing" in str(read(kind, records))
        if not isinstance(MESSAGES[kind][0]()[name], ArrayRecord):
            for field in MESSAGES[kind][0]()[name]:
                records = MESSAGES[kind][0]()
                del records[name][field]
                assert f"'{field}' is missing" in str(read(kind, records))


@pytest.mark.parametrize(
    ("kind", "record", "field", "value", "words"),
    [
        ("roll call", "roll-call", "protocol", 99, f"it speaks protocol 99, this server speaks {PROTOCOL}"),
        ("roll call", "roll-call", "kind", "ranking", "`kind` must be classification or regression"),
        ("roll call", "roll-call", "outputs", 0, "`outputs` must be whole numbers of at least 1"),
        ("roll call", "roll-call", "tokens", True, "`tokens` must be whole numbers of at least 0, got [True]"),
        ("roll call", "roll-call", "input-shape", [0], "`input-shape` must be whole numbers of at least 1"),
        ("roll call", "roll-call", "splits", ["dev"], "`splits` must be empty or one of"),
        ("roll call", "roll-call", "num-test", [], "cannot be read"),
        ("roll call", "roll-call", "num-test", [-1], "`num-test` must be whole numbers of at least 0"),
        ("train request", "request", "round", 1.5, "`round and seed` must be whole numbers"),
        ("train request", "request", "task-ids", "ab", "`task-ids` must be a list of texts"),
        ("train reply", "metrics", "losses", [0.1], "`losses` must have 2 entries, got 1"),
        ("train reply", "metrics", "weight", -1.0, "`weight` must not be negative"),
        ("train reply", "metrics", "weight", float("nan"), "`weight and within` must be finite"),
        ("evaluate request", "request", "steps", -1, "`steps` must be whole numbers of at least 0"),
        ("evaluate request", "request", "shots", 1.5, "`shots` must be whole numbers of at least 0"),
        ("evaluate request", "request", "lrs", [float("inf")], "`lrs` must be finite"),
        ("roll call", "roll-call", "keeps", 1, "`keeps` must be true or false, got 1"),
        ("keep request", "request", "lr", "0.1", "`lr` must be numbers"),
        ("keep request", "request", "steps", -1, "`steps and round` must be whole numbers"),
        ("keep reply", "metrics", "kept", 0.5, "`kept` must be whole numbers"),
        ("evaluate reply", "metrics", "scores", [1.0] * 7, "`scores` must have 8 entries, got 7"),
    ],
)
def test_wrong_values_are_refused_in_words(kind: str, record: str, field: str, value: Any, words: str) -> None:
    records = MESSAGES[kind][0]()
    cast(Any, records[record])[field] = value
    assert words in str(read(kind, records))


def test_a_task_named_twice_is_refused() -> None:
    tasks = [TaskInfo("a", 1, 1, 1), TaskInfo("a", 2, 2, 2)]
    with pytest.raises(WireError, match="names a task twice"):
        RollCallReply.from_records(RollCallReply(DataSpec("regression", (3,), 1), tasks, {}).to_records())


def test_a_record_of_another_kind_is_refused() -> None:
    with pytest.raises(WireError, match="`meta` must be a ArrayRecord, got a ConfigRecord"):
        TrainRequest.from_records(RecordDict({"meta": ConfigRecord(), "request": MESSAGES["train request"][0]()["request"]}))


def npy(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


class Bomb:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return pytest.fail, ("it was unpickled",)


@pytest.mark.parametrize(
    "data",
    [
        npy(np.array([Bomb()], dtype=object)),
        pickle.dumps(Bomb()),
        npy(np.zeros(2))[:-3],
        b"",
        b"PK\x03\x04 no zip after all",
        npy(np.zeros(2)).replace(b"(2,)", b"(2000000000000000,)"),
        npy(np.array(["text"])),
        npy(np.zeros(2, dtype=[("a", "f4")])),
    ],
    ids=["objects", "pickle", "cut short", "empty", "no zip", "bytes for petabytes", "texts", "structs"],
)
def test_arrays_that_are_no_numbers_are_refused_and_never_unpickled(data: bytes) -> None:
    with pytest.raises(WireError, match=r"cannot be read|is missing|the tensor `w` (claims|holds)"):
        from_arrays(ArrayRecord({"w": Array("float32", (2,), "numpy.ndarray", data)}))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_gradient_that_is_not_finite_is_refused_by_name(bad: float) -> None:
    gradient = {"ok": torch.zeros(2), "w": torch.tensor([0.0, bad])}
    with pytest.raises(WireError, match="`w` holds NaN, infinity or numbers that are too large"):
        TrainReply.from_records(TrainReply(gradient, 1.0, [0.5]).to_records(), 1)


def test_an_error_reply_carries_its_reason() -> None:
    assert error_reason(sent(error_records("no such task"))) == "no such task"
    assert error_reason(RecordDict({"error": ConfigRecord()})) == "no reason given"
    assert error_reason(RecordDict({"error": MetricRecord({"reason": 1})})) is None
    assert error_reason(MESSAGES["train reply"][0]()) is None


def test_payload_is_the_size_of_the_tensors_as_sent() -> None:
    records = TrainReply({"w": torch.zeros(100), "b": torch.zeros(())}, 1.0, [0.5]).to_records()
    assert payload_bytes(records) == len(npy(np.zeros(101, np.float32)))  # small tensors travel together
    assert payload_bytes(error_records("x")) == 0


def changed(records: RecordDict, **fields: Any) -> RecordDict:
    """The same message with some of its metrics changed."""
    return RecordDict({**records, "metrics": MetricRecord({**records.metric_records["metrics"], **fields})})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"losses": [-1.0, 0.5]}, "`losses` must be numbers from 0 to 3.4e"),
        ({"losses": [1e300, 0.5]}, "`losses` must be numbers from 0 to 3.4e"),
        ({"losses": [float("nan"), float("nan")]}, "`weight` is 2.0, but 0 of its tasks contributed"),
        ({"weight": 0.0}, "`weight` is 0.0, but 2 of its tasks contributed"),
        ({"within": -1.0}, "`within` must not be negative"),
        ({"more": 1.0}, "unexpected field `more`"),
        ({"weight": [1.0]}, "`weight and within` must be numbers"),
    ],
)
def test_implausible_numbers_of_a_train_reply_are_refused(fields: dict[str, Any], words: str) -> None:
    reply = TrainReply({"w": torch.ones(2)}, 2.0, [0.5, 0.5]).to_records()
    assert TrainReply.from_records(reply, 2).weight == 2.0
    with pytest.raises(WireError) as caught:
        TrainReply.from_records(changed(reply, **fields), 2)
    assert words in str(caught.value)


def test_records_that_nobody_asked_for_are_refused() -> None:
    reply = TrainReply({"w": torch.ones(2)}, 1.0, [0.5]).to_records()
    with pytest.raises(WireError, match="unexpected field `smuggled`"):
        TrainReply.from_records(RecordDict({**reply, "smuggled": ConfigRecord({"a": 1})}), 1)


def test_what_a_node_gives_as_its_reason_is_one_short_printable_line() -> None:
    reason = error_reason(error_records("a\n\x1b[31mb\u202e" + "x" * 10_000_000))
    assert reason is not None
    assert reason.startswith("a [31mb x")
    assert len(reason) == 300
    assert reason.isprintable()
    assert error_reason(RecordDict({"error": ConfigRecord({"reason": [1, 2]})})) == "no reason given"
