"""A search as its client sees it: the texts that were found, best first, all at its end."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from cluster.errors import RequestError
from cluster.request import FinishReason, Hypothesis
from deploy.completion import Completion, Ending, Piece
from deploy.stream import Detokenizer
from deploy.tally import Tally
from router.flight import RouterRequest
from router.router import Router


class Search(Completion):
    """`pieces` are whole texts, numbered from 0 on; of each a detokenizer of its own, or None without a tokenizer."""

    def __init__(
        self,
        router: Router,
        request: RouterRequest,
        tally: Tally,
        *,
        detokenizer: Callable[[], Detokenizer | None],
        ending: Ending,
    ) -> None:
        super().__init__(router, request, tally, detokenizer=None, ending=ending)
        self._detokenizers = detokenizer

    async def pieces(self) -> AsyncGenerator[Piece]:
        async with aclosing(self._router.generate(self.request)) as deltas:
            async for delta in deltas:
                self._last, self._route = delta, delta.route
                self._num_tokens = sum(len(found.token_ids) for found in delta.hypotheses)
                self.tally.tokens(self._num_tokens, self._pace)
                for index, found in enumerate(delta.hypotheses):
                    yield self._whole(index, found)
                return
        raise RequestError(f"request {self.request.request_id} ended without a finish reason; report its id")

    def _whole(self, index: int, found: Hypothesis) -> Piece:
        text, detokenizer = "", self._detokenizers()
        if detokenizer is not None:
            ends = found.finish is FinishReason.STOP and found.token_ids[-1] in self._silent
            text = "".join(map(detokenizer.push, found.token_ids[: len(found.token_ids) - ends])) + detokenizer.flush()
        finish = "stop" if found.finish is FinishReason.STOP else "length"
        return Piece(index=index, text=text, token_ids=found.token_ids, finish=finish, score=found.score)
