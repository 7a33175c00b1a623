"""A SuperNode whose worker was killed: another one computes its message, or the server is told in one sentence.

A SuperExec that finds a worker killed (`common.flower.killed`) finishes its task as failed, with one of two words before the
reason. Flower's SuperNode has dropped a message by then, since its worker confirmed it, and may have announced a reply of which
the rest will never come. With this patch of `common.flower.registry` it keeps a message until it is answered, but a large one,
which a small device has no room for twice; and it sends a reply once all of it is there.
"""

import importlib
from collections.abc import Callable
from typing import Any

from quickbloom.common.flower.message_assembly import LARGE

AGAIN, OVER = "again: ", "over: "
"""Before the reason of a failed task: whether another worker is to compute its message, if that is still there."""
_KEPT = "_kept_until_answered"


def follow_killed_workers() -> None:
    """Let the SuperNode of this process do so."""
    state: Any = importlib.import_module("flwr.supernode.nodestate.in_memory_nodestate").InMemoryNodeState
    handlers: Any = importlib.import_module("flwr.supernode.servicer.runtime.runtime_handlers")
    state.finish_task = _following(state.finish_task)
    state.delete_messages = _dropping(state.delete_messages)
    for name in ("get_messages", "get_messages_legacy"):  # of Flower up to 1.40, and later
        if hasattr(state, name):
            setattr(state, name, _getting_whole(getattr(state, name)))
    handlers.confirm_message_received = _keeping(handlers.confirm_message_received, handlers.ConfirmMessageReceivedResponse)


def _keeping(confirm: Callable[..., Any], response: Callable[[], Any]) -> Callable[..., Any]:
    def confirm_message_received(request: Any, state: Any, task: Any) -> Any:
        """Drop a large message, as Flower does, and keep any other."""
        store, message_id = state.object_store, request.message_object_id
        if message_id not in store or _bytes(store, store.get_object_tree(message_id)) > LARGE:
            return confirm(request, state, task)
        state.__dict__.setdefault(_KEPT, set()).add(message_id)
        return response()

    return confirm_message_received


def _bytes(store: Any, tree: Any) -> int:
    return len(store.get(tree.object_id) or b"") + sum(_bytes(store, child) for child in tree.children)


def _getting_whole(get: Callable[..., Any]) -> Callable[..., Any]:
    def get_messages(self: Any, **wanted: Any) -> list[Any]:
        """Return messages as Flower does, but a reply once all of it is there."""
        found = list(get(self, **wanted))
        if not wanted.get("is_reply"):
            return found
        with self.lock_msg_store:
            found = [message for message in found if message.metadata.message_id in self.msg_store]  # none dropped meanwhile
            for message in (partial := [message for message in found if not _is_whole(self, message)]):
                self.msg_store[message.metadata.message_id].is_retrieved = False
        return [message for message in found if message not in partial]

    return get_messages


def _is_whole(state: Any, message: Any) -> bool:
    store = state.object_store
    trees = [store.get_object_tree(message.metadata.message_id)]
    while trees:
        tree = trees.pop()
        if store.get(tree.object_id) == b"":
            return False
        trees += tree.children
    return True


def _dropping(delete: Callable[..., None]) -> Callable[..., None]:
    def delete_messages(self: Any, *, message_ids: Any = None) -> None:
        """Delete messages as Flower does, and the content of those that were kept."""
        delete(self, message_ids=message_ids)
        kept: set[str] = self.__dict__.get(_KEPT, set())
        for message_id in kept & set(kept if message_ids is None else message_ids):
            kept.discard(message_id)
            self.object_store.delete(message_id)

    return delete_messages


def _following(finish: Callable[..., bool]) -> Callable[..., bool]:
    def finish_task(self: Any, task_id: int, sub_status: str, details: str) -> bool:
        """Finish a task as Flower does. That of a killed worker is followed by another, or by an answer to the server."""
        finished = finish(self, task_id, sub_status, details)
        word = next((one for one in (AGAIN, OVER) if details.startswith(one)), "")
        if finished and word:
            (task,) = self.get_tasks(task_ids=[task_id])
            if not (word == AGAIN and _handed_out_again(self, task)):
                _answer(self, task.run_id, details.removeprefix(word))
        return finished

    return finish_task


def _open(state: Any, run_id: int) -> list[Any]:
    """Return the entries of a run's messages that are not answered. A SuperNode takes one at a time."""
    entries = list(state.msg_store.values())
    answered = {entry.message.metadata.reply_to_message_id for entry in entries}
    of_run = [entry for entry in entries if entry.message.metadata.run_id == run_id]
    return [
        entry
        for entry in of_run
        if not entry.message.metadata.reply_to_message_id and entry.message.metadata.message_id not in answered
    ]


def _drop_partial_replies(state: Any, run_id: int) -> None:
    """Drop the replies that a killed worker had not handed over as a whole."""
    for entry in list(state.msg_store.values()):
        metadata = entry.message.metadata
        if metadata.run_id == run_id and metadata.reply_to_message_id and not _is_whole(state, entry.message):
            state.msg_store.pop(metadata.message_id)
            state.object_store.delete(metadata.message_id)


def _handed_out_again(state: Any, task: Any) -> bool:
    """Make a task for the message of a killed worker; return False if its content is gone."""
    with state.lock_msg_store:
        _drop_partial_replies(state, task.run_id)
        entries = _open(state, task.run_id)
        if not all(entry.message.metadata.message_id in state.object_store for entry in entries):
            return False
        for entry in entries:
            entry.is_retrieved = False
    return not entries or state.create_task(task_type=task.type, run_id=task.run_id, fab_hash=task.fab_hash) is not None


def _answer(state: Any, run_id: int, reason: str) -> None:
    """Answer the message of a killed worker with an error."""
    app: Any = importlib.import_module("flwr.app")
    code: Any = importlib.import_module("flwr.common.constant").ErrorCode
    with state.lock_msg_store:
        _drop_partial_replies(state, run_id)
        for entry in _open(state, run_id):
            if not entry.is_retrieved:  # the worker did not even ask for it
                entry.is_retrieved = True
                state.record_message_processing_start(message_id=entry.message.metadata.message_id)
        state._store_error_replies({run_id}, app.Error(code.CLIENT_APP_CRASHED, reason))
