"""Whatever a peer asks of a worker that shares its secret: the worker lives, serves others, and keeps nothing of it.

A whole worker in this process; every message goes over a real session.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from random import Random

import grpc
import pytest

from benchmarks import checkpoint
from cluster import config_file
from cluster.config import LogConfig, Role
from cluster.log import Log
from cluster.membership import Member
from cluster.protos import worker_pb2 as pb
from cluster.request import RequestKey
from cluster.rpc import Dialer, Session, WordsThread
from tests.fuzz import frames
from tests.support.words import SECRET, Recorder, identity, raw_stream, words_config
from workers.assembly import WorkerSettings
from workers.worker import Worker

IDS = ("a", "b", "c", "d", "")
ASKED = (
    "submit",
    "cancel",
    "kv_request",
    "encode_request",
    "release",
    "held_request",
    "ticket",
    "kv_failed",
    "block_query",
)
MESSAGES = 20  # of one session, in the middle: short ones live to their end
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


class Bystander:
    """A peer that asks for something sensible, before and after."""

    def __init__(self, words: WordsThread, member: Member) -> None:
        self._heard = Recorder()
        self._member = member
        Dialer(words, identity("ingress-0", kind=pb.INGRESS), SECRET, self._heard).keep(member.address)
        self.session: Session = self._heard.wait("open").session

    def answer(self, request_id: str) -> list[int]:
        key = RequestKey(request_id, 1)
        self.session.send(pb.Frame(submit=submit(self._member, key, PROMPT)), key)
        event = self._heard.wait(
            "frame",
            matching=lambda event: any(
                each.key.request_id == request_id and each.finish for each in event.frame.step_tokens.sequences
            ),
        )
        assert event.session is self.session
        told = [each for e in self._heard.events for each in e.frame.step_tokens.sequences if each.key == key.wire()]
        assert told[-1].finish == pb.LENGTH, told[-1]
        return [token for each in told for token in each.token_ids]

    def load(self) -> pb.LoadReport:
        number = self._heard.count("frame") + 1000
        self.session.send(pb.Frame(admin_request=pb.AdminRequest(id=number, load=True)))
        event = self._heard.wait("frame", matching=lambda event: event.frame.admin_response.id == number)
        return event.frame.admin_response.load


def submit(member: Member, key: RequestKey, prompt: list[int]) -> pb.Submit:
    me = pb.WorkerRef(name=member.name, incarnation=member.incarnation)
    return pb.Submit(
        key=key.wire(),
        plan=pb.Plan(
            stages=[pb.StagePlan(stage=pb.PREFILL, worker=me), pb.StagePlan(stage=pb.DECODE, worker=me)],
            local_prefill_allowed=True,
        ),
        prompt_token_ids=prompt,
        sampling=pb.SamplingParams(max_tokens=6, ignore_eos=True, top_p=1.0),
    )


@pytest.fixture(scope="module")
def crashes() -> list[BaseException]:
    return []


@pytest.fixture(scope="module")
def member(crashes: list[BaseException], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Member]:
    path = checkpoint.write(tmp_path_factory.mktemp("model"), checkpoint.TINY)
    config = config_file.load(
        None,
        settings={
            "model.path": str(path),
            "model.load_format": "dummy",
            "kv.block_size": 4,
            "kv.num_blocks": 64,
            "scheduler.max_waiting": 64,
            "transfer.late_read_s": 0.1,
            "transfer.stuck_read_s": 0.2,
            "words.port_min": 0,
            "words.port_max": 0,
            "words.heartbeat_timeout_s": 20.0,
            "words.step_timeout_s": 20.0,
        },
    )
    settings = WorkerSettings.of(config, "decode", "worker-0", SECRET)
    both = settings.resources.model_copy(update={"roles": (Role.PREFILL, Role.DECODE)})
    settings = replace(settings, resources=both)
    worker = Worker(settings, Log.open("worker", LogConfig(level="error")), on_crash=crashes.append)
    yield worker.start()
    worker.stop()


def sensible(random: Random, member: Member) -> pb.Frame:
    """A request that would be served, with one of its fields changed at times."""
    prompt = [random.randrange(64) for _ in range(random.choice((1, 4, 9, 30)))]
    made = submit(member, RequestKey(random.choice(IDS), random.randrange(3)), prompt)
    if random.random() < 0.5:
        strange = frames.frame(random, IDS, ["submit"]).submit
        name = random.choice([field.name for field, _ in strange.ListFields()] or ["shard"])
        made.ClearField(name)
        single = pb.Submit()
        for field, value in strange.ListFields():
            if field.name != name:
                continue
            if field.is_repeated:
                getattr(single, name).extend(value)
            elif field.message_type is not None:
                getattr(single, name).CopyFrom(value)
            else:
                setattr(single, name, value)
        made.MergeFrom(single)
    return pb.Frame(submit=made)


def drawn(random: Random, member: Member) -> bytes:
    roll = random.random()
    if roll < 0.3:
        return sensible(random, member).SerializeToString()
    if roll < 0.9:
        return frames.frame(random, IDS, ASKED).SerializeToString()
    return frames.message(random, IDS)


def attack(member: Member, seeds: range) -> int:
    """How many sessions were still open after all their messages."""
    num_open = 0
    for seed in seeds:
        random = Random(seed)
        kind = random.choice((pb.INGRESS, pb.WORKER, pb.TOOL))
        with raw_stream(member.address) as raw:
            raw.shake(identity(f"fuzzer-{seed}", kind=kind))
            for _ in range(random.randrange(2 * MESSAGES)):
                raw.write(drawn(random, member))
            raw.write(pb.Frame(admin_request=pb.AdminRequest(id=seed + 1, load=True)).SerializeToString())
            with suppress(grpc.RpcError, StopIteration):
                while raw.read_kind("admin_response").admin_response.id != seed + 1:
                    pass
                num_open += 1
    return num_open


def survives(member: Member, crashes: list[BaseException], seeds: range) -> int:
    with WordsThread(config=words_config(heartbeat_timeout_s=20.0)) as words:
        bystander = Bystander(words, member)
        expected = bystander.answer("before")
        assert len(expected) == 6
        num_open = attack(member, seeds)
        assert crashes == []
        assert bystander.session.error is None
        assert bystander.answer("after") == expected
        while True:  # what rests rests for some tenths of a second
            load = bystander.load()
            group = load.groups[0]
            if group.free + group.cached == group.num_blocks and not load.num_leases:
                break
        assert load.num_waiting == load.num_running == load.num_pulling == 0
    return num_open


def test_a_worker_bears_whatever_is_asked_of_it(member: Member, crashes: list[BaseException]) -> None:
    """Some 1,000 messages in 50 sessions."""
    assert survives(member, crashes, range(50)) > 0


@pytest.mark.full
@pytest.mark.timeout(600)
def test_the_long_form(member: Member, crashes: list[BaseException]) -> None:
    """Some 40,000 messages in 2,000 sessions."""
    assert survives(member, crashes, range(1000, 3000)) > 0
