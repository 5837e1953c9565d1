"""What the attempts at one request have brought so far: tokens, logprobs, an embedding, what a search found, each
piece once."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from cluster.hidden_states import HiddenStates
from cluster.protos import worker_pb2 as pb
from cluster.request import Hypothesis, Pooling, SamplingParams, TokenLogprobs


class Output:
    """Grows by frames of workers. Pieces that an attempt repeats are cut off; one that leaves a piece out, or brings
    less than was asked for, is not taken at all.

    Logprobs stand beside their tokens. Those of the prompt come before the first token, in pieces, and whole.
    """

    def __init__(self, num_prompt: int, sampling: SamplingParams) -> None:
        self._num_wanted = 0 if sampling.num_prompt_logprobs is None else num_prompt - 1
        self._wants_logprobs = sampling.num_logprobs is not None
        self._wants_embedding = sampling.pooling not in (None, Pooling.STATES)
        self._wants_states = sampling.pooling is Pooling.STATES
        self._num_hypotheses = 0 if sampling.beams is None else sampling.beams.num_returned
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []  # one per token, where asked for
        self.prompt_logprobs: list[TokenLogprobs] = []  # of prompt tokens 1 …
        self.embedding: tuple[float, ...] = ()
        self.hypotheses: tuple[Hypothesis, ...] = ()
        self.states: HiddenStates | None = None  # they come on a stream of their own

    @property
    def has_prompt_logprobs(self) -> bool:
        """Whether all that were asked for are here; a further attempt need not bring them."""
        return len(self.prompt_logprobs) == self._num_wanted

    @property
    def lacks_states(self) -> bool:
        """Whether the last frame of an attempt has to wait for them."""
        return self._wants_states and self.states is None

    def take(self, tokens: pb.SequenceTokens) -> int | None:
        """The number of new tokens; None, and nothing changed, if something is missing between, before or in it."""
        known = len(self.token_ids) - tokens.first_token_index
        prompt_known = len(self.prompt_logprobs) + 1 - tokens.first_prompt_logprob if tokens.prompt_logprobs else 0
        if known < 0 or prompt_known < 0 or len(tokens.logprobs) != len(tokens.token_ids) * self._wants_logprobs:
            return None
        new_ids: Sequence[int] = tokens.token_ids[known:]
        try:
            new = [TokenLogprobs.of(each) for each in tokens.logprobs[known:]]
            new_prompt = [TokenLogprobs.of(each) for each in tokens.prompt_logprobs[prompt_known:]]
            hypotheses = tuple(Hypothesis.of(each) for each in tokens.hypotheses)
        except ValueError:  # tokens without probability, or the other way round; an end that is none
            return None
        num_prompt = len(self.prompt_logprobs) + len(new_prompt)
        ends = tokens.finish in (pb.STOP, pb.LENGTH)
        if num_prompt > self._num_wanted or (num_prompt < self._num_wanted and (new_ids or ends)):
            return None
        if ends and self._wants_embedding:
            if not tokens.embedding or len(tokens.embedding) % 4:
                return None
            self.embedding = struct.unpack(f"<{len(tokens.embedding) // 4}f", tokens.embedding)
        if self._num_hypotheses and (new_ids or (ends and not 1 <= len(hypotheses) <= self._num_hypotheses)):
            return None
        self.hypotheses = hypotheses
        self.token_ids += new_ids
        self.logprobs += new
        self.prompt_logprobs += new_prompt
        return len(new_ids)
