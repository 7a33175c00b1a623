"""A SuperLink that many nodes ask: a look that finds nothing costs no search in its database, nor does a known node's key.

Every look of a node is two searches, one of which writes, and nodes look every three seconds. All messages come through the
SuperLink's own process, so it knows who may have one.
These are the patches `empty-looks` and `known-keys` of `common.flower.registry`.
"""

import importlib
import time
from typing import Any

FRESH = 5.0
"""Seconds after a message for a node was stored in which a look may miss it: the transaction ends later than the call."""
TRUSTED = 10.0
"""Seconds after which a look searches in any case, and a key is looked up anew."""
_STORED, _EMPTY, _KEYS = "_stored_for_nodes", "_found_nothing_for_nodes", "_nodes_by_key"


def _state() -> Any:
    return importlib.import_module("flwr.server.superlink.linkstate.sql_linkstate").SqlLinkState


def skip_empty_looks() -> None:
    """Let states in databases answer a node at once for which nothing was stored since its last look."""
    state = _state()
    store, get = state.store_message_ins, state.get_message_ins

    def store_message_ins(self: Any, message: Any) -> Any:
        """Store the message as Flower does, and note whose it is."""
        stored = store(self, message)
        self.__dict__.setdefault(_STORED, {})[message.metadata.dst_node_id] = time.monotonic()
        return stored

    def get_message_ins(self: Any, node_id: int, limit: int | None, **named: Any) -> list[Any]:
        """Return what Flower finds, or nothing at once if nothing can have come since nothing was found."""
        if named.get("run_id") is not None:  # asked for one run, it finds nothing of the others
            return list(get(self, node_id, limit, **named))
        now = time.monotonic()
        nothing: dict[int, float] = self.__dict__.setdefault(_EMPTY, {})
        looked = nothing.get(node_id)
        stored = self.__dict__.get(_STORED, {}).get(node_id)
        if looked is not None and now - looked < TRUSTED and (stored is None or stored + FRESH < looked):
            return []
        found: list[Any] = get(self, node_id, limit, **named)
        if found:
            nothing.pop(node_id, None)
        else:
            nothing[node_id] = now
        return found

    state.store_message_ins, state.get_message_ins = store_message_ins, get_message_ins


def remember_keys() -> None:
    """Let states in databases remember for a while whose a public key is; a removed node is forgotten at once."""
    state = _state()
    find, delete = state.get_node_id_by_public_key, state.delete_node

    def get_node_id_by_public_key(self: Any, public_key: bytes) -> int | None:
        """Return the node's id as Flower does, or as it did a few seconds ago."""
        keys: dict[bytes, tuple[int, float]] = self.__dict__.setdefault(_KEYS, {})
        known, now = keys.get(public_key), time.monotonic()
        if known is not None and now - known[1] < TRUSTED:
            return known[0]
        node_id: int | None = find(self, public_key)
        if node_id is None:
            keys.pop(public_key, None)
        else:
            keys[public_key] = node_id, now
        return node_id

    def delete_node(self: Any, *arguments: Any, **named: Any) -> Any:
        """Remove the node as Flower does, and forget every key."""
        try:
            return delete(self, *arguments, **named)
        finally:
            self.__dict__.pop(_KEYS, None)

    state.get_node_id_by_public_key, state.delete_node = get_node_id_by_public_key, delete_node
