"""A SuperLink that was away does not hold its own absence against runs and nodes.

Flower's SuperLink ends a run whose server process it has not heard of for a minute, and answers for nodes that it has not heard
of for as long. A SuperLink that was dead, frozen, or cut off from the network heard nobody at all. With this patch of
`common.flower.registry` it judges by what it could have heard:

- Once somebody is heard again after SILENCE, everybody has as much time again as after a heartbeat. So at its start.
- While neither a run's server nor a SuperExec is heard, no run is ended, for LONGEST at most.
"""

import importlib
import math
import threading
import time
from collections.abc import Callable
from typing import Any

SILENCE = 45.0
"""Seconds without a word from anybody of a kind, after which the SuperLink itself counts as having been away. Heartbeats come
every 20 s."""
LONGEST = 330.0
"""Seconds of silence after which runs are ended all the same."""

_TASKS, _NODES = "tasks", "nodes"
_HEARD = "_heard_last"
_forgiving = threading.Lock()


def forgive_absence() -> None:
    """Let the states in the databases of this process forgive what they could not hear."""
    core, link = _core(), importlib.import_module("flwr.server.superlink.linkstate.sql_linkstate")
    state: Any = vars(link)["SqlLinkState"]
    handlers: Any = importlib.import_module("flwr.superlink.servicer.runtime.runtime_handlers")
    state.initialize = _then_forgiving(state.initialize)
    state.get_task_by_token = _hearing(_TASKS, state.get_task_by_token)
    state.get_message_ins = _hearing(_NODES, state.get_message_ins)
    state.acknowledge_node_heartbeat = _hearing(_NODES, state.acknowledge_node_heartbeat)
    state.deactivate_node = _hearing(_NODES, state.deactivate_node, last=True)
    core.SqlCoreState._cleanup_expired_task_tokens = _unless_deaf(core.SqlCoreState._cleanup_expired_task_tokens)
    acquire = handlers.acquire_task

    def acquire_task(request: Any, state: Any) -> Any:
        """As Flower's. A SuperExec asks every second."""
        _hear(state, _TASKS)
        return acquire(request, state)

    handlers.acquire_task = acquire_task


def _core() -> Any:
    return importlib.import_module("flwr.supercore.corestate.sql_corestate")


def _then_forgiving(initialize: Callable[..., Any]) -> Callable[..., Any]:
    def initialize_and_forgive(self: Any, *arguments: Any, **named: Any) -> Any:
        """Open the database as Flower does, for a SuperLink that may have been away."""
        tables = initialize(self, *arguments, **named)
        for side in (_TASKS, _NODES):
            _hear(self, side)
        return tables

    return initialize_and_forgive


def _hearing(side: str, method: Callable[..., Any], *, last: bool = False) -> Callable[..., Any]:
    """Return the method of a state, which somebody of `side` calls. `last`: who signs off is not forgiven later."""

    def heard(self: Any, *arguments: Any, **named: Any) -> Any:
        _hear(self, side)
        result = method(self, *arguments, **named)
        if last:  # a node that signed off was online until before this word
            _hear(self, side)
        return result

    return heard


def _unless_deaf(clean_up: Callable[..., None]) -> Callable[..., None]:
    def clean_up_unless_deaf(self: Any) -> None:
        """End the runs that are not heard of, unless nobody could be heard."""
        heard = self.__dict__.get(_HEARD, {}).get(_TASKS)
        if heard is None or not SILENCE < time.time() - heard < LONGEST:
            clean_up(self)

    return clean_up_unless_deaf


def _hear(state: Any, side: str) -> None:
    """Note that one of `side` is heard, and forgive every side that was silent if this one was. Only in a database."""
    if not hasattr(state, "session"):
        return
    heard: dict[str, float] = state.__dict__.setdefault(_HEARD, {})
    # The clock on the wall, by which Flower judges: it also tells of a machine that slept.
    if time.time() - heard.get(side, -math.inf) > SILENCE:
        with _forgiving:  # whoever comes at the same time waits until all are forgiven
            if (now := time.time()) - heard.get(side, -math.inf) > SILENCE:
                for one, forgive in ((_TASKS, _forgive_tasks), (_NODES, _forgive_nodes)):
                    if now - (since := heard.get(one, -math.inf)) > SILENCE:
                        forgive(state, since)
    heard[side] = time.time()


def _forgive_tasks(state: Any, since: float) -> None:
    """Give every running task as much time as after a heartbeat."""
    core = _core()
    until = core.now() + core.timedelta(seconds=_patience())
    task = core.TaskModel
    alive = (task.token.is_not(None), task.finished_at.is_(None), task.active_until < until)
    with state.session() as session:
        session.execute(core.update(task).where(*alive).values(active_until=until))


def _forgive_nodes(state: Any, since: float) -> None:
    """Give every node that was online at `since` as much time as after a heartbeat, unless that is long ago."""
    sql: Any = importlib.import_module("flwr.server.superlink.linkstate.sql_linkstate")
    until = time.time() + _patience()
    node, online = sql.NodeModel, sql.NodeStatus.ONLINE
    # Meanwhile somebody may have looked, and Flower have noted that they are offline.
    tagged = (node.status == sql.NodeStatus.OFFLINE) & (node.online_until > since) if time.time() - since < LONGEST else False
    with state.session() as session:
        lapsed = sql.update(node).where((node.status == online) | tagged, node.online_until < until)
        session.execute(lapsed.values(status=online, online_until=until))


def _patience() -> float:
    """Return the seconds that Flower waits for a heartbeat."""
    constant: Any = importlib.import_module("flwr.common.constant")
    return float(constant.HEARTBEAT_PATIENCE * constant.HEARTBEAT_DEFAULT_INTERVAL)
