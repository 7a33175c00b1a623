"""The connection to a Ray cluster, and what is to be asked of it."""

import os
import time
import warnings
from typing import Any

from quickbloom.common.config.parts import own_parts
from quickbloom.common.config.run import RunConfig
from quickbloom.common.errors import ConfigError, in_one_line
from quickbloom.common.system.extras import needs
from quickbloom.server_app.ray_cluster.address import AUTO, check_answers

_KNOWN_FOR = 5.0
"""Seconds after which the number of processors is asked for anew."""


class Processors:
    """How many processors the cluster has: machines come and go."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._known, self._until = 1, 0.0

    def __call__(self) -> int:
        if time.monotonic() >= self._until:
            self._known = max(1, int(self._ray.cluster_resources().get("CPU", 1)))
            self._until = time.monotonic() + _KNOWN_FOR
        return self._known


def connect(address: str) -> Any:
    """Return the module `ray`, connected to the cluster at `address`: HOST:PORT, ray://HOST:PORT or "auto".

    Raises ConfigError where there is none, and without Ray.
    """
    ray: Any = needs("simulation", "ray", "`--ray`")
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


def check_parts(config: RunConfig, instead: str) -> None:
    """Raise ConfigError for parts that only this process knows. `instead`: an alternative, as the end of the sentence."""
    if own := own_parts(config):
        raise ConfigError(
            f"`--ray` needs parts of this project, and the {next(iter(own))} is one of your own, which Ray's processes do not "
            f"know: {instead}"
        )
