"""A part of a message that is uploaded twice counts as stored: whoever uploads it may not have got the first answer.

Flower's SuperLink takes a part only as long as it waits for it. If it is killed, or the connection breaks, after it has
stored a part and before it has answered, the upload is repeated and refused: a run ends, a node's reply is lost. With this
patch of `common.flower.registry` a part that is there already, with the same content, is stored.
"""

import importlib
from typing import Any

_STATES = (("in_memory_corestate", "InMemoryCoreState"), ("sql_corestate", "SqlCoreState"))


def accept_repeated_pushes() -> None:
    """Let the states of this process accept what they hold already."""
    for state in states():
        state.store_object = _accepting(state.store_object)


def states() -> list[Any]:
    """Return Flower's classes that keep the parts of messages."""
    return [getattr(importlib.import_module(f"flwr.supercore.corestate.{module}"), name) for module, name in _STATES]


def _accepting(store: Any) -> Any:
    def store_object(self: Any, run_id: int, session_id: str, object_id: str, object_content: bytes) -> bool:
        """Return whether the part is stored, by this call or by an earlier one."""
        if store(self, run_id, session_id, object_id, object_content):
            return True
        # Whoever sends the same content learns nothing from the answer.
        return bool(object_content) and self.object_store.get(object_id) == object_content

    return store_object
