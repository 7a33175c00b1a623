"""The connection to a Ray cluster, and what is to be asked of it."""

import os
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from quickbloom.common.config.parts import own_parts
from quickbloom.common.config.run import RunConfig
from quickbloom.common.errors import ConfigError, RunError, in_one_line
from quickbloom.common.system.extras import needs
from quickbloom.server_app.ray_cluster.address import AUTO, CLIENT, check_answers

_KNOWN_FOR = 5.0
"""Seconds after which the number of processors is asked for anew."""
_GONE = 30.0
"""Seconds without an answer after which the head is lost. After 60 Ray ends the process, without a sentence."""


class Processors:
    """How many processors the cluster has: machines come and go.

    `head`: its address, HOST:PORT or ray://HOST:PORT; "": it is taken to answer.
    """

    def __init__(self, ray: Any, head: str = "") -> None:
        self._ray, self._head = ray, head
        self._known, self._until = 1, 0.0
        self._silent_since: float | None = None

    @property
    def silent(self) -> bool:
        """Whether the head did not answer when it was asked last."""
        return self._silent_since is not None

    def __call__(self) -> int:
        """Return the number, as it was up to some seconds ago. Raises RunError if the head is lost."""
        if time.monotonic() >= self._until:
            if self._answers():  # else Ray would wait for it, deaf to Ctrl-C
                self._known = max(1, int(self._ray.cluster_resources().get("CPU", 1)))
            self._until = time.monotonic() + _KNOWN_FOR
        return self._known

    def _answers(self) -> bool:
        asked = time.monotonic()
        try:
            if self._head:
                check_answers(self._head)
        except (OSError, ValueError, OverflowError) as error:
            self._silent_since = asked if self._silent_since is None else self._silent_since
            if time.monotonic() - self._silent_since >= _GONE:
                raise RunError(
                    f"the head of the Ray cluster at {self._head} is lost ({in_one_line(error)}): start the cluster again, "
                    "or go on without `--ray`"
                ) from None
            return False
        self._silent_since = None
        return True


def connect(address: str) -> Any:
    """Return the module `ray`, connected to the cluster at `address`: HOST:PORT, ray://HOST:PORT or "auto".

    A program that is connected already stays so. Raises ConfigError where there is none, and without Ray.
    """
    ray: Any = needs("simulation", "ray", "`--ray`")
    if ray.is_initialized():
        there = str(ray.get_runtime_context().gcs_address)
        if address != AUTO and not is_same(address, there):
            raise ConfigError(
                f"`ray` must be the cluster that this program is connected to, {there} or {AUTO}, got '{address}'"
            )
        return ray
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        check_answers(address)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what Ray will do in later releases
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (OSError, ValueError, OverflowError, RuntimeError, ImportError) as error:
        raise ConfigError(
            f"`--ray` must be the address of a Ray cluster that is running, HOST:PORT or {AUTO}, got '{address}', which does "
            f"not answer ({in_one_line(error)}): start one with `ray start --head`"
        ) from None
    return ray


def is_lost(error: ConnectionError) -> RunError:
    """Return what to say where the connection of ray://HOST:PORT has ended: Ray does not connect again."""
    return RunError(
        f"the connection to the Ray cluster is lost ({in_one_line(error)}): see that its head runs, and repeat the command, or "
        "go on without `--ray`"
    )


def head_of(ray: Any, address: str) -> str:
    """Return the address of the head that has to answer, for one that `connect` took."""
    return str(ray.get_runtime_context().gcs_address) if address == AUTO else address


def is_same(address: str, known: str) -> bool:
    """Whether HOST:PORT is the address `known`, which Ray tells with a number for the host, never that of loopback."""
    (host, _, port), (there, _, known_port) = address.removeprefix(CLIENT).rpartition(":"), known.rpartition(":")
    try:
        return port == known_port and (host == there or socket.gethostbyname(host) in (there, "127.0.0.1"))
    except OSError:
        return False


@contextmanager
def disconnected_afterwards() -> Iterator[None]:
    """End a connection that is made within this context; one of the caller's stays."""
    ray: Any = sys.modules.get("ray")
    kept = ray is not None and ray.is_initialized()
    try:
        yield
    finally:
        ray = sys.modules.get("ray")
        if ray is not None and not kept:
            ray.shutdown()


def check_parts(config: RunConfig, instead: str) -> None:
    """Raise ConfigError for parts that only this process knows. `instead`: an alternative, as the end of the sentence."""
    if own := own_parts(config):
        raise ConfigError(
            f"`--ray` needs parts of this project, and the {next(iter(own))} is one of your own, which Ray's processes do not "
            f"know: {instead}"
        )
