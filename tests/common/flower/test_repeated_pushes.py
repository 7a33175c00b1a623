"""A part of a message whose upload was stored and not confirmed: Flower's own states, of both kinds, take it again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

PROGRAM = """
import sys
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, NOOP_FLWR_AID, NOOP_ACCOUNT_NAME
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.server.superlink.linkstate.linkstate_factory import LinkStateFactory
from flwr.supercore.object_store.object_store_factory import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation.noop_federation_manager import NoOpFederationManager
from quickbloom.common.flower import registry

if "patched" in sys.argv:
    assert registry.apply("repeated-pushes")
database = FLWR_IN_MEMORY_DB_NAME if "memory" in sys.argv else ":memory:"
state = LinkStateFactory(database, NoOpFederationManager(), ObjectStoreFactory(database)).state()
node = state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, b"key", 30.0)
assert state.activate_node(node, 30.0)
run = state.create_run(None, None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, "flwr-serverapp")
TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = run, 1, SUPERLINK_NODE_ID
message = Message(RecordDict({"c": ConfigRecord({"a": 1})}), node, "train")
metadata = message.metadata
metadata._run_id, metadata._src_node_id = run, SUPERLINK_NODE_ID
metadata._message_id = message.object_id
session = state.start_session(run)
parts = {name: part.deflate() for name, part in get_all_nested_objects(message).items()}
stored, missing = state.store_message_and_object_tree(message, get_object_tree(message), session)
assert stored and set(missing) == set(parts)
first, *others = missing
assert state.store_object(run, session, first, parts[first])
print("again", state.store_object(run, session, first, parts[first]))
print("another content", state.store_object(run, session, first, b"another"))
print("before it is there", state.store_object(run, "another session", others[0], parts[others[0]]))
for other in others:
    assert state.store_object(run, session, other, parts[other])
print("after the last", state.store_object(run, session, others[-1], parts[others[-1]]))
print("unknown", state.store_object(run, session, "0" * 64, b"unknown"))
"""


def answers(*words: str) -> dict[str, bool]:
    command = [sys.executable, "-P", "-c", PROGRAM, *words]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line.rpartition(" ") for line in done.stdout.splitlines()]
    return {what: answer == "True" for what, _, answer in lines}


@pytest.mark.parametrize("kind", ["memory", "sql"])
def test_what_is_stored_is_stored_however_often_it_is_sent_and_nothing_else_is(kind: str) -> None:
    assert answers(kind, "patched") == {
        "again": True,
        "another content": False,
        "before it is there": False,
        "after the last": True,
        "unknown": False,
    }


def test_flower_itself_refuses() -> None:
    """If this fails, Flower has mended it, and the patch can go."""
    refused = answers("sql")
    assert not refused["again"]
    assert not refused["after the last"]
