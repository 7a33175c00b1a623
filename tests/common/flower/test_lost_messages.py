"""A node that is killed at work and is soon online again: Flower's own states, of both kinds, answer for what it had pulled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

PROGRAM = """
import sys
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode, NOOP_FLWR_AID, NOOP_ACCOUNT_NAME
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
from flwr.server.superlink.linkstate.linkstate_factory import LinkStateFactory
from flwr.supercore.object_store.object_store_factory import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation.noop_federation_manager import NoOpFederationManager
from quickbloom.common.flower import registry

if "patched" in sys.argv:
    assert registry.apply("restarted-nodes")
database = FLWR_IN_MEMORY_DB_NAME if "memory" in sys.argv else ":memory:"
state = LinkStateFactory(database, NoOpFederationManager(), ObjectStoreFactory(database)).state()
node = state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, b"key", 30.0)
assert state.activate_node(node, 30.0)
run = state.create_run(None, None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, "flwr-serverapp")
TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = run, 1, SUPERLINK_NODE_ID


def sent():
    message = Message(RecordDict({"c": ConfigRecord({"a": 1})}), node, "train")
    metadata = message.metadata
    metadata._run_id, metadata._src_node_id = run, SUPERLINK_NODE_ID
    metadata._message_id = message.object_id
    assert state.store_message_ins(message) == message.object_id
    return message.object_id


pulled = sent()
assert [one.metadata.message_id for one in state.get_message_ins(node, limit=1)] == [pulled]
waiting = sent()  # not pulled before the kill: it is still to be done
assert state.deactivate_node(node)  # as when its heartbeats stop
assert state.activate_node(node, 30.0)
replies = state.get_message_res({pulled, waiting}, run)
print([(one.metadata.reply_to_message_id == pulled, one.error.code == ErrorCode.NODE_UNAVAILABLE) for one in replies])
print([one.metadata.message_id == waiting for one in state.get_message_ins(node, limit=5)])
print(len(state.get_message_res({pulled, waiting}, run)))
"""


def answers(*words: str) -> list[str]:
    command = [sys.executable, "-P", "-c", PROGRAM, *words]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("kind", ["memory", "sql"])
def test_what_a_killed_node_had_pulled_is_answered_for_once_and_what_it_had_not_pulled_is_given_to_it(kind: str) -> None:
    assert answers(kind, "patched") == ["[(True, True)]", "[True]", "0"]


def test_flower_itself_answers_nothing() -> None:
    """If this fails, Flower has mended it, and the patch can go."""
    assert answers("sql")[0] == "[]"
