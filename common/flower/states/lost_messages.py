"""A node that restarts has lost the messages that it had pulled: here the run is told so at once.

Flower's SuperLink answers for a node that is offline. A node whose process is killed while it computes may be online
again before anybody asked, and then nobody answers for its lost messages: the run waits until its own deadline. With
this patch of `common.flower.registry` such a message is answered, once its node has started again, as if the node were
offline.
"""

import importlib
from typing import Any

_LOST = "_lost_with_a_process"


def answer_for_restarted_nodes() -> None:
    """Let the states of this process answer for messages that a node had pulled before it started again."""
    for module, name, pulled in _states():
        state: Any = getattr(importlib.import_module(module), name)
        state.activate_node = _noting(state.activate_node, pulled)
        state.get_message_res = _answering(state.get_message_res)


def _states() -> Any:
    place = "flwr.server.superlink.linkstate"
    return (
        (f"{place}.in_memory_linkstate", "InMemoryLinkState", _pulled_in_memory),
        (f"{place}.sql_linkstate", "SqlLinkState", _pulled_in_sql),
    )


def _noting(activate: Any, pulled: Any) -> Any:
    def activate_node(self: Any, node_id: int, heartbeat_interval: float) -> bool:
        """Activate the node as Flower does, and note the messages that its earlier process had pulled and not answered."""
        activated: bool = activate(self, node_id, heartbeat_interval)
        if activated:
            utils = importlib.import_module("flwr.server.superlink.linkstate.utils")
            lost = self.__dict__.setdefault(_LOST, {})
            for metadata in pulled(self, node_id):
                lost[metadata.message_id] = utils.create_message_error_unavailable_res_message(metadata, "node_unavail")
        return activated

    return activate_node


def _answering(get: Any) -> Any:
    def get_message_res(self: Any, message_ids: set[str], run_id: int) -> list[Any]:
        """Return Flower's replies, and an error for each message that was lost with its node's process."""
        lost = self.__dict__.get(_LOST)
        if not lost:
            return list(get(self, message_ids, run_id))
        asked = set(message_ids)  # Flower takes out of the set what it has an answer for
        found = list(get(self, message_ids, run_id))
        answered = {reply.metadata.reply_to_message_id for reply in found}
        for message_id in asked:
            error = lost.pop(message_id, None)
            if error is not None and message_id not in answered:
                self._store_generated_message(error)
                found.append(error)
        return found

    return get_message_res


def _pulled_in_memory(state: Any, node_id: int) -> list[Any]:
    """Return the metadata of messages that this node has pulled and not answered."""
    with state.lock:
        messages = [message.metadata for message in state.message_ins_store.values()]
        answered = set(state.message_ins_id_to_message_res_id)
    return [one for one in messages if one.dst_node_id == node_id and one.delivered_at and one.message_id not in answered]


def _pulled_in_sql(state: Any, node_id: int) -> list[Any]:
    """As `_pulled_in_memory`."""
    sql: Any = importlib.import_module("flwr.server.superlink.linkstate.sql_linkstate")
    ins, res = sql.MessageInsModel, sql.MessageResModel
    with state.session() as session:
        answered = sql.select(res.reply_to_message_id)
        mine = sql.select(ins.message_id).where(ins.dst_node_id == sql.uint64_to_int64(node_id), ins.delivered_at != "")
        ids = set(session.scalars(mine.where(ins.message_id.not_in(answered))).all())
    found = []
    for row in state._load_message_ins_rows(ids) if ids else []:
        sql.convert_sint64_values_in_dict_to_uint64(row, ["run_id", "src_node_id", "dst_node_id"])
        found.append(sql.dict_to_message(row).metadata)
    return found
