"""Flower's `flwr-simulation` with three changes; all other code is Flower's own, called as its command calls it.

- The loop that hands messages to the simulated nodes is notified of messages. Flower's looks every
  0.1 s, and searches all messages for every node, which with a thousand nodes keeps a core busy.
- A node stays with a process while that is idle. With as many nodes as processes, each process then
  holds the data of its own node only.
- The ClientApp is given to Ray once. Flower pickles it for every message, which takes 5 ms.

`server_app.launch.flower_run` puts a script that runs this file before Flower's own on the PATH of
its SuperLink: `python -P simulation.py PATCH,PATCH ARGUMENTS`, with those patches of
`common.flower.registry` that may be applied. This file must not import this package: a run's app
brings its own.
"""

import importlib
import importlib.metadata
import importlib.util
import sys
import threading
from collections.abc import Callable
from queue import Queue
from typing import Any

LONGEST = 0.1
"""Seconds between two looks for messages, and for the end, without a notification."""


def add_messages_to_queue(state: Any, queue: "Queue[Any]", nodes_mapping: dict[int, int], f_stop: threading.Event) -> None:
    """Move messages from Flower's state into the queue of its workers until `f_stop`: at most one per node and look."""
    told = threading.Event()
    state.store_message_ins = telling(state.store_message_ins, told)
    while not f_stop.is_set():
        moved = False
        for node_id in addressees(state, nodes_mapping):
            for message in state.get_message_ins(node_id=node_id, limit=1):
                queue.put(message)
                moved = True
        if not moved:
            told.wait(LONGEST)
            told.clear()


def telling(store: Callable[[Any], Any], told: threading.Event) -> Callable[[Any], Any]:
    """Return the function `store`, which then sets `told` when it is done."""

    def stored(message: Any) -> Any:
        result = store(message)
        told.set()
        return result

    return stored


def addressees(state: Any, nodes_mapping: dict[int, int]) -> list[int]:
    """Return the nodes that may have a message, in the order of `nodes_mapping`."""
    with state.lock:
        metadata = [message.metadata for message in state.message_ins_store.values()]
    waiting = {entry.dst_node_id for entry in metadata if entry.delivered_at == ""}
    return [node_id for node_id in nodes_mapping if node_id in waiting] if waiting else []


def pickling_once(build: Callable[[Any, Any], None], put: Callable[[Any], Any]) -> Callable[[Any, Any], None]:
    """Return the method `build` of Flower's backend for Ray, which then stores the app in Ray and sends a reference."""

    def built(backend: Any, app_fn: Any) -> None:
        build(backend, app_fn)
        backend.app_fn = put(app_fn)

    return built


class Loyal:
    """Two methods of Flower's pool of actors. The next job goes to the idle actor that served its node before.

    Without such an actor, the last idle one gets it, as with Flower. An actor that failed a node
    does not serve it again.
    """

    def __init__(self, fetch: Callable[[Any, Any], Any]) -> None:
        self._fetch = fetch
        self._served: dict[str, Any] = {}
        self._jobs: dict[Any, tuple[str, Any]] = {}
        self._choosing = threading.Lock()

    def submit(self, pool: Any, actor_fn: Callable[..., Any], job: tuple[Any, Any, str, Any]) -> Any:
        """Replacement for the pool's method `submit`."""
        node = job[2]
        with self._choosing:
            before = self._served.pop(node, None)
            actor = before if before in pool.pool else pool.pool[-1]
            pool.pool.remove(actor)
        future = actor_fn(actor, *job)
        self._jobs[future] = node, actor
        pool._future_to_actor[future] = actor
        return future

    def fetch(self, pool: Any, future: Any) -> Any:
        """Replacement for the pool's method `fetch_result_and_return_actor_to_pool`."""
        node, actor = self._jobs.pop(future)
        result = self._fetch(pool, future)
        self._served[node] = actor
        return result


def dispatch() -> None:
    """Let this process's simulation hand messages over when it is notified of them."""
    vce: Any = importlib.import_module("flwr.server.superlink.fleet.vce.vce_api")
    vce.add_messages_to_queue = add_messages_to_queue


def send_app_once() -> None:
    """Let this process give Ray the ClientApp once."""
    backend: Any = importlib.import_module("flwr.server.superlink.fleet.vce.backend.raybackend")
    backend.RayBackend.build = pickling_once(backend.RayBackend.build, backend.ray.put)


def stay() -> None:
    """Let the nodes of this process's simulation stay with the actor that served them."""
    pool: Any = importlib.import_module("flwr.server.superlink.fleet.vce.backend.raybackend").BasicActorPool
    loyal = Loyal(pool.fetch_result_and_return_actor_to_pool)
    pool.submit = lambda *arguments: loyal.submit(*arguments)
    pool.fetch_result_and_return_actor_to_pool = lambda *arguments: loyal.fetch(*arguments)


PATCHES: dict[str, Callable[[], None]] = {
    "simulation-dispatch": dispatch,
    "simulation-app-once": send_app_once,
    "simulation-same-process": stay,
}


def main() -> None:
    """Run the command `flwr-simulation` with the patches that the first argument names."""
    wanted = sys.argv.pop(1).split(",")
    if importlib.util.find_spec("ray"):  # without Ray, Flower reports what is missing
        for name, apply in PATCHES.items():
            if name in wanted:
                apply()
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="flwr-simulation")
    entry.load()()


if __name__ == "__main__":
    main()
