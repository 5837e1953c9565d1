"""What changes under a running app without a client noticing: two ingress replicas under load."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest

from cluster.config import SluiceConfig
from cluster.config_file import parse
from cluster.errors import SluiceError
from cluster.membership import Membership
from deploy import life
from deploy.local_app import LocalApp
from tests.support.checkpoints import checkpoint
from tests.support.steady_load import Load

pytestmark = [pytest.mark.full, pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(240)]


def config(decode: int, **changes: object) -> SluiceConfig:
    return parse(
        {
            "name": "redeploy",
            "model": {"path": str(checkpoint("llama")), "served_name": "model"},
            "kv": {"num_blocks": 128, "block_size": 8},
            "pools": {"prefill": {"workers": 1}, "decode": {"workers": decode}},
            "http": {"port": 0, "replicas": 2},
            **changes,
        }
    )


@pytest.fixture(scope="module")
def app() -> Iterator[LocalApp]:
    app = LocalApp(config(1), lambda _: None)
    try:
        app.start()
        yield app
    finally:
        app.stop()


def members() -> Membership:
    return Membership.from_wire(life.status("redeploy").membership)


def test_a_redeploy_with_another_pool_size_under_load_loses_nothing(app: LocalApp) -> None:
    before = members()
    with Load(app.url) as load:
        load.wait_for(3)
        app.redeploy(config(2))
        load.wait_for(10)
        grown = members()
        app.redeploy(config(1))
        load.wait_for(10)
    assert {m.incarnation for m in before.members} < {m.incarnation for m in grown.members}
    assert [m.name for m in grown.members] == ["decode-0", "decode-1", "prefill-0"]


def test_a_redeploy_that_cannot_start_says_why_and_changes_nothing(app: LocalApp) -> None:
    with Load(app.url) as load:
        load.wait_for(3)
        with pytest.raises(SluiceError, match=r"http\.api_keys_file: /nowhere cannot be read"):
            app.redeploy(config(1, http={"port": 0, "replicas": 2, "api_keys_file": "/nowhere"}))
        load.wait_for(5)


def test_deletion_leaves_nothing(app: LocalApp) -> None:
    assert app._cluster is not None
    directory = app._cluster.directory
    processes = app._cluster.processes()
    assert len(processes) > 5
    app.stop()
    assert [p.pid for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    assert not directory.exists()
