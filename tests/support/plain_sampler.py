"""The sampler once more, one token of one request at a time, with transformers' own processors where it has them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cluster.request import SamplingParams
from workers.engine.sampler import token_noise


def adjusted(
    logits: Tensor,
    prompt: Sequence[int],
    emitted: Sequence[int],
    params: SamplingParams,
    *,
    ending: Sequence[int] = (),
    allowed: Sequence[int] | None = None,
) -> Tensor:
    """logits [V] -> what is picked from, float32 [V]; nothing that is forbidden may be all that is left.

    ending: EOS and stop ids. allowed: what the grammar allows.
    """
    ids = cast(torch.LongTensor, torch.tensor([[*prompt, *emitted]]))
    scores = cast(torch.FloatTensor, logits.float()[None].clone())
    if params.repetition_penalty != 1.0:
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    for token, count in Counter(emitted).items():
        scores[0, token] -= count * params.frequency_penalty + params.presence_penalty
    for token, value in params.logit_bias:
        scores[0, token] += value
    if allowed is not None:
        mask = torch.full_like(scores, -torch.inf)
        mask[0, list(allowed)] = 0.0
        scores = cast(torch.FloatTensor, scores + mask)
    if ending and len(emitted) < params.min_tokens:
        scores[0, list(ending)] = -torch.inf
    if params.bad_words:
        words = [list(word) for word in params.bad_words]
        scores = NoBadWordsLogitsProcessor(words, eos_token_id=None)(ids, scores)
    return scores[0]


def filtered(scores: Tensor, params: SamplingParams) -> Tensor:
    """Adjusted scores [V] over temperature, -inf outside the limits."""
    ids, rows = cast(torch.LongTensor, torch.zeros(1, 0, dtype=torch.int64)), cast(torch.FloatTensor, scores[None])
    rows = TemperatureLogitsWarper(params.temperature)(ids, rows)
    if params.top_k:
        rows = TopKLogitsWarper(params.top_k)(ids, rows)
    if params.top_p < 1.0:
        rows = TopPLogitsWarper(params.top_p)(ids, rows)
    if params.min_p:
        rows = MinPLogitsWarper(params.min_p)(ids, rows)
    return rows[0]


def pick(scores: Tensor, params: SamplingParams, position: int) -> int:
    """The token at `position`, from adjusted scores [V]."""
    if params.temperature == 0.0:
        return int(scores.argmax())
    noise = token_noise(
        len(scores),
        np.array([params.seed], np.uint64),
        np.array([params.sample]),
        np.array([position]),
        device=scores.device,
    )
    return int((filtered(scores, params) + noise[0]).argmax())


def generate(
    next_token_logits: Callable[[Sequence[int]], Tensor],
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    ending: Sequence[int] = (),
    allowed: Callable[[Sequence[int]], Sequence[int]] | None = None,
    until: int | None = None,
) -> list[int]:
    """`max_tokens` tokens, as if nothing but `until` ended them. `allowed`: of the emitted tokens, what may follow."""
    emitted: list[int] = []
    while len(emitted) < params.max_tokens and (until is None or emitted[-1:] != [until]):
        tokens = [*prompt, *emitted]
        scores = adjusted(
            next_token_logits(tokens).reshape(-1),
            prompt,
            emitted,
            params,
            ending=ending,
            allowed=None if allowed is None else allowed(emitted),
        )
        emitted.append(pick(scores, params, len(tokens)))
    return emitted
