"""Logprobs as OpenAI writes them, for completions and for chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from cluster.request import TokenLogprobs
from deploy.completion import Piece
from deploy.generation import Prompt
from deploy.openai_answers import CompletionLogprobs, TokenLogprob, TopLogprob
from deploy.stream import Detokenizer
from deploy.tokenizer import Tokenizer

_LEAST: Final = -9999.0  # what OpenAI writes for a token that cannot be; JSON has no infinity


class LogprobWriter:
    """Without a tokenizer tokens are shown as `token_id:7`, and have no bytes."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def of_completion(self, piece: Piece) -> CompletionLogprobs:
        return self._table(piece.token_ids, piece.logprobs, piece.offsets)

    def echoed(self, prompt: Prompt, piece: Piece, num_top: int) -> CompletionLogprobs:
        """The prompt's tokens, then those of the first piece, which follow its text.

        A worker tells as many alternatives of prompt tokens as the echo or `prompt_logprobs` needs: `num_top` of them
        are for this one.
        """
        first, *others = prompt.token_ids
        offsets = self._offsets(prompt)
        table = self._table(others, [_cut(told, num_top) for told in piece.prompt_logprobs], offsets[1:])
        follow = self._table(piece.token_ids, piece.logprobs, [len(prompt.text) + each for each in piece.offsets])
        return CompletionLogprobs(
            tokens=[self._text(first), *table.tokens, *follow.tokens],
            token_logprobs=[None, *table.token_logprobs, *follow.token_logprobs],
            top_logprobs=[None, *table.top_logprobs, *follow.top_logprobs],
            text_offset=[offsets[0], *table.text_offset, *follow.text_offset],
        )

    def of_chat(self, piece: Piece) -> list[TokenLogprob]:
        return [self._full(token, told) for token, told in zip(piece.token_ids, piece.logprobs, strict=True)]

    def of_prompt(self, prompt: Prompt, piece: Piece, num_top: int) -> list[TokenLogprob | None]:
        told = zip(prompt.token_ids[1:], piece.prompt_logprobs, strict=True)
        return [None, *(self._full(token, _cut(logprobs, num_top)) for token, logprobs in told)]

    def _table(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], offsets: Sequence[int]
    ) -> CompletionLogprobs:
        top: list[dict[str, float] | None] = []
        for token_id, told in zip(token_ids, logprobs, strict=True):
            likeliest = {self._text(other): _finite(logprob) for other, logprob in told.top}
            top.append({**likeliest, self._text(token_id): _finite(told.logprob)})
        return CompletionLogprobs(
            tokens=[self._text(token_id) for token_id in token_ids],
            token_logprobs=[_finite(told.logprob) for told in logprobs],
            top_logprobs=top,
            text_offset=list(offsets),
        )

    def _full(self, token_id: int, told: TokenLogprobs) -> TokenLogprob:
        own = self._one(token_id, told.logprob)
        top = [self._one(other, logprob) for other, logprob in told.top]
        return TokenLogprob(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=top)

    def _one(self, token_id: int, logprob: float) -> TopLogprob:
        data = b"" if self._tokenizer is None else self._tokenizer.texts.bytes_of(token_id)
        return TopLogprob(token=self._text(token_id), logprob=_finite(logprob), bytes=list(data))

    def _text(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._tokenizer is None else self._tokenizer.texts.text_of(token_id)

    def _offsets(self, prompt: Prompt) -> list[int]:
        if self._tokenizer is None:
            return [0] * len(prompt.token_ids)
        detokenizer = Detokenizer(self._tokenizer.backend)
        offsets: list[int] = []
        for token_id in prompt.token_ids:
            offsets.append(detokenizer.num_chars)
            detokenizer.push(token_id)
        return offsets


def _cut(told: TokenLogprobs, num_top: int) -> TokenLogprobs:
    return told._replace(top=told.top[:num_top])


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
