"""All sequences of one HTTP request: its prompts, and the samples of each. They run together and end together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Final

from cluster.request import TokenLogprobs
from deploy.completion import Completion, Piece
from deploy.openai_answers import EncoderOutput, PromptDetails, Usage
from deploy.tally import Tally

_MAX_UNREAD_PIECES: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """`text` as it was sent, or what its token ids say; "" without a tokenizer."""

    text: str
    token_ids: tuple[int, ...]
    decoder_token_ids: tuple[int, ...] = ()
    """What the answer goes on from, where an encoder reads `token_ids`."""

    @property
    def continued(self) -> tuple[int, ...]:
        return self.decoder_token_ids or self.token_ids

    @property
    def encoded(self) -> tuple[int, ...]:
        return self.token_ids if self.decoder_token_ids else ()


class Generation:
    """`pieces` or `collect`, once; afterwards `usage` tells the rest.

    Sequences are numbered prompt by prompt; the first sample of each prompt leads: it alone scores the prompt.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        tally: Tally,
        *,
        num_choices: int,
        max_running: int,
        scores_prompt: bool,
        num_found: int = 1,
        read_encoder: Callable[[], Awaitable[list[EncoderOutput]]] | None = None,
    ) -> None:
        """`num_choices` of each prompt are told, `max_running` sequences run at once; each brings `num_found` texts, or
        fewer. `read_encoder`: what the encoder makes of the prompts is told with the whole answer."""
        self.prompts = prompts
        self.completions = completions
        self.tally = tally
        self._num_samples = len(completions) // len(prompts)
        self._num_choices = num_choices
        self._num_found = num_found
        self._max_running = max_running
        self._scores_prompt = scores_prompt
        self._read_encoder = read_encoder
        self.encoder_outputs: list[EncoderOutput] | None = None

    @property
    def request_id(self) -> str:
        """Of the first sequence."""
        return self.completions[0].request.request_id

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    def prompt_of(self, piece: Piece) -> Prompt:
        return self.prompts[piece.index // self._num_choices]

    async def pieces(self) -> AsyncGenerator[Piece]:
        """Of all choices, as they come; at least one of each. Closing it early cancels all sequences.

        Raises the RequestError family as soon as one sequence does, which ends the others.
        """
        assert self._num_choices == self._num_samples, "the best are known at the end only"
        async with aclosing(self._sequences()) as pieces:
            async for piece in pieces:
                yield piece

    async def _sequences(self) -> AsyncGenerator[Piece]:
        """The pieces of all sequences, each under its number."""
        if len(self.completions) == 1:
            async with aclosing(self.completions[0].pieces()) as pieces:
                async for piece in pieces:
                    yield piece
            return
        arrived: asyncio.Queue[Piece | asyncio.Task[None]] = asyncio.Queue()
        run = _Run(arrived, max_running=self._max_running, num_found=self._num_found)
        scores: list[asyncio.Future[tuple[TokenLogprobs, ...]]] = []
        tasks: list[asyncio.Task[None]] = []
        for number, completion in enumerate(self.completions):
            leads = number % self._num_samples == 0
            if leads:
                scores.append(asyncio.get_running_loop().create_future())
            score = scores[-1] if self._scores_prompt else None
            tasks.append(asyncio.create_task(run.follow(completion, number, score, leads=leads)))
            tasks[-1].add_done_callback(arrived.put_nowait)
        try:
            left = len(tasks)
            while left:
                news = await arrived.get()
                if isinstance(news, Piece):
                    run.unread.release()
                    yield news
                else:
                    news.result()
                    left -= 1
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def collect(self) -> list[Piece]:
        """One whole piece for each choice, in order; of more samples than choices the likeliest, best first."""
        if self._read_encoder is not None:
            self.encoder_outputs = await self._read_encoder()  # first: what it read is cached for the completions
        parts: list[list[Piece]] = [[] for _ in range(len(self.completions) * self._num_found)]
        async with aclosing(self._sequences()) as pieces:
            async for piece in pieces:
                parts[piece.index].append(piece)
        wholes = [_joined(each) for each in parts if each]
        if self._num_choices == self._num_samples * self._num_found:
            return wholes
        best: list[Piece] = []
        for first in range(0, len(wholes), self._num_samples):
            samples = sorted(wholes[first : first + self._num_samples], key=_mean_logprob, reverse=True)
            best += samples[: self._num_choices]
        return [replace(piece, index=index) for index, piece in enumerate(best)]

    def usage(self, *, with_route: bool) -> Usage:
        num_prompt = self.num_prompt_tokens
        num_tokens = sum(completion.num_tokens for completion in self.completions)
        leaders = self.completions[:: self._num_samples]
        reports = [report for each in self.completions if (report := each.report()) is not None] if with_route else []
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=num_tokens,
            total_tokens=num_prompt + num_tokens,
            prompt_tokens_details=PromptDetails(cached_tokens=sum(leader.cached_tokens for leader in leaders)),
            sluice=reports[0] if reports else None,
            sluice_sequences=reports if len(reports) > 1 else None,
        )


class _Run:
    """What the sequences of one generation share while they run."""

    def __init__(self, arrived: asyncio.Queue[Piece | asyncio.Task[None]], *, max_running: int, num_found: int) -> None:
        self._num_found = num_found
        self.unread = asyncio.Semaphore(_MAX_UNREAD_PIECES)
        self._arrived = arrived
        self._slots = asyncio.Semaphore(max_running)  # first come, first served: a leader goes before its followers

    async def follow(
        self,
        completion: Completion,
        index: int,
        score: asyncio.Future[tuple[TokenLogprobs, ...]] | None,
        *,
        leads: bool,
    ) -> None:
        """Passes on the pieces of one sequence, under its number; what the leader scores goes to all first pieces."""
        is_first = True
        async with self._slots, aclosing(completion.pieces()) as pieces:
            async for piece in pieces:
                if is_first and score is not None:
                    if leads:
                        score.set_result(piece.prompt_logprobs)
                    piece = replace(piece, prompt_logprobs=await score)
                is_first = False
                await self.unread.acquire()
                self._arrived.put_nowait(replace(piece, index=index * self._num_found + piece.index))


def _joined(pieces: Sequence[Piece]) -> Piece:
    first, last = pieces[0], pieces[-1]
    if first is last:
        return first
    return Piece(
        index=first.index,
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        finish=last.finish,
        logprobs=tuple(each for piece in pieces for each in piece.logprobs),
        offsets=tuple(offset for piece in pieces for offset in piece.offsets),
        prompt_logprobs=first.prompt_logprobs,
    )


def _mean_logprob(piece: Piece) -> float:
    return sum(each.logprob for each in piece.logprobs) / max(1, len(piece.logprobs))
