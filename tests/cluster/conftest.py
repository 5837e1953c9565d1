"""One Ray cluster for the files of this folder that want one: each test uses an app of its own."""

from collections.abc import Iterator

import pytest

from deploy.local_cluster import LocalCluster
from tests.support.ray_cluster import ray_cluster


@pytest.fixture(scope="package")
def local_cluster() -> Iterator[LocalCluster]:
    with ray_cluster() as cluster:
        yield cluster
