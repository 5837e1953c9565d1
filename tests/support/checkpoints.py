"""Tiny Hugging Face checkpoints whose greedy text does not collapse, made once per test process.

The default initialisation repeats one token for ever, and any two models agree on that. Here every matrix is redrawn
with std 4 / sqrt(inputs) and every embedding with std 0.1: nearly every token of a run differs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from tests.support.families import ENCODER_DECODERS, FAMILIES, VOCAB_SIZE
from tests.support.fp8_blocks import write_pair
from tests.support.margins import Margins

FP8 = "-fp8"


@dataclass(frozen=True, slots=True)
class DecidedRun:
    """What transformers says to a prompt, and how clearly. Callers must not change it."""

    prompt: list[int]
    tokens: list[int]
    margin: float
    num_index_choices: int


@cache
def _root() -> tempfile.TemporaryDirectory[str]:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="sluice-checkpoints-")


def checkpoint(family: str, dtype: str = "float32") -> Path:
    """The folder of one tiny model of `FAMILIES`. Callers must not change it; copy it first.

    With `FP8` behind the name its matrices are stored in fp8 blocks, whatever the dtype.
    """
    return _checkpoint(family, dtype)


@cache  # of all arguments, given or not: a folder is written once, others may have mapped it
def _checkpoint(family: str, dtype: str) -> Path:
    folder = Path(_root().name) / f"{family}-{dtype}"
    if family.endswith(FP8):
        write_pair(checkpoint(family.removesuffix(FP8)), folder, _meant(folder))
        return folder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FAMILIES[family]().eval()
        redraw(model)
        if "final_logits_bias" in dict(model.named_buffers()):
            _spread(model)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def _meant(fp8: Path) -> Path:
    return fp8.with_name(f"{fp8.name}-meant")


@torch.no_grad()
def redraw(model: nn.Module) -> None:
    """Draws all weights anew, in place, from torch's global generator."""
    buffers = dict(model.named_buffers())
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            std = 0.1 if "embed" in name or name.endswith("shared.weight") else 4 / parameter.shape[-1] ** 0.5
            bias = name.replace("gate.weight", "gate.e_score_correction_bias")
            if name.endswith("mlp.gate.weight") and bias not in buffers:
                std /= 4  # a softmax over wider scores leaves nothing to choose between
            if name.endswith("ttention.q.weight"):
                std /= 8  # T5 does not scale its scores; a softmax that picks one key makes a model chaotic
            elif name.endswith("fc2.weight"):
                std /= 16  # or what all activated features have in common drowns the rest
            parameter.normal_(0, std)
        elif name.endswith("bias"):
            parameter.normal_(0, 0.1)
    for name, buffer in buffers.items():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(-1.0, 0.3)  # most biased scores are negative, so that masking with 0 would show


@torch.no_grad()
def _spread(model: nn.Module) -> None:
    """Has BART's bias of the logits take away what is common to all positions: its text repeats one token else."""
    tokens = torch.randint(3, VOCAB_SIZE - 1, (2, 16, 24))
    logits = model(input_ids=tokens[0], decoder_input_ids=tokens[1]).logits
    model.get_buffer("final_logits_bias").sub_(logits.mean((0, 1)))


@cache
def transformers_model(family: str, dtype: str = "float32") -> PreTrainedModel:
    """The same weights as `checkpoint`, as transformers computes them."""
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    folder = checkpoint(family, dtype)
    if family.endswith(FP8):
        folder = _meant(folder)
    auto = AutoModelForSeq2SeqLM if family in ENCODER_DECODERS else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def greedy(family: str, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    """What transformers says in fp32, one prompt at a time, end tokens ignored."""
    return _batch(family, [prompt], num_tokens)[0]


@torch.inference_mode()
def _batch(family: str, prompts: Sequence[tuple[int, ...]], num_tokens: int) -> list[list[int]]:
    """What transformers says to all prompts in one batch, padded at the left: a guess where there are several."""
    longest = max(map(len, prompts))
    output = transformers_model(family).generate(  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        torch.tensor([(0,) * (longest - len(prompt)) + prompt for prompt in prompts]),
        attention_mask=torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
        do_sample=False,
        max_new_tokens=num_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[:, longest:].tolist()


@torch.inference_mode()
def confirmed(family: str, prompt: tuple[int, ...], guess: list[int]) -> list[int]:
    """`greedy`, by one pass over prompt and guess if each token of the guess is what transformers chooses there."""
    logits = transformers_model(family)(torch.tensor([[*prompt, *guess[:-1]]])).logits[0, len(prompt) - 1 :]
    return guess if logits.argmax(-1).tolist() == guess else greedy(family, prompt, len(guess))


def greedy_each(family: str, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """`greedy` of each prompt, several times quicker."""
    texts = [tuple(prompt) for prompt in prompts]
    return [confirmed(family, *each) for each in zip(texts, _batch(family, texts, num_tokens), strict=True)]


# Measured on "deepseek-v32": fp32 of either program is off by up to 4e-5 in router scores, and in index scores (of
# about 7) by 2e-5 in the median, 2e-4 in the 99th percentile and 1e-3 at worst. So this makes a tipped choice rare on
# other machines, and exact ties impossible.
DECIDED = 1e-4


@cache
def decided(family: str, prompts: tuple[tuple[int, ...], ...], count: int, num_tokens: int) -> list[DecidedRun]:
    """The first `count` of `prompts` on whose way no expert, no index choice and no token was chosen by a nose."""
    runs: list[DecidedRun] = []
    for start in range(0, len(prompts), 2 * count):  # of many, half are decided
        batch = prompts[start : start + 2 * count]
        for prompt, guess in zip(batch, _batch(family, batch, num_tokens), strict=True):
            with Margins() as margins:
                tokens = confirmed(family, prompt, guess)
            if margins.smallest > DECIDED:
                runs.append(DecidedRun(list(prompt), tokens, margins.smallest, margins.num_index_choices))
            if len(runs) == count:
                return runs
    raise AssertionError(f"{family}: {len(runs)} of {len(prompts)} prompts are decided, {count} wanted; give more")


def ragged_prompts(count: int = 8, *, longest: int = 60, seed: int = 0) -> list[list[int]]:
    """`count` prompts of 1 to `longest` random tokens; the first has one token, the last is the longest."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    lengths[0], lengths[-1] = 1, longest
    return [torch.randint(1, VOCAB_SIZE - 1, (length,), generator=generator).tolist() for length in lengths]
