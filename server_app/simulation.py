"""Flower's `flwr-simulation` with one loop written anew: the one that hands messages to the simulated nodes.

Flower's looks every 0.1 s, which is a third of a round of a thousand small clients, and goes through all messages for every
node, which with a thousand nodes keeps a core busy. The rest is Flower's own code, called as its command calls it.

`server_app.launch` puts a script that runs this file before Flower's own on the PATH of its SuperLink. This reaches into one
release of Flower; with another, Flower's own loop runs. It must not import this package: a run's app brings its own.
"""

import importlib
import importlib.metadata
import threading
import time
from queue import Queue
from typing import Any

RELEASE = "1.39."
SHORTEST, LONGEST = 0.002, 0.1
"""Seconds between two looks: a twentieth of the time since the last message, within these bounds."""


def add_messages_to_queue(state: Any, queue: "Queue[Any]", nodes_mapping: dict[int, int], f_stop: threading.Event) -> None:
    """Move messages from Flower's state into the queue of its workers until `f_stop`: at most one for each node in a look."""
    worked = time.monotonic()
    while not f_stop.is_set():
        for node_id in addressees(state, nodes_mapping):
            for message in state.get_message_ins(node_id=node_id, limit=1):
                queue.put(message)
                worked = time.monotonic()
        f_stop.wait(min(max((time.monotonic() - worked) / 20, SHORTEST), LONGEST))


def addressees(state: Any, nodes_mapping: dict[int, int]) -> list[int]:
    """The nodes for which there may be a message, in the order of `nodes_mapping`."""
    with state.lock:
        metadata = [message.metadata for message in state.message_ins_store.values()]
    waiting = {entry.dst_node_id for entry in metadata if entry.delivered_at == ""}
    return [node_id for node_id in nodes_mapping if node_id in waiting] if waiting else []


def main() -> None:
    """The command `flwr-simulation`."""
    from flwr.simulation.app import flwr_simulation

    if importlib.metadata.version("flwr").startswith(RELEASE):
        vce: Any = importlib.import_module("flwr.server.superlink.fleet.vce.vce_api")
        vce.add_messages_to_queue = add_messages_to_queue
    flwr_simulation()


if __name__ == "__main__":
    main()
