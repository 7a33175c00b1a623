"""Records of a small message travel as one, and come out as they went in."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_to_proto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity

from quickbloom.common.wire import packing
from quickbloom.common.wire.checks import WireError

RECORDS = RecordDict(
    {
        "meta": ArrayRecord({"w": Array(np.arange(6, dtype=np.float32).reshape(2, 3)), "n": Array(np.array(7))}),
        "request": ConfigRecord({"round": 3, "clip": 0.5, "names": ["a", "ä"], "yes": True, "raw": b"\0\xff", "none": []}),
        "metrics": MetricRecord({"losses": [0.1, float("nan"), float("inf")], "tasks": 2}),
    }
)


def pieces(records: RecordDict) -> int:
    """How many pieces Flower sends of a message with these records."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1  # without which it builds none
    return len(get_all_nested_objects(Message(records, 7, "train")))


def test_what_is_packed_comes_out_as_it_went_in() -> None:
    packed = packing.pack(RECORDS)
    assert packing.is_packed(packed)
    assert not packing.is_packed(RECORDS)
    back = packing.unpack(packed)
    assert list(back) == list(RECORDS)
    assert back.array_records["meta"]["w"].numpy().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert back.array_records["meta"]["n"].numpy() == 7
    assert back["request"] == RECORDS["request"]
    assert {key: type(value) for key, value in back.config_records["request"].items()} == {
        key: type(value) for key, value in RECORDS.config_records["request"].items()
    }
    assert repr(back["metrics"]) == repr(RECORDS["metrics"])  # NaN is not equal to itself


def test_a_packed_message_is_three_pieces() -> None:
    assert pieces(RECORDS) == 9
    assert pieces(packing.pack(RECORDS)) == 3


def test_a_large_message_and_one_that_is_packed_stay_as_they_are() -> None:
    large = RecordDict({"meta": ArrayRecord({"w": Array(np.zeros(packing.SMALL, np.int8))})})  # and its header
    assert packing.pack(large) is large
    words = RecordDict({"request": ConfigRecord({"raw": [b"x" * 1024] * 128})})
    assert packing.pack(words) is words
    almost = RecordDict({"meta": ArrayRecord({"w": Array(np.zeros(packing.SMALL - 500, np.int8))})})
    assert packing.unpack(packing.pack(almost)).array_records["meta"]["w"].shape == (packing.SMALL - 500,)
    assert packing.is_packed(packing.pack(almost))
    assert packing.unpack(large) is large
    packed = packing.pack(RECORDS)
    assert packing.pack(packed) is packed
    empty = RecordDict()
    assert list(packing.unpack(packing.pack(empty))) == []


@pytest.mark.parametrize(
    "record",
    [
        ConfigRecord({"packed": "text"}),
        ConfigRecord({"packed": [b"bytes"]}),
        ConfigRecord({"packed": b"no protocol buffer"}),
        ConfigRecord({"other": b""}),
        ConfigRecord({"packed": b"\0" * (packing.SMALL + 1)}),
        ConfigRecord(),
        MetricRecord({"packed": 1}),
        ArrayRecord(),
        ConfigRecord({"packed": recorddict_to_proto(packing.pack(RECORDS)).SerializeToString()}),
    ],
)
def test_what_cannot_be_read_is_said_in_words(record: ConfigRecord | MetricRecord | ArrayRecord) -> None:
    with pytest.raises(WireError):
        packing.unpack(RecordDict({"packed": record}))
