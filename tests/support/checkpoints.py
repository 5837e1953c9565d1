"""Tiny Hugging Face checkpoints whose greedy text does not collapse, made once per test process.

The default initialisation repeats one token for ever, and any two models agree on that. Here every matrix is redrawn
with std 4 / sqrt(inputs) and every embedding with std 0.1: nearly every token of a run differs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

VOCAB_SIZE = 512
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _llama(**changes: object) -> PreTrainedModel:
    settings: dict[str, object] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "eos_token_id": VOCAB_SIZE - 1,
        "bos_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes)))  # pyright: ignore[reportArgumentType]


FAMILIES: Mapping[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "llama-mha-bias": lambda: _llama(num_key_value_heads=4, attention_bias=True, mlp_bias=True),
    "llama3-tied": lambda: _llama(rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True, num_key_value_heads=1),
}


@cache
def _root() -> tempfile.TemporaryDirectory[str]:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="sluice-checkpoints-")


@cache
def checkpoint(family: str, dtype: str = "float32") -> Path:
    """The folder of one tiny model of `FAMILIES`. Callers must not change it; copy it first."""
    folder = Path(_root().name) / f"{family}-{dtype}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FAMILIES[family]().eval()
        redraw(model)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


@torch.no_grad()
def redraw(model: nn.Module) -> None:
    """Draws all weights anew, in place, from torch's global generator."""
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            std = 0.1 if "embed" in name else 4 / parameter.shape[-1] ** 0.5
            parameter.normal_(0, std)
        elif name.endswith("bias"):
            parameter.normal_(0, 0.1)


@cache
def transformers_model(family: str, dtype: str = "float32") -> PreTrainedModel:
    """The same weights as `checkpoint`, as transformers computes them."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint(family, dtype), dtype=getattr(torch, dtype)).eval()


@torch.inference_mode()
def greedy(family: str, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    """What transformers says in fp32, one prompt at a time, end tokens ignored."""
    output = transformers_model(family).generate(  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=num_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


def ragged_prompts(count: int = 8, *, longest: int = 60, seed: int = 0) -> list[list[int]]:
    """`count` prompts of 1 to `longest` random tokens; the first has one token, the last is the longest."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    lengths[0], lengths[-1] = 1, longest
    return [torch.randint(1, VOCAB_SIZE - 1, (length,), generator=generator).tolist() for length in lengths]
