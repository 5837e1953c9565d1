"""A world of three workers that pull KV from one another while everything goes wrong at random.

Every worker is real (block manager, ledger, planner, executor, byte buffers); the requests here play scheduler and
stage files. Block content is derived from what its hash stands for, so that a wrong byte anywhere is seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random

import numpy as np

from cluster.request import RequestKey
from kvtransfer.connector import BlockPair, BlockSpan, Outcome, PullResult
from kvtransfer.loopback import LoopbackFabric
from tests.support.kv_builders import T_S, Clock, KvWorker
from tests.support.kv_prompts import BYTES, GEOMETRY, MAX_PROMPT_BLOCKS, NUM_CHAINS, Node, Request, hash_of, prompt
from workers.engine.block_manager import BlockState

NUM_WORKERS = 3
NUM_BLOCKS = 9
MAX_REQUESTS = 7


class World:
    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.fabric = LoopbackFabric()
        self.clock = Clock()
        self.seen: Counter[str] = Counter()
        self.requests: list[Request] = []
        self._num_made = 0
        self._rests: list[tuple[float, Node, set[int]]] = []  # end, node, blocks that a stuck read may still write
        self.nodes = [self._new_node() for _ in range(NUM_WORKERS)]
        for node in self.nodes:
            self._connect(node)
        self.actions: list[tuple[Callable[[], None], int]] = [
            (self.act_request, 14),
            (self.act_chunk, 18),
            (self.act_ticket, 18),
            (self.act_run, 24),
            (self.act_copy_some, 5),
            (self.act_finish, 5),
            (self.act_cancel, 3),
            (self.act_end_session, 2),
            (self.act_early_release, 3),
            (self.act_time, 6),
            (self.act_renew, 3),
            (self.act_retire, 4),
            (self.act_hold, 3),
            (self.act_resume, 4),
            (self.act_slow, 2),
            (self.act_fail, 2),
            (self.act_pressure, 4),
            (self.act_kill, 1),
        ]

    def run(self, num_operations: int) -> None:
        choices = self.random.choices(*zip(*self.actions, strict=True), k=num_operations)
        for action in choices:
            action()
            self.check()
        self.drain()

    # ------------------------------------------------------------------ what must always hold

    def check(self) -> None:
        owned: Counter[tuple[int, int]] = Counter()
        for request in self.requests:
            owned.update((id(request.source), block) for block in request.theirs)
            owned.update((id(request.sink), block) for block in request.ours)
        for node in self.nodes:
            worker = node.worker
            worker.check_integrity()
            mine = sum(count for (owner, _), count in owned.items() if owner == id(node))
            total = sum(worker.blocks.num_references(0, block) for block in range(1, NUM_BLOCKS + 1))
            pinned = worker.ledger.num_leased_blocks + worker.sink.num_pinned_blocks
            assert total == mine + pinned, f"{worker.name}: {total} references, {mine} + {pinned} owners"
            self._check_registered(worker)

    def _check_registered(self, worker: KvWorker) -> None:
        """What a prefix lookup may find has the bytes that its hash stands for."""
        hashes = worker.blocks.registered_hashes(0)
        if not hashes:
            return
        blocks = [worker.blocks.lookup(0, [hash_], 1)[0] for hash_ in hashes]
        contents = [int.from_bytes(hash_, "little") for hash_ in hashes]
        for storage, expected in zip(worker.ranks[0].pool.regions[0], BYTES, strict=True):
            held = storage.numpy().reshape(len(storage), -1)[blocks]
            assert np.array_equal(held, expected[contents]), f"{worker.name}: a cached block has wrong bytes"

    def drain(self) -> None:
        """Ends everything; then nothing may be left but free and cached blocks."""
        for node in self.nodes:
            for agent in node.worker.agents:
                self.fabric.resume(agent)
                self.fabric.slow(agent, 0)
        for request in list(self.requests):
            self._end(request, tell_source=True)
        for _ in range(8):
            self._advance(T_S)
            for node in self.nodes:
                self._run(node)
            self.check()
        for node in self.nodes:
            worker = node.worker
            counts = worker.blocks.counts(0)
            assert counts.free + counts.cached == NUM_BLOCKS, f"{worker.name}: {counts} after the end"
            assert worker.ledger.num_leases == worker.ledger.num_posted == worker.ledger.num_quarantined == 0
            assert not worker.ranks[0].transport.reads

    # ------------------------------------------------------------------ a request's life

    def act_request(self) -> None:
        if len(self.requests) >= MAX_REQUESTS:
            return
        source, sink = self.random.sample(self.nodes, 2)
        contents = prompt(self.random.randrange(NUM_CHAINS), self.random.randint(1, MAX_PROMPT_BLOCKS))
        hashes = [hash_of(content) for content in contents]
        hit = sink.worker.blocks.lookup(0, hashes, len(contents))
        sink.worker.blocks.acquire(0, hit)
        ours = sink.worker.blocks.reserve([len(contents) - len(hit)], for_transfer=True)
        if ours is None:
            sink.worker.blocks.release(0, hit)
            return
        cached = source.worker.blocks.lookup(0, hashes, len(contents) - 1)
        source.worker.blocks.acquire(0, cached)
        theirs = source.worker.blocks.reserve([len(contents) - len(cached)])
        if theirs is None:
            source.worker.blocks.release(0, cached)
            sink.worker.blocks.release(0, hit + ours[0])
            return
        self._num_made += 1
        key = RequestKey(f"r{self._num_made}", 0)
        self.requests.append(
            Request(
                key=key,
                contents=contents,
                source=source,
                sink=sink,
                theirs=cached + theirs[0],
                ours=hit + ours[0],
                num_computed=len(cached),
                first=len(hit),
                num_ticketed=len(hit),
                arrived=set(range(len(hit))),
            )
        )
        self.seen["hits at the sink"] += bool(hit)

    def act_chunk(self) -> None:
        """The source computes one or two blocks and tickets what is computed."""
        request = self._some(lambda r: bool(r.theirs) and r.num_ticketed < len(r.contents))
        if request is None:
            return
        worker = request.source.worker
        end = min(request.num_computed + self.random.randint(1, 2), len(request.contents))
        for index in range(request.num_computed, end):
            worker.write(0, request.theirs[index], request.contents[index])
            worker.blocks.mark_ready(0, request.theirs[index], hash_of(request.contents[index]))
        request.num_computed = end
        if end > request.num_ticketed:
            span = BlockSpan(0, request.num_ticketed, tuple(request.theirs[request.num_ticketed : end]))
            request.tickets.append(worker.source.publish(request.key, request.session, [span], self.clock.now))
            request.num_ticketed = end
        if end == len(request.contents) and self.random.random() < 0.7:
            self._source_lets_go(request)

    def act_ticket(self) -> None:
        request = self._some(lambda r: bool(r.tickets) and bool(r.ours))
        if request is None:
            return
        worker = request.sink.worker
        runs = request.tickets.pop(0)
        wanted = [request.ours[index] for run in runs for index, _, _ in run.indexed()]
        raises = worker.blocks.raises_of(0, wanted)
        span = BlockSpan(0, 0, tuple(request.ours))
        worker.submit(worker.sink.plan(request.key, request.source.worker.name, runs, [span], raises, self.clock.now))

    def act_finish(self) -> None:
        """A request whose blocks are all there has decoded its last token."""
        request = self._some(lambda r: bool(r.ours) and len(r.arrived) == len(r.contents))
        if request is not None:
            worker = request.sink.worker
            for block, content in zip(request.ours, request.contents, strict=True):
                assert worker.holds(0, block, content), f"{request.key}: wrong bytes at the end"
                assert worker.blocks.state(0, block) is BlockState.READY
            self._end(request, tell_source=True)
            self.seen["finished"] += 1

    def act_cancel(self) -> None:
        request = self._some(lambda r: True)
        if request is not None:
            self._end(request, tell_source=self.random.random() < 0.5)

    def _end(self, request: Request, *, tell_source: bool) -> None:
        self.requests.remove(request)
        self.seen["cancelled mid-read"] += request.sink.worker.sink.num_pulls_of(request.key) > 0
        self._release(request.sink, request.ours)
        self._source_lets_go(request)
        if tell_source:
            request.source.worker.source.release(request.key)

    def _source_lets_go(self, request: Request) -> None:
        self._release(request.source, request.theirs)
        request.theirs = []

    def _release(self, node: Node, blocks: list[int]) -> None:
        fence = node.step + 1 if self.random.random() < 0.3 else 0
        node.worker.blocks.release(0, blocks, fence=fence)

    # ------------------------------------------------------------------ bytes

    def act_run(self) -> None:
        self._run(self.random.choice(self.nodes))

    def act_copy_some(self) -> None:
        """Bytes arrive in the middle of nowhere, held or not."""
        reads = [read for node in self.nodes for read in node.worker.ranks[0].transport.reads.values()]
        if reads:
            self.random.choice(reads).copy(1)

    def _run(self, node: Node) -> None:
        node.worker.run_once()
        for result in node.worker.results():
            self._settle(node, result)

    def _settle(self, node: Node, result: PullResult) -> None:
        self.seen[result.outcome] += 1
        if result.outcome is Outcome.STUCK:
            blocks = {pair.sink_block for pair in result.pull.pairs}
            self._rests.append((self.clock.now + 2 * T_S, node, blocks))
        request = next((request for request in self.requests if request.key == result.key), None)
        if request is None:
            self.seen["abandoned"] += 1
            return
        if result.outcome is Outcome.STUCK:
            self._end(request, tell_source=True)
            return
        arrived = self._accept(request, result.valid_pairs)
        missing = [request.ours.index(pair.sink_block) for pair in result.pull.pairs if pair not in arrived]
        for index in missing:  # local recompute, which is allowed now: no read is in flight into these blocks
            self._become_ready(request, index, compute=True)
        self.seen["recomputed"] += len(missing)
        if len(request.arrived) == len(request.contents):
            request.source.worker.source.release(request.key)

    def _accept(self, request: Request, pairs: tuple[BlockPair, ...]) -> set[BlockPair]:
        for pair in pairs:
            index = request.ours.index(pair.sink_block)
            assert request.sink.worker.holds(0, pair.sink_block, request.contents[index]), "wrong bytes were accepted"
            self._become_ready(request, index, compute=False)
        return set(pairs)

    def _become_ready(self, request: Request, index: int, *, compute: bool) -> None:
        worker, block, content = request.sink.worker, request.ours[index], request.contents[index]
        if compute:
            worker.write(0, block, content)
        worker.blocks.mark_ready(0, block, hash_of(content))
        request.arrived.add(index)

    # ------------------------------------------------------------------ what goes wrong

    def act_end_session(self) -> None:
        """The source's side only: a sink that is frozen or cut off goes on with what it was told."""
        source, sink = self.random.sample(self.nodes, 2)
        keys = source.worker.source.end_session(f"{sink.worker.name}->{source.worker.name}", self.clock.now)
        for request in self.requests:
            if request.key in keys:
                self._source_lets_go(request)

    def act_early_release(self) -> None:
        """The source believes that the reader is done; it may be in the middle of a read."""
        request = self._some(lambda r: r.num_ticketed == len(r.contents))
        if request is not None:
            request.source.worker.source.release(request.key)
            self._source_lets_go(request)

    def act_time(self) -> None:
        self._advance(self.random.choice([0.1, 1.0, 3.0, 4.0, 6.0]))

    def _advance(self, seconds: float) -> None:
        self.clock.now += seconds
        for end, node, blocks in self._rests:
            if end <= self.clock.now:
                self._void(node, blocks)
        self._rests = [rest for rest in self._rests if rest[0] > self.clock.now]
        for node in self.nodes:
            expired = node.worker.source.tick(self.clock.now).leases
            self.seen["expired leases"] += len(expired)

    def _void(self, node: Node, blocks: set[int]) -> None:
        """2T is the promise that a read given up writes nothing any more: from here on the network keeps it."""
        rank = node.worker.ranks[0]
        spans = [(s.data_ptr(), s[0].numel()) for s in rank.pool.regions[0]]
        for read in rank.transport.reads.values():
            into = {(to - base) // size for to, _, _ in read.copies for base, size in spans if to >= base}
            if into & blocks:
                del read.copies[read.position :]

    def act_renew(self) -> None:
        source, sink = self.random.sample(self.nodes, 2)
        source.worker.source.renew(f"{sink.worker.name}->{source.worker.name}", self.clock.now)

    def act_retire(self) -> None:
        node = self.random.choice(self.nodes)
        node.step += 1
        node.worker.blocks.retire_fences(node.step)

    def act_hold(self) -> None:
        self.fabric.hold(self.random.choice(self.nodes).worker.agents[0])

    def act_resume(self) -> None:
        self.fabric.resume(self.random.choice(self.nodes).worker.agents[0])

    def act_slow(self) -> None:
        self.fabric.slow(self.random.choice(self.nodes).worker.agents[0], self.random.randint(0, 2))

    def act_fail(self) -> None:
        self.fabric.fail(self.random.choice(self.nodes).worker.agents[0])

    def act_pressure(self) -> None:
        """Somebody else needs blocks: cached ones are evicted and overwritten."""
        worker = self.random.choice(self.nodes).worker
        count = self.random.randint(1, NUM_BLOCKS)
        blocks = worker.blocks.reserve([min(count, worker.blocks.num_available(0))])
        assert blocks is not None
        for block in blocks[0]:
            worker.write(0, block, 1_000_000 + self.random.randrange(1000))
        worker.blocks.release(0, blocks[0])

    def act_kill(self) -> None:
        """A process dies; another incarnation takes its place."""
        place = self.random.randrange(NUM_WORKERS)
        dead = self.nodes[place]
        for agent in dead.worker.agents:
            self.fabric.kill(agent)
        self.nodes[place] = self._new_node()
        for request in [request for request in self.requests if request.sink is dead]:
            self._source_lets_go(request)
            request.source.worker.source.end_session(request.session, self.clock.now)
            self.requests.remove(request)
        for request in [request for request in self.requests if request.source is dead]:
            request.theirs = []
            if not request.sink.worker.sink.num_pulls_of(request.key) and not request.tickets:
                self._end(request, tell_source=False)
        for node in self.nodes:
            session = f"{dead.worker.name}->{node.worker.name}"
            node.worker.source.end_session(session, self.clock.now)  # leases of requests it had forgotten, too
        self._connect(self.nodes[place])

    def _new_node(self) -> Node:
        self._num_made += 1
        return Node(
            KvWorker.build(f"w{self._num_made}", self.fabric, self.clock, geometry=GEOMETRY, num_blocks=NUM_BLOCKS)
        )

    def _connect(self, node: Node) -> None:
        for other in self.nodes:
            if other is not node:
                for sink, source in ((node.worker, other.worker), (other.worker, node.worker)):
                    sink.ranks[0].executor.connect(source.name, source.offer(), sink.connected.append)

    def _some(self, fits: Callable[[Request], bool]) -> Request | None:
        fitting = [request for request in self.requests if fits(request)]
        return self.random.choice(fitting) if fitting else None
