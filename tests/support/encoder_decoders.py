"""What transformers says of an encoder–decoder's text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from tests.support.checkpoints import DECIDED, ragged_prompts, transformers_model

START = {"t5": 0, "t5-gated": 0, "t5-small": 0, "bart": 2, "bart-relu": 2, "mbart": 2}


class Text(NamedTuple):
    source: tuple[int, ...]
    prompt: tuple[int, ...]  # of the decoder


def texts(family: str, count: int, *, num_sources: int = 8, longest: int = 40, longest_prompt: int = 14) -> list[Text]:
    """Decoder prompts over a few ragged encoder inputs, each of which is used again and again."""
    sources = ragged_prompts(num_sources, longest=longest, seed=1)
    prompts = ragged_prompts(count, longest=longest_prompt, seed=2)
    start = START[family]
    return [Text(tuple(sources[i % num_sources]), (start, *prompt)) for i, prompt in enumerate(prompts)]


@cache
def encoded(family: str, source: tuple[int, ...]) -> Tensor:
    """[1, S, d] as transformers' encoder has it."""
    with torch.inference_mode():
        return transformers_model(family).get_encoder()(torch.tensor([source])).last_hidden_state


class Verdict(NamedTuple):
    is_greedy: bool  # every token is the most likely one behind those before it: what greedy generation says
    is_decided: bool  # and none of them by a nose


@torch.inference_mode()
def judge(family: str, text: Text, tokens: Sequence[int]) -> Verdict:
    """In fp32, one text at a time, in one forward without a cache."""
    decoder = torch.tensor([[*text.prompt, *tokens[:-1]]])
    states = (encoded(family, text.source),)
    logits = transformers_model(family)(encoder_outputs=states, decoder_input_ids=decoder, use_cache=False).logits
    best = logits[0, len(text.prompt) - 1 :].topk(2)
    margin = (best.values[:, 0] - best.values[:, 1]).min().item()
    return Verdict(best.indices[:, 0].tolist() == list(tokens), margin > DECIDED)
