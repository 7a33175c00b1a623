"""Processes that compute the nodes of a run in process, so that its rounds use more than one core.

They are forks of the run's process: they start in a moment, share its memory until they change it, and have every algorithm,
data set and model of the user's. Each one has nodes of its own, whose state stays with it, and computes on one thread. They
start only after a round of training, when the data are read and the rounds have turned out to be worth it (`Worth`). They end
with the run, and with its process, however that ends.
"""

import atexit
import contextlib
import gc
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from flwr.app import Message, RecordDict

from quickbloom.common.errors import RunError
from quickbloom.common.system.processes import ENDINGS, cores
from quickbloom.common.wire.messages import payload_bytes

Answer = Callable[[Message], Message | None]

PAYS = 1.0
"""Seconds that workers must have been able to save before they start; to start them takes less."""
WARM_UP = 3.0
"""Seconds of the first messages of a kind that are no measure: they import, read and compile what later ones find."""
_PATIENCE = 3.0  # seconds that a worker has to end
_AT_ONCE = 2**24  # bytes of messages that are sent to a worker before it has replied to the ones before


def why_not() -> str:
    """Return why no workers can be forked here, as the end of a sentence; "" if they can."""
    if sys.platform != "linux":
        return "only Linux lets a process that computes be forked"
    if torch.accelerator.is_available():
        return "a process that can use a GPU cannot be forked, and the GPU computes all nodes at once"
    if multiprocessing.current_process().daemon:
        return "this process is itself a worker that may start no others"
    return ""


def most(nodes: int) -> int:
    """Return how many workers can help with so many nodes here: one for each core, none without a fork."""
    return 1 if why_not() else min(nodes, cores())


class Worth:
    """Whether workers would pay, from the seconds that messages took without them."""

    def __init__(self, at_once: bool = False) -> None:
        """Start without measurements. `at_once`: workers are wanted in any case, from the second round on."""
        self._at_once = at_once
        self._saved = 0.0
        self._kinds: set[str] = set()

    def note(self, kind: str, shares: Collection[float], messages: Sequence[Message]) -> None:
        """Note messages of a kind that were sent together. `shares`: seconds of what each worker would have computed."""
        size = sum(payload_bytes(message.content) for message in messages if message.has_content())
        moving = 0.001 * len(messages) + size / 2**28
        saved = sum(shares) - max(shares, default=0.0) - moving
        self._saved += max(0.0, saved if kind in self._kinds else saved - WARM_UP)
        self._kinds.add(kind)

    @property
    def proven(self) -> bool:
        """Whether there was a round of training, and workers would pay."""
        return any(kind.startswith("train") for kind in self._kinds) and (self._at_once or self._saved >= PAYS)


class Workers:
    """Forked processes that answer messages in place of this one: node i of `node_ids` is with worker i modulo `number`."""

    def __init__(self, number: int, node_ids: Sequence[int], answer: Answer, states: Mapping[int, RecordDict]) -> None:
        """Fork. `states`: what each node keeps; it moves to the node's worker and is emptied here."""
        self.number = number
        self._place = {node_id: i % number for i, node_id in enumerate(node_ids)}
        alive, self._alive = os.pipe()
        self._workers: list[_Worker] = []
        gc.freeze()  # else a worker's look through what was made before would copy it
        # A fork takes Ctrl-C for its own until it has left this process's group.
        signals = signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)
        try:
            for i in range(number):
                foreign = [states[node_id] for node_id, place in self._place.items() if place != i]
                self._workers.append(_Worker(answer, foreign, alive, self._alive))
        except BaseException:
            self.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, signals)
            gc.unfreeze()
            os.close(alive)
        for state in states.values():
            state.clear()

    @property
    def cpu_seconds(self) -> float:
        """Processor seconds of all workers, up to their last replies."""
        return sum(worker.cpu_seconds for worker in self._workers)

    def place(self, node_id: int) -> int:
        """Return which worker has a node; the first one for a node that does not exist."""
        return self._place.get(node_id, 0)

    def replies(self, messages: Sequence[Message]) -> Iterator[tuple[Message, Message | None]]:
        """Yield every message with its reply, as they come. Raises RunError if a worker dies."""
        for message in messages:
            self._workers[self.place(message.metadata.dst_node_id)].waiting.append(message)
        busy = {worker.pipe: worker for worker in self._workers if worker.waiting}
        for worker in busy.values():
            worker.send()
        while busy:
            for pipe in wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]  # `wait` is typed for all kinds of objects
                yield worker.receive()
                if not worker.sent:
                    if worker.waiting:
                        worker.send()
                    else:
                        del busy[worker.pipe]

    def close(self) -> None:
        """End all workers, and what they have started."""
        try:
            for worker in self._workers:
                worker.end()
            for worker in self._workers:
                worker.process.join(_PATIENCE)
        finally:  # a second Ctrl-C comes here at once
            for worker in self._workers:
                worker.kill()
            os.close(self._alive)


class _Worker:
    """One of them, as the run's process sees it. `waiting`: messages to send; `sent`: those without a reply yet."""

    def __init__(self, answer: Answer, foreign: Sequence[RecordDict], alive: int, parent: int) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.waiting: deque[Message] = deque()
        self.sent: deque[Message] = deque()
        self.cpu_seconds = 0.0
        # A daemon is ended by Python if this process ends in any other way than by `close`.
        self.process = context.Process(target=_work, args=(answer, foreign, theirs, self.pipe, alive, parent), daemon=True)
        with warnings.catch_warnings():
            # Python warns of threads, of which a fork has none: a worker uses nothing that they may have locked.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.process.start()
        theirs.close()

    def send(self) -> None:
        """Send waiting messages, several at once if they are small. The worker waits for them."""
        size = 0
        while self.waiting and (not size or size < _AT_ONCE):
            self.sent.append(self.waiting.popleft())
            size += 1 + payload_bytes(self.sent[-1].content)
        with self._lost_if_broken():
            self.pipe.send_bytes(pickle.dumps(list(self.sent), pickle.HIGHEST_PROTOCOL))

    def receive(self) -> tuple[Message, Message | None]:
        """Return the next message with its reply. What the node logged is logged here."""
        with self._lost_if_broken():
            reply, told, self.cpu_seconds = pickle.loads(self.pipe.recv_bytes())
        log_again(told)
        return self.sent.popleft(), reply

    @contextlib.contextmanager
    def _lost_if_broken(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, ConnectionError):
            self.process.join(_PATIENCE)
            raise RunError(
                f"a worker process of this run has ended ({_how(self.process.exitcode)}), and with it the state of its nodes: "
                "go on with `--workers 1`, which takes less memory"
            ) from None

    def end(self) -> None:
        """Ask the worker to end."""
        self.pipe.close()
        self.process.terminate()

    def kill(self) -> None:
        """End the worker if it has not ended, and what it has started."""
        if self.process.exitcode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid or 0, signal.SIGKILL)
            self.process.join(_PATIENCE)


def _how(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        killed = ", as the system does when memory is short" * (exit_code == -signal.SIGKILL)
        return f"by {signal.Signals(-exit_code).name}{killed}"
    return f"exit code {exit_code}"


# ---- in the fork


def _work(answer: Answer, foreign: Sequence[RecordDict], pipe: Connection, theirs: Connection, alive: int, parent: int) -> None:
    """Answer messages until the run's process closes its end of the pipe, or ends."""
    os.setpgid(0, 0)  # Ctrl-C in a terminal is for the run's process
    for ending in ENDINGS:
        signal.signal(ending, signal.SIG_IGN if ending == signal.SIGINT else _leave)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDINGS)
    theirs.close()
    os.close(parent)
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()
    atexit._clear()  # what is registered is the run's process's to clean up
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = sys.__stderr__  # a progress bar may have taken them over
    told = take_log()
    for state in foreign:
        state.clear()
    with contextlib.suppress(EOFError, ConnectionError, SystemExit):
        while True:
            for message in pickle.loads(pipe.recv_bytes()):
                said = answer(message), [*told], sum(os.times()[:4])
                told.clear()
                pipe.send_bytes(pickle.dumps(said, pickle.HIGHEST_PROTOCOL))
    atexit._run_exitfuncs()


def _leave(*_: Any) -> None:
    sys.exit()


def _end_with_parent(alive: int) -> None:
    """Wait until the run's process is gone, which holds the other end of this pipe; then end with all that was started."""
    os.read(alive, 1)
    time.sleep(_PATIENCE)  # after an orderly end this process is gone by now
    os.killpg(0, signal.SIGKILL)


def take_log() -> list[tuple[int, str]]:
    """Return the list to which Flower's log is written from now on."""
    told: list[tuple[int, str]] = []

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append((record.levelno, record.getMessage()))

    logging.getLogger("flwr").handlers = [Told()]
    return told


def log_again(told: Sequence[tuple[int, str]]) -> None:
    """Write to this process's log what another process wrote to its own."""
    for level, sentence in told:
        logging.getLogger("flwr").log(level, "%s", sentence)
