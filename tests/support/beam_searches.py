"""What transformers' beam search finds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch

from cluster.request import Beams, EarlyStopping, SamplingParams
from tests.support.checkpoints import transformers_model
from tests.support.encoder_decoders import Text
from tests.support.families import ENCODER_DECODERS
from workers.engine.sequence import NOTHING_FORCED, ForcedTokens

_EARLY = {EarlyStopping.UNLIKELY: False, EarlyStopping.AT_ONCE: True, EarlyStopping.IMPOSSIBLE: "never"}


class Found(NamedTuple):
    token_ids: tuple[int, ...]
    score: float


def searching(
    num_beams: int,
    *,
    num_returned: int | None = None,
    length_penalty: float = 1.0,
    early_stopping: EarlyStopping = EarlyStopping.UNLIKELY,
    max_tokens: int = 8,
    stop_token_ids: tuple[int, ...] = (),
    no_repeat_ngram_size: int = 0,
    min_tokens: int = 0,
) -> SamplingParams:
    """Only the stop tokens end a text early. All texts are returned, if nothing else is said."""
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        ignore_eos=True,
        stop_token_ids=stop_token_ids,
        no_repeat_ngram_size=no_repeat_ngram_size,
        beams=Beams(num_beams, num_returned or num_beams, length_penalty, early_stopping),
    )


@cache
@torch.inference_mode()
def transformers_finds(
    family: str, text: Text, params: SamplingParams, forced: ForcedTokens = NOTHING_FORCED
) -> list[Found]:
    """In fp32, one text at a time, best first. Without an encoder the text's prompt is all there is."""
    assert params.beams is not None
    prompt = torch.tensor([text.prompt])
    ends = list(params.stop_token_ids) or None
    inputs = {"decoder_input_ids": prompt} if family in ENCODER_DECODERS else {}
    given = torch.tensor([text.source]) if family in ENCODER_DECODERS else prompt
    output = transformers_model(family).generate(  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        given,
        attention_mask=torch.ones_like(given),
        **inputs,
        do_sample=False,
        max_new_tokens=params.max_tokens,
        min_new_tokens=params.min_tokens or None,
        eos_token_id=ends,
        pad_token_id=-1 if ends is None else ends[0],
        num_beams=params.beams.num_beams,
        num_return_sequences=params.beams.num_returned,
        length_penalty=params.beams.length_penalty,
        early_stopping=_EARLY[params.beams.early_stopping],
        no_repeat_ngram_size=params.no_repeat_ngram_size,
        forced_bos_token_id=forced.second,
        forced_eos_token_id=forced.last,
        return_dict_in_generate=True,
        output_scores=True,
    )
    texts = [tokens[len(text.prompt) :] for tokens in output.sequences.tolist()]
    return [
        Found(_ended(tokens, params.stop_token_ids), score)
        for tokens, score in zip(texts, output.sequences_scores.tolist(), strict=True)
        if score > -1e8  # else it stands for a text that was not found
    ]


def _ended(tokens: Sequence[int], ends: Sequence[int]) -> tuple[int, ...]:
    """Without what pads the shorter ones."""
    length = next((index + 1 for index, token in enumerate(tokens) if token in ends), len(tokens))
    return tuple(tokens[:length])
