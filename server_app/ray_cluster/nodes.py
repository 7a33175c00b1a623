"""The nodes of one run on a Ray cluster that is running: an actor with one processor computes them in turn, as many as fit.

A node's context goes to the actor with its message and comes back with the reply, so a machine that is lost takes no state
along: its messages go to another. A node is computed by the actor that had it before, if that is free, which has read its data.
The machines share nothing but the software and, at the same paths, the data; both are compared before a machine may help.
"""

import os
import socket
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message

from quickbloom import __version__
from quickbloom.common.config.run import RunConfig, Scalar, parse_run_config
from quickbloom.common.errors import QuickbloomError, RunError, in_one_line
from quickbloom.common.formatting import counted
from quickbloom.common.system import user_code
from quickbloom.common.system.terminal import say
from quickbloom.server_app.comparing.fingerprint import of_run
from quickbloom.server_app.launch.flower_run import CPU_ENVIRONMENT, QUIET
from quickbloom.server_app.messaging.in_process_grid import Elsewhere, answered, client_app
from quickbloom.server_app.messaging.worker_processes import log_again, take_log
from quickbloom.server_app.ray_cluster.connecting import Processors, check_parts, connect, head_of, is_lost

_LOOK = 1.0
"""Most seconds in one call of Ray's, which does not hear Ctrl-C; then more machines may be there."""
_TELLS = 30.0
"""Seconds without any processor after which a line says so."""
_TRIES = 3
"""How often a message is sent that is lost with its process or machine, and how many processes in turn may fail to begin."""


def nodes_on(address: str, config: RunConfig) -> Elsewhere:
    """Return what computes the nodes of this run on the cluster at `address`: HOST:PORT, ray://HOST:PORT or "auto".

    Raises ConfigError where there is none, and for parts that only this process knows.
    """
    check_parts(config, "leave it out")
    ray = connect(address)
    facts = Facts(config.flat(), of_run(config, {}).digest, str(Path.cwd()))
    head = head_of(ray, address)
    return lambda contexts: RayNodes(ray, contexts, facts, head)


@dataclass(frozen=True)
class Facts:
    """What a machine needs to know before it helps. `data`: their hash; `folder`: where the command was started."""

    settings: Mapping[str, Scalar]
    data: str
    folder: str
    release: str = __version__


Answer = tuple[Message | None, Context | None, list[tuple[int, str]], float]
"""A node's reply, its context afterwards, what it logged, and the processor seconds of its process until now."""


class ComputesNodes:
    """An actor's inside: one process on some machine of the cluster."""

    def begin(self, facts: Facts) -> tuple[str, str]:
        """Make ready; return (this machine's name, why it cannot help or "")."""
        self._begun = socket.gethostname(), self._why_not(facts)
        return self._begun

    def there(self) -> tuple[str, str]:
        """Return what `begin` returned: this process is still there."""
        return self._begun

    def _why_not(self, facts: Facts) -> str:
        if facts.release != __version__:
            return f"it has quickbloom {__version__} instead of {facts.release}"
        if Path(facts.folder).is_dir():
            os.chdir(facts.folder)
            os.environ[user_code.FOLDER] = facts.folder
        torch.set_num_threads(1)
        self._told = take_log()
        try:
            if of_run(parse_run_config(dict(facts.settings)), {}).digest != facts.data:
                return "its data are not those of the machine where the run was started"
            self._app = client_app()
        except QuickbloomError as error:
            return str(error)
        return ""

    def answer(self, message: Message, context: Context | None) -> Answer:
        """Have a node answer; an error reply without its context."""
        reply = answered(self._app, message, context)
        told = [*self._told]
        self._told.clear()
        return reply, context, told, sum(os.times()[:4])


class RayNodes:
    """The actors of a run, as its process sees them."""

    def __init__(self, ray: Any, contexts: Mapping[int, Context], facts: Facts, head: str = "") -> None:
        """Ask for the first actors. `contexts`: by node id; they are brought up to date with every reply.

        `head`: the address that has to answer as long as the run goes on.
        """
        self._ray, self._contexts = ray, contexts
        self._processors = Processors(ray, head)
        self._had = 0
        self._facts = facts
        share = gpu_share(ray.cluster_resources(), len(contexts))
        environment = {**CPU_ENVIRONMENT, **QUIET}
        options = {"num_cpus": 1, "num_gpus": share, "max_restarts": 0, "runtime_env": {"env_vars": environment}}
        self._actor = ray.remote(ComputesNodes).options(**options)
        self._coming: dict[Any, Any] = {}
        """Actors that are not ready, by the reference to what `begin` returns."""
        self._free: list[Any] = []
        self._busy: dict[Any, tuple[Any, Message]] = {}
        self._before: dict[int, Any] = {}
        """Which actor has computed a node last."""
        self._seconds: dict[Any, float] = {}
        self._hosts: dict[Any, str] = {}
        """The machine of every actor that has been ready."""
        self._useless: list[Any] = []
        """Actors on machines that cannot help: they keep their processors, so that Ray starts no others there."""
        self._remarks: set[str] = set()
        self._failed = 0
        self._grow()

    @property
    def number(self) -> int:
        """How many actors have computed nodes, those that were lost too."""
        return max(1, len(self._seconds))

    @property
    def cpu_seconds(self) -> float:
        """Processor seconds of all actors, up to their last replies."""
        return sum(self._seconds.values())

    def replies(self, messages: Sequence[Message]) -> Iterator[tuple[Message, Message | None]]:
        """Yield every message with its reply, as they come; a message that is lost on its way is sent again.

        Raises RunError if no machine can help, for a message that is lost every time, and if the cluster is lost.
        """
        try:
            yield from self._replies(messages)
        except ConnectionError as error:
            raise is_lost(error) from None

    def _replies(self, messages: Sequence[Message]) -> Iterator[tuple[Message, Message | None]]:
        waiting, lost = deque(messages), dict.fromkeys((message.metadata.message_id for message in messages), 0)
        idle, told = time.monotonic(), False
        while waiting or self._busy:
            self._grow()
            while waiting and self._free:
                self._send(waiting)
            if self._busy:
                idle = time.monotonic()
            elif not told and time.monotonic() - idle > _TELLS:
                say("The Ray cluster has no free processor for this run: it waits")
                told = True
            for reference in self._done():
                if reference in self._coming:
                    self._welcome(reference)
                    continue
                actor, message = self._busy.pop(reference)
                try:
                    reply, context, said, self._seconds[actor] = self._ray.get(reference)
                except self._ray.exceptions.RayError as error:
                    self._fail_unless_lost(error)
                    lost[message.metadata.message_id] += 1
                    if lost[message.metadata.message_id] == _TRIES:
                        raise RunError(
                            f"a message to a node was lost {counted(_TRIES, 'time')} with what computed it "
                            f"({_first_sentence(error)}): give Ray's machines more memory, or run without `--ray`"
                        ) from None
                    say(f"What computed a node on {self._hosts[actor]} is gone ({_first_sentence(error)}); another one does it")
                    self._before = {node: known for node, known in self._before.items() if known is not actor}
                    self._look_after(self._hosts[actor])
                    waiting.appendleft(message)
                    continue
                self._free.append(actor)
                log_again(said)
                if context is not None:
                    self._contexts[context.node_id].state = context.state
                yield message, reply

    def close(self) -> None:
        """End the actors."""
        if self._processors.silent:
            return  # Ray would wait for the head, and end this process without a word; the actors end by themselves
        for actor in [*self._free, *self._useless, *self._coming.values(), *(actor for actor, _ in self._busy.values())]:
            with suppress(Exception):  # the cluster may be gone
                self._ray.kill(actor)

    def _done(self) -> list[Any]:
        """Return references to what has ended, as soon as something has."""
        if looked_at := [*self._busy, *self._coming]:
            done, _ = self._ray.wait(looked_at, timeout=_LOOK)
            return list(done)
        time.sleep(_LOOK)
        return []

    def _grow(self) -> None:
        """Ask for an actor for each processor, at most one a node. Ray starts it where there is room, now or later."""
        processors = self._processors()
        if processors < self._had:
            self._look_after()
        if processors > self._had:
            self._failed = 0  # the machines may be others
        self._had = processors
        if self._failed >= _TRIES:
            return
        helping = len(self._free) + len(self._busy) + len(self._coming)
        for _ in range(min(len(self._contexts), processors - len(self._useless)) - helping):
            actor = self._actor.remote()
            self._coming[actor.begin.remote(self._facts)] = actor

    def _remark(self, sentence: str) -> None:
        if sentence not in self._remarks:
            say(f"Remark: {sentence}")
            self._remarks.add(sentence)

    def _some_help(self) -> bool:
        return bool(self._free or self._busy or self._coming)

    def _look_after(self, host: str = "") -> None:
        """Ask the idle actors of a machine, or all, whether they are there: else each lost one would take a message along."""
        for idle in (self._free, self._useless):
            for actor in [actor for actor in idle if host in ("", self._hosts[actor])]:
                idle.remove(actor)
                self._coming[actor.there.remote()] = actor

    def _welcome(self, reference: Any) -> None:
        """Let an actor compute that is ready. Raises RunError if nobody can."""
        actor = self._coming.pop(reference)
        try:
            host, why_not = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            self._fail_unless_lost(error)
            if actor in self._hosts:  # it was idle when it was lost
                return
            self._failed += 1
            if self._failed < _TRIES:
                return
            sentence = (
                f"Ray's machines could not start what computes nodes ({_first_sentence(error)}): each of them needs quickbloom "
                "in the Python of its Ray"
            )
            if not self._some_help():
                raise RunError(sentence) from None
            if self._failed == _TRIES:
                self._remark(f"{sentence}; the run goes on with those that could")
            return
        self._failed = 0 if self._failed < _TRIES else self._failed
        self._hosts[actor] = host
        if not why_not:
            self._free.append(actor)
            return
        self._useless.append(actor)
        self._grow()  # another machine may have room
        sentence = (
            f"the machine {host} of the Ray cluster cannot compute nodes: {why_not}; make it like this one, or take it out"
        )
        if not self._some_help():
            raise RunError(sentence)
        self._remark(sentence)

    def _send(self, waiting: deque[Message]) -> None:
        """Give a free actor a message: one to a node that it has computed before, or nobody has; else that of another."""
        actor = self._free.pop()
        known = (i for i, message in enumerate(waiting) if self._before.get(message.metadata.dst_node_id, actor) is actor)
        place = next(known, 0)
        message = waiting[place]
        del waiting[place]
        node_id = message.metadata.dst_node_id
        self._before[node_id] = actor
        self._busy[actor.answer.remote(message, self._contexts.get(node_id))] = actor, message

    def _fail_unless_lost(self, error: Exception) -> None:
        """Raise RunError for an exception of the code, which would come again."""
        if isinstance(error, self._ray.exceptions.RayTaskError):
            cause = in_one_line(getattr(error, "cause", None) or error)
            raise RunError(f"a Ray task of this run failed ({cause}): run without `--ray`") from None


def gpu_share(resources: Mapping[str, float], nodes: int) -> float:
    """Return the share of a GPU for each actor, so that all GPUs are used and none waits for one; 0 without GPUs."""
    gpus, actors = resources.get("GPU", 0.0), max(1, min(nodes, int(resources.get("CPU", 1.0))))
    return min(1.0, int(1e4 * gpus / actors) / 1e4)


def _first_sentence(error: BaseException) -> str:
    """The first sentence, behind which Ray goes on with advice."""
    return in_one_line(error).partition(". ")[0]
