"""A cluster for every test that asks for one."""

from collections.abc import Iterator

import pytest
from ray_machines import Cluster


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    import ray

    made = Cluster()
    try:
        yield made
    finally:
        ray.shutdown()
        made.close()
