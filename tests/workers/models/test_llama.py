"""Llama over paged KV equals transformers token by token in fp32. Each way into attention has a test of its own."""

from functools import cache

import pytest
import torch

from tests.support.checkpoints import checkpoint, greedy_each, ragged_prompts, transformers_model
from tests.support.paged_model import PagedModel, Text
from workers.models.loader import load

FAMILIES = ["llama", "llama-mha-bias", "llama3-tied"]
NUM_TOKENS = 32
PROMPTS = ragged_prompts()


@cache
def expected(family: str) -> list[list[int]]:
    return greedy_each(family, PROMPTS, NUM_TOKENS)


def paged(family: str, *, block_size: int = 8, fill: float = 0.0) -> PagedModel:
    return PagedModel(load(checkpoint(family)).model, block_size=block_size, fill=fill)


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_prompts_and_decodes_in_one_batch(family: str) -> None:
    model = paged(family)
    tokens = model.generate([Text(list(prompt)) for prompt in PROMPTS], NUM_TOKENS)
    assert tokens == expected(family)
    assert len({token for row in tokens for token in row}) >= 100
    assert str(model.choice) == "attention: reference"


@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
def test_any_block_size(block_size: int) -> None:
    tokens = paged("llama", block_size=block_size).generate([Text(list(PROMPTS[-1]))], NUM_TOKENS)
    assert tokens == [expected("llama")[-1]]


@pytest.mark.parametrize("chunk", [1, 7, 8, 25])
def test_prompts_in_chunks_beside_decodes(chunk: int) -> None:
    """Prompts join one by one, so that chunks of one text lie beside decodes of others."""
    model = paged("llama")
    running: list[Text] = []
    mixed = 0
    for prompt in PROMPTS:
        text = Text(list(prompt))
        for _ in range(-(-len(prompt) // chunk)):
            work = [(other, 1) for other in running]
            logits = model.step([*work, (text, min(chunk, len(prompt) - text.num_computed))])
            *decoded, last = logits.argmax(-1).tolist()
            for other, token in zip(running, decoded, strict=True):
                other.tokens.append(token)
            if text.num_computed == len(prompt):
                text.tokens.append(last)
            mixed += bool(running)
        running.append(text)
    assert mixed >= 7
    while any(len(text.tokens) < len(prompt) + NUM_TOKENS for text, prompt in zip(running, PROMPTS, strict=True)):
        for text, token in zip(running, model.step([(text, 1) for text in running]).argmax(-1).tolist(), strict=True):
            text.tokens.append(token)
    got = [text.tokens[len(p) : len(p) + NUM_TOKENS] for text, p in zip(running, PROMPTS, strict=True)]
    assert got == expected("llama")


def test_cached_prefix_equals_fresh() -> None:
    """Eight texts continue one computed prefix of three blocks, which none of them computes or writes again."""
    model = paged("llama")
    prefix = PROMPTS[-1][:24]
    first = Text(list(prefix))
    model.step([(first, len(prefix))])
    before = model.cache.pages("kv")[first.blocks].clone()
    prompts = [prefix + tail for tail in ragged_prompts(seed=1)]
    texts = [Text(list(prompt), num_computed=24, blocks=list(first.blocks)) for prompt in prompts]
    tokens = model.generate(texts, NUM_TOKENS)
    assert tokens == greedy_each("llama", prompts, NUM_TOKENS)
    assert len({token for row in tokens for token in row}) >= 100
    assert torch.equal(model.cache.pages("kv")[first.blocks], before)


def test_generation_from_copied_blocks() -> None:
    """Decode alone, over KV that another model's pool computed: what a transfer hands over."""
    source, sink = paged("llama"), paged("llama")
    texts = [Text(list(prompt)) for prompt in PROMPTS]
    source.generate(texts, 1)
    sink.receive(source, texts)
    tokens = sink.generate(texts, NUM_TOKENS - 1)
    assert [[text.tokens[len(p)], *row] for text, p, row in zip(texts, PROMPTS, tokens, strict=True)] == expected(
        "llama"
    )


def test_what_earlier_owners_left_in_blocks_is_never_seen() -> None:
    """NaN everywhere, the null block included: one poisoned request must not reach the next owner of its blocks."""
    tokens = paged("llama", fill=float("nan")).generate([Text(list(prompt)) for prompt in PROMPTS], NUM_TOKENS)
    assert tokens == expected("llama")


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.01), ("float16", 0.001)])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_half_precision_agrees_with_transformers_in_the_same_dtype(family: str, dtype: str, bound: float) -> None:
    """Teacher-forced: the logits' relative error stays near the dtype's rounding."""
    model = PagedModel(load(checkpoint(family, dtype)).model, block_size=8)
    assert model.cache.pages("kv").dtype == getattr(torch, dtype)
    text = Text(list(PROMPTS[-1]))
    got = model.step([(text, 60)])[0].float()
    with torch.inference_mode():
        want = transformers_model(family, dtype)(torch.tensor([PROMPTS[-1]])).logits[0, -1].float()
    assert (got - want).norm() / want.norm() < bound


def test_captured_layers_follow_the_hidden_states() -> None:
    model = paged("llama")
    batch, input_ids = model.batch([(Text(list(PROMPTS[-1])), 60)])
    hidden = model.model.forward(input_ids, batch, capture_layers=(0, 2))
    with torch.inference_mode():
        states = transformers_model("llama")(torch.tensor([PROMPTS[-1]]), output_hidden_states=True).hidden_states
    wanted = torch.cat([states[3][0], states[0][0], states[2][0]], -1)  # transformers norms the last one
    torch.testing.assert_close(hidden, wanted, rtol=1e-4, atol=1e-4)


def test_a_step_without_tokens() -> None:
    model = paged("llama")
    assert model.step([]).shape == (0, 512)


def test_geometry_and_spec() -> None:
    loaded = load(checkpoint("llama"))
    (group,) = loaded.model.kv_groups(64)
    (region,) = group.regions
    assert (group.name, region.num_layers, region.kv_heads, region.head_dim) == ("self", 3, 2, 16)
    assert region.page_bytes() == 2 * 2 * 64 * 16 * 4
    spec = loaded.model.spec
    assert (spec.architecture, spec.vocab_size, spec.hidden_size, spec.num_layers) == ("LlamaForCausalLM", 512, 64, 3)
    assert (spec.dtype, spec.eos_token_ids, spec.rope_convention) == ("float32", (511,), "half_split")
