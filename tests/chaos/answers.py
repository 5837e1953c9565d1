"""The only right answers to the questions of a chaos run: by transformers in fp32 and the plain sampler.

The same seed is the same token on any worker, in any batch, after any replay. A question is asked only if no token of
its answers was chosen by a nose, so that another order of additions cannot tip it.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np
import torch

from cluster.request import SamplingParams
from tests.chaos.questions import Question, draw, system_prompts
from tests.support.checkpoints import transformers_model
from tests.support.plain_sampler import filtered
from workers.engine.sampler import token_noise

FAMILY = "llama"
DECIDED = 2e-4  # of logits, or of logits over temperature with noise; fp32 is off by some 1e-6


@dataclass(frozen=True, slots=True)
class Answered:
    question: Question
    answers: tuple[tuple[int, ...], ...]  # by sample


def answered(count: int, seed: int) -> list[Answered]:
    """The first `count` questions of a seed whose answers are decided."""
    random = Random(seed)
    system = system_prompts(random)
    chosen: list[Answered] = []
    while len(chosen) < count:
        question = draw(random, len(chosen), system)
        answers = [_answer(question.prompt, sampling) for sampling in question.samplings]
        whole = tuple(answer for answer in answers if answer is not None)
        if len(whole) == len(answers):
            chosen.append(Answered(question, whole))
    return chosen


@torch.inference_mode()
def _answer(prompt: tuple[int, ...], sampling: SamplingParams) -> tuple[int, ...] | None:
    """All tokens; None: one of them is not decided."""
    model = transformers_model(FAMILY)
    output = model(torch.tensor([prompt]), use_cache=True)
    tokens: list[int] = []
    while True:
        scores = output.logits[0, -1].float()
        if sampling.temperature > 0:
            position = len(prompt) + len(tokens)
            scores = filtered(scores, sampling) + _noise(len(scores), sampling, position)
        best = scores.topk(2)
        if best.values[0] - best.values[1] < DECIDED:
            return None
        tokens.append(int(best.indices[0]))
        if len(tokens) == sampling.max_tokens:
            return tuple(tokens)
        output = model(torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values, use_cache=True)


def _noise(vocab_size: int, sampling: SamplingParams, position: int) -> torch.Tensor:
    seeds, samples = np.array([sampling.seed], np.uint64), np.array([sampling.sample])
    return token_noise(vocab_size, seeds, samples, np.array([position]), device=torch.device("cpu"))[0]
