from collections.abc import Iterator

import pytest

from deploy.local_cluster import LocalCluster
from tests.support.ray_cluster import ray_cluster


@pytest.fixture(scope="module")
def local_cluster() -> Iterator[LocalCluster]:
    """One Ray cluster for the tests of a file: each uses an app of its own."""
    with ray_cluster() as cluster:
        yield cluster
