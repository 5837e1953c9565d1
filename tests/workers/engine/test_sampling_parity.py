"""Penalties, bad words, early ends, logprobs and embeddings of a loaded model, against transformers in fp32."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch

from cluster.request import Pooling, SamplingParams
from tests.support.checkpoints import DECIDED, checkpoint, ragged_prompts, transformers_model
from tests.support.engines import LoadedEngine, limits
from tests.support.margins import Margins
from workers.models.loader import load

NUM_TOKENS = 40
TOLERANCE = 5e-4  # of two fp32 programs on these weights; test_sampling_params has 1e-4 on exact ones
EOS = 5
STRONG = 3.0  # of the repetition penalty
# So many that one comes up every few tokens.
BAD_WORDS = tuple((first, second) for first in range(0, 256, 3) for second in range(0, 256, 2))


@torch.inference_mode()
def generate(prompt: list[int], **options: object) -> tuple[list[int], torch.Tensor, float]:
    """Tokens, raw logits [n, V] before each of them, and how clearly they were chosen."""
    model = cast(Any, transformers_model("llama"))
    with Margins() as margins:
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
    return output.sequences[0, len(prompt) :].tolist(), torch.cat(output.logits), margins.smallest


def test_processed_tokens_and_their_logprobs_in_a_crowded_pool() -> None:
    loaded = LoadedEngine(
        load(checkpoint("llama")), num_blocks=24, scheduler_limits=limits(max_batched_tokens=40, chunk_tokens=16)
    )
    params = SamplingParams(
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
        repetition_penalty=STRONG,
        bad_words=BAD_WORDS,
        min_tokens=20,
        stop_token_ids=(EOS,),
        num_logprobs=4,
        num_prompt_logprobs=2,
    )
    wanted = {"repetition_penalty": STRONG, "bad_words_ids": [list(word) for word in BAD_WORDS]}
    runs = []
    for prompt in ragged_prompts(10, longest=70, seed=3):
        tokens, logits, margin = generate(prompt, **wanted, min_new_tokens=20, eos_token_id=EOS)
        if margin > DECIDED:
            runs.append((prompt, tokens, logits))
    assert len(runs) >= 6
    sequences = [loaded.submit(prompt, params) for prompt, *_ in runs]
    loaded.run()
    assert sum(seq.num_preemptions for seq in sequences) > 0
    for (prompt, tokens, logits), seq in zip(runs, sequences, strict=True):
        assert loaded.emitted(seq) == tokens
        for entry, token, row in zip(loaded.logprobs(seq), tokens, logits.log_softmax(-1), strict=True):
            assert entry is not None
            assert abs(entry.logprob - float(row[token])) < TOLERANCE
            best = row.topk(4)
            np.testing.assert_allclose([value for _, value in entry.top], best.values, atol=TOLERANCE)
            assert all(abs(float(row[token]) - value) < TOLERANCE for token, value in entry.top)
        with torch.inference_mode():
            whole = transformers_model("llama")(torch.tensor([prompt])).logits[0].log_softmax(-1)
        said = loaded.prompt_logprobs(seq)
        assert sorted(said) == list(range(1, len(prompt)))
        for index, entry in said.items():
            assert abs(entry.logprob - float(whole[index - 1, prompt[index]])) < TOLERANCE
            np.testing.assert_allclose(
                [value for _, value in entry.top], whole[index - 1].topk(2).values, atol=TOLERANCE
            )
    emitted = [token for seq in sequences for token in loaded.emitted(seq)]
    assert len(set(emitted)) >= 100, f"{len(set(emitted))} different tokens prove little"
    for option in wanted:
        others = {name: value for name, value in wanted.items() if name != option}
        without = (generate(prompt, **others, min_new_tokens=20, eos_token_id=EOS)[0] for prompt, *_ in runs)
        assert any(tokens != other for (_, tokens, _), other in zip(runs, without, strict=True)), option


def test_embeddings_are_the_final_hidden_states() -> None:
    loaded = LoadedEngine(load(checkpoint("llama")), scheduler_limits=limits(max_batched_tokens=40, chunk_tokens=16))
    prompts = ragged_prompts(6, longest=70, seed=4)
    loaded.submit(prompts[-1], SamplingParams(max_tokens=1))
    loaded.run()
    last = [loaded.submit(prompt, SamplingParams(pooling=Pooling.LAST)) for prompt in prompts]
    mean = [loaded.submit(prompt, SamplingParams(pooling=Pooling.MEAN)) for prompt in prompts]
    loaded.run()
    assert (last[-1].prefix_hit_tokens, mean[-1].prefix_hit_tokens) == (64, 0)
    for prompt, of_last, of_mean in zip(prompts, last, mean, strict=True):
        with torch.inference_mode():
            hidden = transformers_model("llama")(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0]
        np.testing.assert_allclose(loaded.vector(of_last), hidden[-1], atol=TOLERANCE)
        np.testing.assert_allclose(loaded.vector(of_mean), hidden.mean(0), atol=TOLERANCE)
