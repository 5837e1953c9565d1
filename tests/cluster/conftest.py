from collections.abc import Iterator

import pytest

from deploy.local_cluster import LocalCluster
from tests.support.ray_cluster import ray_cluster


@pytest.fixture(scope="package")
def local_cluster() -> Iterator[LocalCluster]:
    """One Ray cluster for all of these tests: each uses an app of its own."""
    with ray_cluster() as cluster:
        yield cluster
