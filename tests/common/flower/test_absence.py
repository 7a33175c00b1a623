"""A SuperLink that was away for five minutes: Flower's own database of runs and nodes, with times moved into the past."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

PROGRAM = """
import json, sys, time
from datetime import timedelta
from sqlalchemy import update
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
from flwr.supercore.constant import NOOP_FEDERATION_ID
from flwr.server.superlink.linkstate.linkstate_factory import LinkStateFactory
from flwr.server.superlink.linkstate.sql_linkstate import NodeModel, TaskModel, now
from flwr.supercore.object_store.object_store_factory import ObjectStoreFactory
from flwr.superlink.federation.noop_federation_manager import NoOpFederationManager
from quickbloom.common.flower import registry

database, how, away = sys.argv[1], sys.argv[2], float(sys.argv[3])
if how != "flower":
    assert registry.apply("lost-tasks", "forgiven-absence")


def opened():
    return LinkStateFactory(database, NoOpFederationManager(), ObjectStoreFactory(database)).state()


state = opened()
online, gone = (state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, 30.0) for key in (b"1", b"2"))
assert state.activate_node(online, 30.0) and state.activate_node(gone, 30.0)
assert state.deactivate_node(gone)
run = state.create_run(None, None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, "flwr-serverapp")
(task,) = state.get_tasks(run_ids=[run])
token = state.claim_task(task.task_id)
assert state.activate_task(task.task_id)
natural = dict(state.__dict__.get("_heard_last", {}))
for name in ("_looked", "_heard_last"):  # a second look within one second would be none
    state.__dict__.pop(name, None)
with state.session() as session:  # all that was heard is as old as the absence
    session.execute(update(NodeModel).values(online_until=NodeModel.online_until - away))
    session.execute(update(TaskModel).values(active_until=now() + timedelta(seconds=60 - away)))
if how == "dead":
    state = opened()
elif how == "since the last sign-off":
    state.__dict__["_heard_last"] = {side: at - away for side, at in natural.items()}
elif how == "silent":
    state.__dict__["_heard_last"] = {"tasks": time.time() - away, "nodes": time.time() - away}
elif how == "one side":
    state.__dict__["_heard_last"] = {"tasks": time.time(), "nodes": time.time() - away}
state._cleanup_expired_task_tokens()  # as when somebody lists the runs
state._check_and_tag_offline_nodes()
heard = state.get_task_by_token(token)
(task,) = state.get_tasks(run_ids=[run])
nodes = state.get_nodes(run)
print(json.dumps([heard is not None, task.status.sub_status, online in nodes, gone in nodes]))
"""


def after(how: str, away: float, tmp_path: Path) -> list[object]:
    """[whether the run's server may go on, how its task ended, whether a node is online, one that had signed off]."""
    command = [sys.executable, "-P", "-c", PROGRAM, str(tmp_path / "state.db"), how, str(away)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found: list[object] = json.loads(done.stdout)
    return found


GOES_ON, ENDED = [True, ""], [False, "failed"]


@pytest.mark.parametrize(("how", "away"), [("dead", 300), ("dead", 3000), ("silent", 300), ("since the last sign-off", 300)])
def test_a_run_and_its_nodes_outlive_the_absence_of_their_superlink(how: str, away: float, tmp_path: Path) -> None:
    assert after(how, away, tmp_path) == [*GOES_ON, True, False]


def test_a_run_that_alone_is_not_heard_of_ends(tmp_path: Path) -> None:
    """Its SuperExec is heard, and so was the SuperLink there."""
    assert after("one side", 300, tmp_path) == [*ENDED, False, False]


def test_a_run_of_which_nobody_is_heard_for_ever_ends(tmp_path: Path) -> None:
    assert after("silent", 400, tmp_path)[:2] == ENDED


def test_flower_itself_ends_the_run(tmp_path: Path) -> None:
    """If this fails, Flower has mended it, and the patch can go."""
    assert after("flower", 300, tmp_path) == [*ENDED, False, False]
