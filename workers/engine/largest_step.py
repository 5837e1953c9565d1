"""Steps of prompts of many sizes, the largest that the limits allow among them, and of encoder inputs: run once before
the KV pool is there, they show how much memory is left for it, and have kernels compiled and loaded before the first
request.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import torch

from cluster.errors import ConfigError
from workers.attention.interface import AttentionBatch, EncoderBatch, FixedGroupMetadata, GroupMetadata
from workers.engine import sampler
from workers.engine.model_runner import EncoderModel, StepModel
from workers.engine.scheduler_limits import SchedulerLimits


def run_largest_steps(
    model: StepModel,
    limits: SchedulerLimits,
    block_size: int,
    device: torch.device,
    find_largest: sampler.FindLargest = sampler.find_largest,
    *,
    encoder: EncoderModel | None = None,
    projects: bool = False,
) -> None:
    """Encoder inputs and small steps first; then prompts alone, prompts of which one has the longest context cached,
    and as many draws as there may be. `projects`: see EncoderModel.

    The model's caches may hold the null block alone: everything is read from and written to it. Raises ConfigError
    when the device's memory does not suffice.
    """
    if encoder is not None:
        try:
            _read(encoder, limits, block_size, device, projects=projects)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                "scheduler.max_encoder_tokens",
                f"{limits.max_encoder_tokens} tokens of encoder inputs do not fit into the device's memory beside the "
                f"model ({error}); lower it",
            ) from error
    try:
        _run(model, limits, block_size, device, find_largest, 0 if encoder is None else longest_input(limits))
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            "scheduler.max_batched_tokens",
            f"a step of {limits.max_batched_tokens} tokens with a context of {limits.max_model_len} does not fit into "
            f"the device's memory beside the model ({error}); lower it, scheduler.chunk_tokens or model.max_model_len",
        ) from error
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def longest_input(limits: SchedulerLimits) -> int:
    """Tokens of an encoder input at most."""
    return min(limits.max_encoder_tokens, limits.max_source_tokens or limits.max_encoder_tokens)


@torch.inference_mode()
def _read(
    encoder: EncoderModel, limits: SchedulerLimits, block_size: int, device: torch.device, *, projects: bool
) -> None:
    """A token, a short input, and as many of the longest as a step reads: how kernels are tiled depends on it."""
    longest = longest_input(limits)
    for num_tokens in sorted({1, min(64, longest), limits.max_encoder_tokens // longest * longest}):
        at = torch.arange(num_tokens, device=device)
        batch = EncoderBatch(chunks(num_tokens, longest), at % block_size)
        encoder.keep(encoder.encode(at % (limits.vocab_size or 1), batch), batch)
        if projects:
            encoder.project(batch)


@torch.inference_mode()
def _run(
    model: StepModel,
    limits: SchedulerLimits,
    block_size: int,
    device: torch.device,
    find_largest: sampler.FindLargest,
    input_tokens: int,
) -> None:
    """`input_tokens`: of the encoder input that every sequence has, 0 where there is no encoder."""
    chunk = min(limits.chunk_tokens, limits.max_batched_tokens, limits.max_model_len)
    count = min(max(1, limits.max_batched_tokens // chunk), limits.max_sequences)
    for num_tokens in step_sizes(chunk * count):
        query_lens = chunks(num_tokens, chunk)
        for cached in {0, min(block_size, limits.max_model_len - query_lens[-1])}:
            small = batch_on_null_block(query_lens, [cached] * len(query_lens), block_size, device, input_tokens)
            model.logits(model.forward(torch.arange(num_tokens, device=device) % (limits.vocab_size or 1), small)[-1:])
    query_lens = [chunk] * count
    ids = torch.arange(chunk * count, device=device) % (limits.vocab_size or 1)
    longest = limits.max_model_len - chunk
    hidden = model.forward(ids, batch_on_null_block(query_lens, [0] * count, block_size, device, input_tokens))
    if longest:
        cached_lens = [longest] + [0] * (count - 1)
        hidden = model.forward(ids, batch_on_null_block(query_lens, cached_lens, block_size, device, input_tokens))
    num_draws = limits.max_sequences
    rows = torch.arange(num_draws, device=device) % len(hidden)
    logits = model.logits(hidden[rows])
    zeros, ones = np.zeros(num_draws, np.int64), np.ones(num_draws, np.float32)
    sampler.sample(
        logits,
        sampler.Draws(
            temperature=ones,
            top_k=zeros,
            top_p=0.9 * ones,
            min_p=0.1 * ones,
            seed=zeros.astype(np.uint64),
            sample=zeros,
            position=zeros,
        ),
        find_largest,
    )


def step_sizes(largest: int) -> list[int]:
    """1, 2, 4, … up to `largest`, and beside each an odd number, an even one, and a multiple of 8: kernels are compiled
    for multiples of 16 apart, also of a size times the experts of a token, and tactics change with the size."""
    powers = [1 << exponent for exponent in range(largest.bit_length())]
    sizes = {power + more for power in powers for more in (0, 1, 2, 8) if power >= more}
    return sorted({size for size in sizes if size <= largest} | {largest, max(1, largest - 1)})


def chunks(num_tokens: int, chunk: int) -> list[int]:
    """Lengths of the fewest chunks, the shortest one first: a single token is a decode beside prompts."""
    rest = num_tokens % chunk
    return [rest] * (rest > 0) + [chunk] * (num_tokens // chunk)


def batch_on_null_block(
    query_lens: list[int], cached_lens: list[int], block_size: int, device: torch.device, input_tokens: int = 0
) -> AttentionBatch:
    """A step in which every block of every sequence is the null block. Lengths of 1 come first; `input_tokens`: see
    _run."""
    contexts = [query + cached for query, cached in zip(query_lens, cached_lens, strict=True)]
    parts = [torch.arange(cached, context) for cached, context in zip(cached_lens, contexts, strict=True)]
    positions = torch.cat(parts).to(device)
    starts = [0, *accumulate(query_lens)]
    width = -(-max(contexts) // block_size)
    table = torch.zeros(len(query_lens), width, dtype=torch.int64, device=device)
    return AttentionBatch(
        num_sequences=len(query_lens),
        num_decodes=query_lens.count(1),
        query_lens=query_lens,
        query_starts=starts,
        context_lens=contexts,
        positions=positions,
        groups=(GroupMetadata(table, positions % block_size),),
        logits_rows=torch.tensor(starts[1:], device=device) - 1,
        fixed=(_inputs(len(query_lens), input_tokens, block_size, device),) if input_tokens else (),
    )


def _inputs(count: int, num_tokens: int, block_size: int, device: torch.device) -> FixedGroupMetadata:
    table = torch.zeros(count, -(-num_tokens // block_size), dtype=torch.int64, device=device)
    return FixedGroupMetadata(table, [num_tokens] * count)
