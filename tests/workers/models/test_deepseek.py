"""DeepSeek over paged latents equals transformers token by token in fp32, dense and sparse.

Families: V3.2 (sparse beyond 16 visible tokens), V3 (always dense), V3 whose queries have no latent ("lite").
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from statistics import median
from typing import cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cluster.errors import CheckpointError, ConfigError
from tests.support.checkpoints import (
    DECIDED,
    DecidedRun,
    checkpoint,
    decided,
    ragged_prompts,
    transformers_model,
)
from tests.support.families import INDEX_TOPK
from tests.support.paged_model import PagedModel, Text
from workers.attention.mla_interface import ContextKind, DenseContext
from workers.layers.mla import LatentAttention
from workers.models.deepseek import DeepseekForCausalLM
from workers.models.loader import load

SPARSE = ["deepseek-v32", "deepseek-v32-yarn"]
DENSE = ["deepseek-v3", "deepseek-v3-lite"]
NUM_TOKENS = 64
CANDIDATES = tuple(tuple(prompt) for seed in (0, 1, 2) for prompt in ragged_prompts(longest=90, seed=seed))
WEIGHTS = "model.safetensors"


@cache
def runs(family: str) -> list[DecidedRun]:
    """Eight prompts of 1 to 90 tokens and what transformers says to them."""
    return decided(family, CANDIDATES, 8, NUM_TOKENS)


def paged(family: str, *, block_size: int = 8, fill: float = 0.0, piece: int = 4096) -> PagedModel:
    model = PagedModel(load(checkpoint(family)).model, block_size=block_size, fill=fill)
    deepseek(model).bind_kv([model.cache], max_piece_tokens=piece)
    return model


def deepseek(model: PagedModel) -> DeepseekForCausalLM:
    return cast(DeepseekForCausalLM, model.model)


def texts(family: str) -> list[Text]:
    return [Text(list(run.prompt)) for run in runs(family)]


def longest(family: str) -> list[int]:
    return max((run.prompt for run in runs(family)), key=len)


def expected(family: str) -> list[list[int]]:
    return [run.tokens for run in runs(family)]


@contextmanager
def watched(model: PagedModel) -> Iterator[dict[str, int]]:
    """How often each way into attention was taken, by kind of context, "dense" and "sparse" generation rows."""
    counts = dict.fromkeys([*ContextKind, "dense", "sparse"], 0)
    layer = deepseek(model).model.layers[0].self_attn
    assert isinstance(layer, LatentAttention)
    context, generation = layer.forward_context, layer.forward_generation

    def forward_context(which: DenseContext, q: Tensor, *rest: object) -> Tensor:
        counts[which.kind] += 1
        return context(which, q, *rest)  # pyright: ignore[reportArgumentType]

    def forward_generation(q: Tensor, index: tuple[Tensor, Tensor] | None, *rest: object) -> Tensor:
        num_sparse = 0 if index is None else len(index[0])
        counts["sparse"] += num_sparse
        counts["dense"] += len(q) - num_sparse
        return generation(q, index, *rest)  # pyright: ignore[reportArgumentType]

    layer.forward_context, layer.forward_generation = forward_context, forward_generation  # pyright: ignore
    yield counts


@pytest.mark.parametrize("family", SPARSE + DENSE)
def test_fresh_prompts_and_decodes_in_one_batch(family: str) -> None:
    assert min(run.margin for run in runs(family)) > DECIDED
    model = paged(family)
    with watched(model) as counts:
        tokens = model.generate(texts(family), NUM_TOKENS)
    assert tokens == expected(family)
    assert len({token for row in tokens for token in row}) >= 100
    assert str(model.choice) == "attention: reference"
    if family in SPARSE:
        config = deepseek(model).config.attention.indexer
        assert config is not None and config.num_heads >= 16 and config.topk == INDEX_TOPK
        # The reference had to choose, in every layer, and the choice was never a tie.
        assert sum(run.num_index_choices for run in runs(family)) > 1500
        assert counts["sparse"] > 400 and counts["dense"] > 10 and counts[ContextKind.FRESH] >= 1
    else:
        single = sum(len(run.prompt) == 1 for run in runs(family))
        assert counts == {**dict.fromkeys(counts, 0), "fresh": 8 - single, "dense": 8 * 63 + single}


@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
def test_any_block_size(block_size: int) -> None:
    model = PagedModel(load(checkpoint("deepseek-v32")).model, block_size=block_size, num_blocks=600)
    tokens = model.generate(texts("deepseek-v32")[:4], NUM_TOKENS)
    assert tokens == expected("deepseek-v32")[:4]


@pytest.mark.parametrize(
    ("family", "chunk", "piece", "kinds"),
    [
        ("deepseek-v32", 7, 4096, {"fresh", "cached", "sparse"}),
        ("deepseek-v32", 5, 6, {"fresh", "chunked", "sparse"}),
        ("deepseek-v32-yarn", 25, 4096, {"sparse"}),
        ("deepseek-v3", 13, 4096, {"fresh", "cached"}),
        ("deepseek-v3", 13, 10, {"fresh", "chunked"}),
        ("deepseek-v3-lite", 13, 4096, {"fresh", "cached"}),
        ("deepseek-v3-lite", 13, 10, {"fresh", "chunked"}),
    ],
)
def test_prompts_in_chunks(family: str, chunk: int, piece: int, kinds: set[str]) -> None:
    """All prompts advance together, so that one batch holds first, middle and last chunks, and decodes."""
    model = paged(family, piece=piece)
    waiting, lengths = texts(family), [len(run.prompt) for run in runs(family)]
    num_chunks = 0
    with watched(model) as counts:
        while any(len(text.tokens) < length + NUM_TOKENS for text, length in zip(waiting, lengths, strict=True)):
            work = [(text, min(chunk, len(text.tokens) - text.num_computed)) for text in waiting]
            logits = model.step(work)
            num_chunks += sum(count > 1 for _, count in work)
            for (text, _), token in zip(work, logits.argmax(-1).tolist(), strict=True):
                if text.num_computed == len(text.tokens):
                    text.tokens.append(token)
    got = [text.tokens[length : length + NUM_TOKENS] for text, length in zip(waiting, lengths, strict=True)]
    assert got == expected(family)
    assert num_chunks >= 3 and max(lengths) / chunk >= 3
    assert all(counts[kind] > 0 for kind in kinds)


@pytest.mark.parametrize("family", ["deepseek-v32", "deepseek-v3", "deepseek-v3-lite"])
def test_cached_prefix_equals_fresh(family: str) -> None:
    """Texts continue one computed prefix of three blocks, which none of them computes or writes again."""
    model = paged(family)
    prefix = longest(family)[:24]
    first = Text(list(prefix))
    model.step([(first, len(prefix))])
    before = {name: pages[first.blocks].clone() for name, pages in model.cache.regions.items()}
    prompts = tuple((*prefix, *tail) for seed in (1, 2) for tail in ragged_prompts(4, seed=seed))
    continued = decided(family, prompts, 4, 32)
    shared = [Text(list(run.prompt), num_computed=24, blocks=list(first.blocks)) for run in continued]
    assert model.generate(shared, 32) == [run.tokens for run in continued]
    assert all(torch.equal(pages[first.blocks], before[name]) for name, pages in model.cache.regions.items())


@pytest.mark.parametrize("family", ["deepseek-v32", "deepseek-v3-lite"])
def test_generation_from_copied_blocks(family: str) -> None:
    """Decode alone, over latents and index keys that another model's pool computed: what a transfer hands over."""
    source, sink = paged(family), paged(family)
    moved = texts(family)
    source.generate(moved, 1)
    sink.receive(source, moved)
    tokens = sink.generate(moved, NUM_TOKENS - 1)
    firsts = [text.tokens[len(run.prompt)] for text, run in zip(moved, runs(family), strict=True)]
    assert [[first, *row] for first, row in zip(firsts, tokens, strict=True)] == expected(family)


@pytest.mark.parametrize("family", ["deepseek-v32", "deepseek-v3"])
@pytest.mark.parametrize("piece", [10, 4096])
def test_what_earlier_owners_left_in_blocks_is_never_seen(family: str, piece: int) -> None:
    model = paged(family, fill=float("nan"), piece=piece)
    assert model.generate(texts(family), NUM_TOKENS) == expected(family)


def test_index_keys_are_cached_while_nothing_is_chosen() -> None:
    """Every visible token fits, so no top-k runs: the keys that later steps need are there all the same."""
    model = paged("deepseek-v32")
    text = Text(list(longest("deepseek-v32")[:INDEX_TOPK]))
    with watched(model) as counts:
        model.step([(text, 5)])  # context
        model.step([(text, 1)])  # generation
        model.step([(text, INDEX_TOPK - 6)])  # exactly index_topk tokens, cached and new together
    assert counts == {"fresh": 1, "cached": 1, "chunked": 0, "dense": 1, "sparse": 0}
    with torch.inference_mode():
        cached = transformers_model("deepseek-v32")(torch.tensor([text.tokens]), use_cache=True).past_key_values
    for layer in range(3):
        ours = model.cache.layer("index_keys", layer)[text.blocks].flatten(0, 1)[:INDEX_TOPK]
        torch.testing.assert_close(ours, cached.layers[layer].indexer_keys[0], rtol=1e-4, atol=1e-4)
        latents = model.cache.layer("latents", layer)[text.blocks].flatten(0, 1)[:INDEX_TOPK]
        torch.testing.assert_close(latents[:, :32], cached.layers[layer].keys[0, 0], rtol=1e-4, atol=1e-4)
        # transformers puts even features first; ours stay where the weights have them
        rope = torch.cat((latents[:, 32::2], latents[:, 33::2]), -1)
        torch.testing.assert_close(rope, cached.layers[layer].values[0, 0], rtol=1e-4, atol=1e-4)
    with watched(model) as counts:
        text.tokens.append(3)
        model.step([(text, 1)])
    assert counts["sparse"] == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["deepseek-v32", "deepseek-v3"])
def test_half_precision_is_as_near_to_fp32_as_that_of_transformers(family: str, dtype: str) -> None:
    """Teacher-forced over all positions of the long prompts. Rounding moves tokens to other experts and index
    choices, in both programs, so that only the typical error can be compared."""
    model = PagedModel(load(checkpoint(family, dtype)).model, block_size=8)
    assert {pages.dtype for pages in model.cache.regions.values()} == {getattr(torch, dtype)}
    ours, theirs = [], []
    for run in runs(family):
        ids = torch.tensor([run.prompt + run.tokens])
        batch, input_ids = model.batch([(Text(ids[0].tolist()), ids.shape[1])])
        got = model.model.logits(model.model.forward(input_ids, batch)).float()
        with torch.inference_mode():
            exact = transformers_model(family)(ids).logits[0]
            rounded = transformers_model(family, dtype)(ids).logits[0].float()
        for errors, logits in ((ours, got), (theirs, rounded)):
            errors += ((logits - exact).norm(dim=-1) / exact.norm(dim=-1)).tolist()
    assert len(ours) > 700
    print(family, dtype, "median error", median(ours), median(theirs))
    assert median(ours) < 1.3 * median(theirs) < 0.6


def test_captured_layers_follow_the_hidden_states() -> None:
    model = paged("deepseek-v32")
    prompt = longest("deepseek-v32")
    batch, input_ids = model.batch([(Text(list(prompt)), len(prompt))])
    hidden = model.model.forward(input_ids, batch, capture_layers=(0, 2))
    with torch.inference_mode():
        states = transformers_model("deepseek-v32")(torch.tensor([prompt]), output_hidden_states=True).hidden_states
    wanted = torch.cat([states[3][0], states[0][0], states[2][0]], -1)  # transformers norms the last one
    torch.testing.assert_close(hidden, wanted, rtol=1e-3, atol=1e-3)


def test_a_step_without_tokens() -> None:
    for family in ("deepseek-v32", "deepseek-v3-lite"):
        assert paged(family).step([]).shape == (0, 512)


def test_geometry_and_spec() -> None:
    loaded = load(checkpoint("deepseek-v32"))
    (group,) = loaded.model.kv_groups(64)
    assert [(region.name, region.row_size, region.num_layers) for region in group.regions] == [
        ("latents", 48, 3),
        ("index_keys", 24, 3),
    ]
    assert group.block_bytes() == 3 * 64 * (48 + 24) * 4 and group.name == "self"
    assert [region.name for region in load(checkpoint("deepseek-v3")).model.kv_groups(64)[0].regions] == ["latents"]
    spec = loaded.model.spec
    assert (spec.architecture, spec.rope_convention, spec.num_layers) == ("DeepseekV32ForCausalLM", "interleaved", 3)


# ---------------------------------------------------------------- loading


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("deepseek-v32"), tmp_path / "model"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def parameters(folder: Path) -> dict[str, nn.Parameter]:
    return dict(cast(nn.Module, load(folder).model).named_parameters())


def test_weights_are_views_of_the_file_experts_one_by_one() -> None:
    model = cast(DeepseekForCausalLM, load(checkpoint("deepseek-v32")).model)
    assert len({parameter.untyped_storage().data_ptr() for parameter in model.parameters()}) == 1
    attention = model.model.layers[1].self_attn
    assert isinstance(attention, LatentAttention)
    whole = attention.kv_b_proj.weight
    for view in (attention.key_weights, attention.value_weights):
        assert view.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert torch.equal(attention.key_weights[3, 0], whole[3 * 44]) and attention.key_weights.shape == (4, 20, 32)
    assert torch.equal(attention.value_weights[3, 0], whole[3 * 44 + 20]) and attention.value_weights.shape == (
        4,
        24,
        32,
    )


def test_what_decides_stays_in_fp32() -> None:
    wide = {name for name, value in parameters(checkpoint("deepseek-v32", "bfloat16")).items() if value.itemsize == 4}
    assert {name.split(".", 3)[3] for name in wide} == {
        "mlp.gate.e_score_correction_bias",
        "self_attn.indexer.weights_proj.weight",
    }


def test_the_draft_layer_is_dropped(folder: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.3.eh_proj.weight"] = torch.ones(64, 128)
        tensors["model.layers.3.mlp.experts.0.up_proj.weight"] = torch.ones(40, 64)

    edit_weights(folder, add)
    assert parameters(folder).keys() == parameters(checkpoint("deepseek-v32")).keys()
    assert load(folder).ignored == ("model.layers.3.eh_proj.weight", "model.layers.3.mlp.experts.0.up_proj.weight")
    edit_config(folder, num_nextn_predict_layers=0)
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.eh_proj\.weight.*unknown"):
        load(folder)


def test_a_missing_expert_is_named(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop("model.layers.2.mlp.experts.7.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.experts\.7\.up_proj\.weight missing"):
        load(folder)


def test_random_weights_need_the_config_only(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    model = PagedModel(load(folder, load_format="dummy", dummy_seed=3).model, block_size=8)
    tokens = model.generate([Text([5, 6, 7])], 40)[0]
    assert len(set(tokens)) >= 20


def test_older_config_keys_mean_the_same(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key in ("mlp_layer_types", "layer_types", "rope_parameters", "head_dim", "qk_head_dim"):
        config.pop(key)
    config |= {"rope_theta": 10000, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
    theirs = cast(DeepseekForCausalLM, load(checkpoint("deepseek-v32")).model)
    for more in ({}, {"layer_types": ["deepseek_sparse_attention"] * config["num_hidden_layers"]}):
        (folder / "config.json").write_text(json.dumps(config | more))
        assert cast(DeepseekForCausalLM, load(folder).model).config == theirs.config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scoring_func": "softmax"}, "scoring_func = 'softmax'; only \"sigmoid\" is computed"),
        ({"topk_method": "greedy"}, "topk_method"),
        ({"n_group": 3}, "n_group = 3; must divide n_routed_experts = 16"),
        ({"topk_group": 5}, "topk_group = 5; must be at most n_group = 4"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok = 9; is more than"),
        ({"q_lora_rank": None}, "q_lora_rank = None; a model with index_topk needs it"),
        ({"index_head_dim": 8}, "index_head_dim = 8; must be at least"),
        ({"mlp_layer_types": ["dense", "sparse"]}, "mlp_layer_types"),
        ({"norm_topk_prob": None}, "norm_topk_prob = None; must be true or false"),
        ({"num_key_value_heads": 2}, "num_key_value_heads = 2; only 4 is computed"),
        ({"rope_interleave": False}, "rope_interleave = False; only true is computed"),
        ({"mlp_bias": True}, "mlp_bias = True; only false is computed"),
        ({"layer_types": ["full_attention"] * 3}, "only deepseek_sparse_attention or indexed_attention"),
        ({"moe_layer_freq": 2}, "moe_layer_freq = 2; only 1 is computed"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "use default, linear, llama3 or yarn"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'; only \"silu\" is computed"),
    ],
)
def test_what_is_not_computed_is_refused(folder: Path, changes: dict[str, object], message: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_windowed_attention_is_refused_by_the_resolver(folder: Path) -> None:
    edit_config(folder, sliding_window=128)
    model = load(folder).model
    with pytest.raises(ConfigError, match="not a window of 128"):
        PagedModel(model, block_size=8)
