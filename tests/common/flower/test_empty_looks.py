"""A SuperLink with many nodes: Flower's own state in a database file, and the statements that it sends there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

PROGRAM = """
import sys
import sqlalchemy
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, NOOP_FLWR_AID, NOOP_ACCOUNT_NAME
from flwr.supercore.constant import NOOP_FEDERATION_ID
from flwr.server.superlink.linkstate.linkstate_factory import LinkStateFactory
from flwr.supercore.object_store.object_store_factory import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation.noop_federation_manager import NoOpFederationManager
from quickbloom.common.flower import registry
from quickbloom.common.flower.states import empty_looks

if "patched" in sys.argv:
    assert registry.apply("empty-looks", "known-keys", "one-writer", "forgiven-absence")
database = sys.argv[1]
state = LinkStateFactory(database, NoOpFederationManager(), ObjectStoreFactory(database)).state()
node = state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, b"key", 30.0)
assert state.activate_node(node, 30.0)
run = state.create_run(None, None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, "flwr-serverapp")
TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = run, 1, SUPERLINK_NODE_ID
sent = []
sqlalchemy.event.listen(state._engine, "before_cursor_execute", lambda c, cursor, statement, *rest: sent.append(statement))


def statements(function):
    sent.clear()
    found = function()
    return found, len(sent)


def look():
    return statements(lambda: len(state.get_message_ins(node, limit=1)))


def key():
    return statements(lambda: state.get_node_id_by_public_key(b"key") == node)


def send():
    message = Message(RecordDict({"c": ConfigRecord({"a": 1})}), node, "train")
    message.metadata._run_id, message.metadata._src_node_id = run, SUPERLINK_NODE_ID
    message.metadata._message_id = message.object_id
    assert state.store_message_ins(message) == message.object_id


print("first", look()[0], look())
send()
print("sent", look()[0], look()[0])
# A look that was there between a message and the end of its transaction is followed by another search.
send()
state.__dict__[empty_looks._EMPTY] = {node: empty_looks.time.monotonic()}
print("in time", look()[0])
empty_looks.FRESH = -10.0
print("later", look()[0], look())
empty_looks.TRUSTED = -1.0
print("not trusted", look()[1] > 0)
empty_looks.TRUSTED = 10.0
print("key", key()[0], key())
state.delete_node(NOOP_FLWR_AID, node)
print("removed", statements(lambda: state.get_node_id_by_public_key(b"key"))[0])
"""


def lines(database: Path, *words: str) -> list[str]:
    command = [sys.executable, "-P", "-c", PROGRAM, str(database), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_look_that_can_find_nothing_sends_no_statement_and_a_message_is_found_at_once(tmp_path: Path) -> None:
    assert lines(tmp_path / "state.db", "patched") == [
        "first 0 (0, 0)",
        "sent 1 0",
        "in time 1",
        "later 0 (0, 0)",
        "not trusted True",
        "key True (True, 0)",
        "removed None",
    ]


def test_flower_itself_searches_at_every_look(tmp_path: Path) -> None:
    """If this fails, Flower has mended it, and the patches can go."""
    found = lines(tmp_path / "state.db")
    assert found[0] != "first 0 (0, 0)"
    assert found[5] != "key True (True, 0)"


WRITERS = """
import sys
import threading
import time
import flwr.supercore.sql_mixin as mixin
from sqlalchemy import text
from quickbloom.common.flower import registry
from quickbloom.common.flower.states import one_writer

# As with many writers, in less time.
mixin.SQLITE_PRAGMAS = (("busy_timeout", "20"), *mixin.SQLITE_PRAGMAS[1:])
if "patched" in sys.argv:
    assert registry.apply("one-writer")


class Numbers(mixin.SqlMixin):
    pass


numbers = Numbers(sys.argv[1])
numbers.initialize()
with numbers.session() as session:
    session.execute(text("CREATE TABLE numbers (value INTEGER)"))
    session.execute(text("INSERT INTO numbers VALUES (0)"))
failed = []


def write():
    for _ in range(3):
        try:
            with numbers.session() as session:
                session.execute(text("UPDATE numbers SET value = value + 1"))
                time.sleep(0.03)
        except Exception as error:
            failed.append(error)


writers = [threading.Thread(target=write) for _ in range(8)]
for writer in writers:
    writer.start()
for writer in writers:
    writer.join()
try:  # one who gives up holds up nobody
    with numbers.session() as session:
        session.execute(text("UPDATE numbers SET value = 1000"))
        raise ValueError
except ValueError:
    pass
with numbers.session() as session:
    print(session.scalar(text("SELECT value FROM numbers")), len(failed))
    session.execute(text("UPDATE numbers SET value = 7"))
with numbers.session() as session:
    print(session.scalar(text("SELECT value FROM numbers")))
"""


@pytest.mark.parametrize("patched", [True, False])
def test_writers_wait_in_line_where_flower_lets_them_fail(tmp_path: Path, *, patched: bool) -> None:
    command = [sys.executable, "-P", "-c", WRITERS, str(tmp_path / "numbers.db"), *["patched"] * patched]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    if patched:
        assert done.stdout.splitlines() == ["24 0", "7"]
    else:
        assert int(done.stdout.split()[1]) > 0
