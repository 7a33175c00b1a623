"""What Prometheus reads of a server's certificate: how long it lasts, as the server shows it."""

import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime

from prometheus_client.core import GaugeMetricFamily, Metric

from quickbloom.common.system import loopback, tls

PAUSE = 60.0
"""Seconds between two looks at the server, however often Prometheus asks."""


class CertificateMetrics:
    """A collector of prometheus_client for the certificate of the server at HOST:PORT."""

    def __init__(self, server: str) -> None:
        """Raises ConfigError for anything but HOST:PORT."""
        self._server = server
        self._address = loopback.split_address("--server", server, "superlink:9092")
        self._looking = threading.Lock()
        self._looked = -PAUSE
        self._end: datetime | None = None

    def collect(self) -> Iterator[Metric]:
        """Yield the seconds that are left, negative once it has ended; no value while the server does not answer."""
        with self._looking:
            if time.monotonic() - self._looked >= PAUSE:
                self._end, self._looked = self._look(), time.monotonic()
        text = "seconds until the certificate that the server shows ends"
        family = GaugeMetricFamily("quickbloom_certificate_seconds", text, labels=["server"])
        if self._end is not None:
            family.add_metric([self._server], (self._end - datetime.now(UTC)).total_seconds())
        yield family

    def _look(self) -> datetime | None:
        try:
            return tls.end_of(tls.served(*self._address))
        except (OSError, ValueError):
            return None
