from cluster.census import Census
from cluster.config import Role
from cluster.membership import Member, Membership, MemberState
from cluster.metrics import Metrics


class Counted:
    def __init__(self) -> None:
        self.metrics = Metrics()
        self.census = Census(self.metrics)
        self.version = 0

    def see(self, **states: str) -> None:
        """By incarnation, e.g. decode_0_a="ready"."""
        self.version += 1
        members = tuple(self.member(incarnation, MemberState(state)) for incarnation, state in states.items())
        self.census.take(Membership(self.version, members))

    def member(self, incarnation: str, state: MemberState) -> Member:
        pool, index, _ = incarnation.split("_")
        name = f"{pool}-{index}"
        return Member(name=name, pool=pool, incarnation=incarnation, address="", roles=(Role(pool),), state=state)

    def workers(self, pool: str, state: str) -> float:
        return self.metrics.value("sluice_cluster_workers", {"pool": pool, "state": state})

    def restarts(self, pool: str) -> float:
        return self.metrics.value("sluice_cluster_restarts_total", {"pool": pool})


def test_workers_are_counted_by_pool_and_state_and_fall_back_to_zero() -> None:
    counted = Counted()
    counted.see(decode_0_a="ready", decode_1_a="starting", prefill_0_a="ready")
    assert counted.workers("decode", "ready") == counted.workers("decode", "starting") == 1
    counted.see(decode_0_a="ready", decode_1_a="ready", prefill_0_a="draining")
    assert (counted.workers("decode", "ready"), counted.workers("decode", "starting")) == (2, 0)
    assert (counted.workers("prefill", "ready"), counted.workers("prefill", "draining")) == (0, 1)
    counted.see()
    assert counted.workers("decode", "ready") == counted.workers("prefill", "draining") == 0
    assert 'sluice_cluster_workers{pool="decode",state="ready"} 0.0' in counted.metrics.render().decode()


def test_a_restart_is_a_name_that_comes_back() -> None:
    counted = Counted()
    counted.see(decode_0_a="ready", prefill_0_a="ready")
    counted.see(prefill_0_a="ready")
    assert counted.restarts("decode") == 0
    counted.see(decode_0_b="starting", prefill_0_a="ready")
    counted.see(decode_0_b="ready", prefill_0_a="ready")
    assert (counted.restarts("decode"), counted.restarts("prefill")) == (1, 0)


def test_a_rolling_replacement_is_a_restart_and_shrinking_and_growing_again_is_none() -> None:
    counted = Counted()
    counted.see(decode_0_a="ready", decode_1_a="ready")
    counted.see(decode_0_a="draining", decode_0_b="ready", decode_1_a="draining")
    assert counted.restarts("decode") == 1
    counted.see(decode_0_b="ready")
    counted.see(decode_0_b="ready", decode_1_b="ready")
    assert counted.restarts("decode") == 1
