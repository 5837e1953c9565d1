"""Workers that come and go under a served app while it streams: by load, and for another revision of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.config import SluiceConfig
from cluster.config_file import parse
from cluster.membership import Member, Membership, MemberState
from deploy import life
from deploy.local_app import LocalApp
from tests.support.checkpoints import checkpoint
from tests.support.revision import another_revision
from tests.support.steady_load import Load

pytestmark = [pytest.mark.full, pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]

LOOKS = 400  # at the members, each after an answer more


def config(path: str) -> SluiceConfig:
    """Four streams fill a decode worker."""
    return parse(
        {
            "name": "rolling",
            "model": {"path": path, "served_name": "model"},
            "kv": {"num_blocks": 128, "block_size": 8},
            "scheduler": {"max_sequences": 4},
            "pools": {"prefill": {"workers": 1}, "decode": {"workers": 1, "max_workers": 2}},
            "autoscaling": {"enabled": True, "up_after_s": 1, "down_after_s": 3, "inter_token_s": 10, "ttft_s": 60},
            "http": {"port": 0, "replicas": 2},
        }
    )


@pytest.fixture(scope="module")
def app() -> Iterator[LocalApp]:
    app = LocalApp(config(str(checkpoint("llama"))), lambda _: None)
    try:
        app.start()
        yield app
    finally:
        app.stop()


def members() -> tuple[Member, ...]:
    return Membership.from_wire(life.status("rolling").membership).members


def serving(pool: str) -> list[str]:
    """Incarnations that take new requests."""
    return [m.incarnation for m in members() if m.pool == pool and m.state is MemberState.READY]


def until(load: Load, holds: Callable[[], bool]) -> None:
    """While the load goes on, whole and right."""
    for _ in range(LOOKS):
        if holds():
            return
        load.wait_for(1)
    raise AssertionError(f"still not so: {members()}")


def test_a_pool_grows_and_shrinks_with_its_streams_and_loses_none(app: LocalApp) -> None:
    (first,) = serving("decode")
    with Load(app.url, num_streams=6) as load:
        until(load, lambda: len(serving("decode")) == 2)
        load.wait_for(12)
    assert not load.failures and first in serving("decode")
    with Load(app.url, num_streams=1) as load:
        until(load, lambda: [m.pool for m in members()].count("decode") == 1)
        load.wait_for(3)
    assert not load.failures


def test_another_revision_takes_over_under_load_and_no_stream_is_lost(app: LocalApp, tmp_path: Path) -> None:
    before = {m.incarnation for m in members()}
    hashes = {m.compatibility_hash for m in members()}
    with Load(app.url, num_streams=2) as load:
        load.wait_for(3)
        app.redeploy(config(another_revision(checkpoint("llama"), tmp_path)))
        until(load, lambda: not before & {m.incarnation for m in members()})
        load.wait_for(6)
    assert not load.failures
    after = members()
    assert {m.pool for m in after} == {"prefill", "decode"}
    assert len({m.compatibility_hash for m in after}) == 1 and not hashes & {m.compatibility_hash for m in after}
