"""The kinds of faults, the states in which they strike, and how each is healed."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random

import psutil

from cluster.protos import worker_pb2 as pb
from tests.chaos.arena import ALONE, Arena
from tests.chaos.crowd import Storm
from tests.chaos.record import Fault, Healed
from tests.chaos.what import BLINKS, HANGS, KILLS, NEEDS_TWO_HOSTS, State, What
from tests.support.hanging_worker import HANG

FIND_S = 6.0  # how long a state is waited for; then the fault strikes as things are
STORM = 80  # requests at once, where 48 may run and wait


@dataclass(frozen=True, slots=True)
class Found:
    victim: str
    state: State
    seen: str


class Hand:
    """Strikes, waits, heals. One fault at a time: nothing that was open at one is still open at the next, so that no
    request meets two."""

    def __init__(self, arena: Arena, random: Random, *, num_clients: int) -> None:
        self._arena = arena
        self._random = random
        self._num_clients = num_clients
        self._number = 0
        psutil.cpu_percent()

    async def strike(self, what: What, state: State) -> None:
        arena = self._arena
        found = await self._find(what, state)
        names = sorted(ALONE) if what in NEEDS_TWO_HOSTS else [found.victim]
        self._number += 1
        number = self._number
        open_then = arena.open.every()
        struck = Fault(
            at_s=arena.now(),
            number=number,
            what=what,
            victims=tuple(names),
            incarnations=tuple(self._incarnation(name) for name in names),
            pids=tuple(arena.pid(name) for name in names),
            state=found.state,
            seen=found.seen,
            busy=psutil.cpu_percent() / 100,
        )
        heal = self._do(what, found.victim)
        arena.write(struck)
        arena.pace(self._num_clients)  # after an idle moment: those who come now meet the dead
        try:
            await heal()
        finally:
            arena.note_deaths()
        survivors = set(arena.crowds)
        await arena.until(
            lambda: open_then.isdisjoint(arena.open.every()), f"what was open at fault {number} ended; {survivors}"
        )
        arena.write(Healed(at_s=arena.now(), number=number))

    def _incarnation(self, name: str) -> str:
        crowd = self._arena.crowds.get(name)
        if crowd is not None:
            return crowd.incarnation
        member = self._arena.cluster.workers[name].member
        assert member is not None
        return member.incarnation

    # ------------------------------------------------------------ doing

    def _do(self, what: What, victim: str) -> Callable[[], Awaitable[None]]:
        """Strikes; what is returned heals."""
        arena, words = self._arena, self._arena.cluster.config.words
        short_s = self._random.uniform(0.2, 0.6) * words.heartbeat_timeout_s
        long_s = words.heartbeat_timeout_s + 2 * words.heartbeat_s + self._random.uniform(0.2, 1.5)

        async def succeed() -> None:
            await arena.bury(victim)
            await (arena.start_crowd(victim) if what is What.KILL_INGRESS else arena.start_worker(victim))
            if what is What.KILL_INGRESS:
                arena.pace(self._num_clients)
            await arena.until_warm()

        async def thaw() -> None:
            await asyncio.sleep(short_s if what in BLINKS else long_s)
            arena.signal(victim, signal.SIGCONT)
            await arena.until_warm()

        async def plug() -> None:
            assert arena.lonely is not None
            await asyncio.sleep(short_s if what in BLINKS else long_s)
            arena.lonely.plug()
            await arena.until_warm()

        async def replace() -> None:
            """As the controller does with a worker that says of itself that it hangs."""
            await asyncio.sleep(words.step_timeout_s + 3 * words.heartbeat_s)
            arena.signal(victim, signal.SIGKILL)
            await succeed()

        async def calm() -> None:
            await asyncio.sleep(0.1)
            storm = arena.open.every()
            await arena.until(lambda: storm.isdisjoint(arena.open.every()), "the storm is over")

        if what in NEEDS_TWO_HOSTS:
            assert arena.lonely is not None
            arena.lonely.unplug()
            return plug
        if what is What.STORM:
            arena.crowds[victim].send(Storm(STORM))
            return calm
        if what in KILLS:
            arena.signal(victim, signal.SIGKILL)
            return succeed
        if what in HANGS:
            arena.signal(victim, HANG)
            return replace
        arena.signal(victim, signal.SIGSTOP)
        return thaw

    # ------------------------------------------------------------ finding

    def _candidates(self, what: What) -> list[str]:
        arena = self._arena
        if what in (What.KILL_INGRESS, What.FREEZE_INGRESS, What.STORM):
            names = list(arena.crowds)
        elif what in NEEDS_TWO_HOSTS:
            names = list(ALONE)
        else:
            role = "prefill" if "prefill" in what else "decode"
            names = [name for name, worker in arena.cluster.workers.items() if worker.pool == role]
        return self._random.sample(sorted(names), len(names))

    async def _find(self, what: What, state: State) -> Found:
        """The first victim seen in that state."""
        arena = self._arena
        candidates = self._candidates(what)
        if state is State.IDLE:
            arena.pace(0)
            await arena.until_nothing_is_open()
            return Found(candidates[0], State.IDLE, "no client asks")
        arena.pace(self._num_clients)
        await asyncio.sleep(self._random.uniform(0.0, 0.4))  # a random moment
        loop = asyncio.get_running_loop()
        deadline = loop.time() + FIND_S
        arrived: dict[str, float] = {}
        while loop.time() < deadline:
            for name in candidates:
                if name in arena.crowds:
                    found = await self._crowd_in(name, state)
                else:
                    found = await self._worker_in(name, state, arrived)
                if found is not None:
                    return found
            await asyncio.sleep(0.001)
        return Found(candidates[0], State.ANY, f"{state} was not seen within {FIND_S:g} s")

    async def _worker_in(self, name: str, state: State, arrived: dict[str, float]) -> Found | None:
        answer = await self._arena.ask(name)
        if answer is None:
            return None
        num_blocks = answer.counters.get("sluice_transfer_pulled_blocks_total", 0.0)
        num_arrived = num_blocks - arrived.get(name, num_blocks)
        arrived[name] = num_blocks
        found = _worker_in(name, answer.load, state, num_arrived)
        return found if state is not State.DECODE or any(map(self._streams, self._arena.crowds)) else None

    def _streams(self, crowd: str) -> bool:
        return any(self._arena.open.of(crowd).values())

    async def _crowd_in(self, name: str, state: State) -> Found | None:
        arena = self._arena
        seen = arena.open.of(name)
        waiting, streaming = sum(not has for has in seen.values()), sum(seen.values())
        told = f"{waiting} requests without a token, {streaming} with"
        if state is State.DECODE and streaming:
            return Found(name, state, told)
        if state is State.PREFILL and waiting:
            return Found(name, state, told)
        if state is State.TRANSFER and waiting:
            for decode in (n for n, worker in arena.cluster.workers.items() if worker.pool == "decode"):
                answer = await arena.ask(decode)
                if answer is not None and answer.load.num_pulling:
                    return Found(name, state, f"{told}; {decode} pulls for {answer.load.num_pulling}")
        return None


def _worker_in(name: str, load: pb.LoadReport, state: State, num_arrived: float) -> Found | None:
    """`num_arrived`: blocks read since the last look."""
    told = f"waiting {load.num_waiting}, running {load.num_running}, pulling {load.num_pulling}"
    told += f", leases {load.num_leases}, arrived {num_arrived:g}"
    if name.startswith("prefill"):
        holds = {
            State.PREFILL: load.num_running > 0,
            State.TRANSFER: load.num_leases > 0,
            State.DECODE: not (load.num_running or load.num_waiting or load.num_leases),  # its prompts stream
        }
    else:
        holds = {
            State.PREFILL: load.num_pulling > 0,
            State.TRANSFER: load.num_pulling > 0 and num_arrived > 0,
            State.DECODE: load.num_running > 0,
        }
    return Found(name, state, told) if holds[state] else None
