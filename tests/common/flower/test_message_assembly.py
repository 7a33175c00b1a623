"""Messages are put together part by part: the same message, and no piece is kept beside the array that it belongs to."""

import tracemalloc

import pytest
import torch
from flwr.app import Message
from flwr.supercore.inflatable import inflatable_utils as pulling
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import http_grid

from quickbloom.common.flower import accepted, message_assembly, registry
from quickbloom.common.maths.params import Params
from quickbloom.common.wire.arrays import from_arrays
from quickbloom.common.wire.messages import TrainRequest


@pytest.fixture
def spared(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Flower has it again afterwards."""
    for module in (pulling, http_grid):
        monkeypatch.setattr(module, "inflate_object_from_contents", module.inflate_object_from_contents)
    message_assembly.spare()
    message_assembly.spare()  # twice is as once


def pieces(meta: Params) -> tuple[str, dict[str, bytes]]:
    """A message as it comes: its id, and every piece of it by its own."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    message = Message(TrainRequest(meta, 3, 0, ["a"]).to_records(), 7, "train")
    return message.object_id, {key: value.deflate() for key, value in get_all_nested_objects(message).items()}


@pytest.mark.usefixtures("spared")
def test_a_message_comes_as_it_was_sent() -> None:
    # Two layers of the same zeros, and two parts of one layer, share pieces.
    meta = {"w": torch.rand(40, 2**16), "b": torch.zeros(2**19), "c": torch.zeros(2**19), "d": torch.zeros(24, 2**17)}
    key, contents = pieces(meta)
    message = pulling.inflate_object_from_contents(key, contents)
    assert isinstance(message, Message)
    back = TrainRequest.from_records(message.content)
    assert (back.round, back.task_ids) == (3, ["a"])
    assert all(torch.equal(back.meta[name], value) for name, value in meta.items())
    assert not contents  # all of them were used up


@pytest.mark.usefixtures("spared")
def test_putting_it_together_takes_little_more_than_the_message() -> None:
    key, contents = pieces({"w": torch.rand(100, 2**16)})  # 26 MB
    size = sum(map(len, contents.values()))
    tracemalloc.start()
    try:
        tracemalloc.reset_peak()
        message = pulling.inflate_object_from_contents(key, contents)  # what it frees of `contents` was there before
        made = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert made < 1.6 * size
    assert from_arrays(message.content["meta"])["w"].shape == (100, 2**16)  # type: ignore[attr-defined]


def test_a_message_is_put_together_flowers_way_where_the_guard_does_not_know_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(accepted.ACCEPTED, "flwr.supercore.inflatable.inflatable_utils:inflate_object_from_contents", {})
    before = pulling.inflate_object_from_contents
    assert registry.apply("assembly-by-parts") == []
    assert pulling.inflate_object_from_contents is before
