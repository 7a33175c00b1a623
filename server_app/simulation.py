"""Flower's `flwr-simulation` with three things changed, all other code being Flower's own, called as its command calls it.

- The loop that hands messages to the simulated nodes: Flower's looks every 0.1 s, and goes through all messages for every
  node, which with a thousand nodes keeps a core busy. This one is told of messages.
- A node stays with a process, as far as that is idle: else every process comes to hold the data of every node.
- The ClientApp is given to Ray once. Flower pickles it anew for every message, which takes 5 ms.

`server_app.launch` puts a script that runs this file before Flower's own on the PATH of its SuperLink. This reaches into one
release of Flower; with another, Flower's own code runs. It must not import this package: a run's app brings its own.
"""

import importlib
import importlib.metadata
import threading
from collections.abc import Callable
from queue import Queue
from typing import Any

RELEASE = "1.39."
LONGEST = 0.1
"""Seconds between two looks for messages, and to the end, where nothing tells of any."""


def add_messages_to_queue(state: Any, queue: "Queue[Any]", nodes_mapping: dict[int, int], f_stop: threading.Event) -> None:
    """Move messages from Flower's state into the queue of its workers until `f_stop`: at most one for each node in a look."""
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
    """The function `store`, which sets `told` when it is done."""

    def stored(message: Any) -> Any:
        result = store(message)
        told.set()
        return result

    return stored


def addressees(state: Any, nodes_mapping: dict[int, int]) -> list[int]:
    """The nodes for which there may be a message, in the order of `nodes_mapping`."""
    with state.lock:
        metadata = [message.metadata for message in state.message_ins_store.values()]
    waiting = {entry.dst_node_id for entry in metadata if entry.delivered_at == ""}
    return [node_id for node_id in nodes_mapping if node_id in waiting] if waiting else []


def pickling_once(build: Callable[[Any, Any], None], put: Callable[[Any], Any]) -> Callable[[Any, Any], None]:
    """The method `build` of Flower's backend for Ray, which leaves the app with Ray: what is sent is where it is."""

    def built(backend: Any, app_fn: Any) -> None:
        build(backend, app_fn)
        backend.app_fn = put(app_fn)

    return built


def loyal(submit: Callable[..., Any]) -> Callable[..., Any]:
    """The method `submit` of Flower's pool of actors, which gives the next job to the last of the idle ones: that which
    served the job's node before, if it is among them.
    """
    served: dict[str, Any] = {}
    one_at_a_time = threading.Lock()

    def submitted(pool: Any, actor_fn: Any, job: tuple[Any, Any, str, Any]) -> Any:
        node = job[2]
        with one_at_a_time:
            if (actor := served.get(node)) in pool.pool:
                pool.pool.remove(actor)
                pool.pool.append(actor)
            served[node] = pool.pool[-1]
            return submit(pool, actor_fn, job)

    return submitted


def main() -> None:
    """The command `flwr-simulation`."""
    from flwr.simulation.app import flwr_simulation

    if importlib.metadata.version("flwr").startswith(RELEASE):
        vce: Any = importlib.import_module("flwr.server.superlink.fleet.vce.vce_api")
        vce.add_messages_to_queue = add_messages_to_queue
        backend: Any = importlib.import_module("flwr.server.superlink.fleet.vce.backend.raybackend")
        backend.BasicActorPool.submit = loyal(backend.BasicActorPool.submit)
        backend.RayBackend.build = pickling_once(backend.RayBackend.build, backend.ray.put)
    flwr_simulation()


if __name__ == "__main__":
    main()
