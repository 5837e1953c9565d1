"""Norm and rotary embeddings give the numbers that transformers gives."""

import pytest
import torch
from transformers.models.deepseek_v32.configuration_deepseek_v32 import DeepseekV32Config
from transformers.models.deepseek_v32.modeling_deepseek_v32 import (
    DeepseekV32RotaryEmbedding,
    apply_rotary_pos_emb_interleave,
    yarn_apply_mscale,
)
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from tests.support.families import LLAMA3_ROPE, YARN_ROPE
from workers.layers.norm import RmsNorm
from workers.layers.rotary import (
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    RotaryEmbedding,
    YarnScaling,
    yarn_mscale,
)

SCALING = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm(dtype: torch.dtype) -> None:
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    theirs, ours = LlamaRMSNorm(48, 1e-5), RmsNorm(48, 1e-5)
    weight = torch.rand(48, generator=torch.Generator().manual_seed(1))
    theirs.weight.data, ours.weight.data = weight.to(dtype), weight.to(dtype)
    bound = 1e-6 if dtype == torch.float32 else 0.0
    torch.testing.assert_close(ours(x), theirs(x), rtol=bound, atol=bound)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary(scaled: bool, dtype: torch.dtype) -> None:
    parameters = LLAMA3_ROPE if scaled else {"rope_type": "default", "rope_theta": 10000.0}
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(hidden_size=64, num_attention_heads=2, head_dim=32, rope_parameters=dict(parameters))
    )
    ours = RotaryEmbedding(32, 10000.0, SCALING if scaled else None)
    torch.testing.assert_close(ours.frequencies, theirs.inv_freq, rtol=1e-6, atol=0)
    positions = torch.tensor([0, 1, 7, 63, 64, 5000])
    x = torch.randn(6, 3, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    cos, sin = theirs(x, positions[None])
    wanted, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    got = ours.rotation(positions, dtype).apply(x)
    bound = 2e-3 if dtype == torch.float32 else 2e-2  # at position 5000 an ulp of a frequency is seen
    torch.testing.assert_close(got, wanted[0].transpose(0, 1), rtol=bound, atol=bound)
    exact = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got[:5], wanted[0].transpose(0, 1)[:5], rtol=exact, atol=exact)


@pytest.mark.parametrize(
    ("parameters", "scaling"),
    [
        ({"rope_type": "linear", "factor": 3.0}, LinearScaling(factor=3.0)),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "truncate": False},
            YarnScaling(
                factor=4.0,
                beta_fast=32.0,
                beta_slow=1.0,
                original_max_position_embeddings=32,
                attention_factor=yarn_mscale(4.0, 1.0),
                truncate=False,
            ),
        ),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "beta_fast": 1.0},
            YarnScaling(
                factor=4.0,
                beta_fast=1.0,
                beta_slow=1.0,
                original_max_position_embeddings=4096,
                attention_factor=yarn_mscale(4.0, 1.0),
            ),
        ),
    ],
)
def test_scaled_frequencies(parameters: dict[str, object], scaling: RopeScaling) -> None:
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=64,
            num_attention_heads=2,
            head_dim=32,
            max_position_embeddings=128,
            rope_parameters={**parameters, "rope_theta": 50000.0},
        )
    )
    ours = RotaryEmbedding(32, 50000.0, scaling)
    torch.testing.assert_close(ours.frequencies, theirs.inv_freq, rtol=1e-6, atol=0)
    assert ours.magnitude == pytest.approx(theirs.attention_scaling)
    assert not torch.allclose(ours.frequencies, RotaryEmbedding(32, 50000.0).frequencies)


def test_yarn_and_interleaved_rotation() -> None:
    """transformers puts the rotated even features first; ours stay in their places."""
    config = DeepseekV32Config(qk_rope_head_dim=32, max_position_embeddings=256, rope_parameters=dict(YARN_ROPE))
    theirs = DeepseekV32RotaryEmbedding(config)
    factor = yarn_mscale(4.0, 1.0) / yarn_mscale(4.0, 0.7)
    scaling = YarnScaling(
        factor=4.0, beta_fast=8.0, beta_slow=1.0, original_max_position_embeddings=64, attention_factor=factor
    )
    ours = RotaryEmbedding(32, 10000.0, scaling)
    torch.testing.assert_close(ours.frequencies, theirs.inv_freq, rtol=1e-6, atol=0)
    assert len(set((ours.frequencies * 10000 ** (torch.arange(0, 32, 2) / 32)).round(decimals=4).tolist())) > 2
    assert factor != 1.0 and ours.magnitude == pytest.approx(theirs.attention_scaling)
    assert yarn_apply_mscale(YARN_ROPE, 1.0) == pytest.approx(yarn_mscale(4.0, 0.7) ** 2)
    positions = torch.tensor([0, 1, 7, 63, 200])
    x = torch.randn(5, 3, 32, generator=torch.Generator().manual_seed(3))
    cos, sin = theirs(x, positions[None])
    batch = x.transpose(0, 1)[None]
    wanted, _ = apply_rotary_pos_emb_interleave(batch, batch, cos, sin)
    got = ours.rotation(positions, torch.float32).apply_interleaved(x)
    split = torch.cat((got[..., 0::2], got[..., 1::2]), -1)
    torch.testing.assert_close(split, wanted[0].transpose(0, 1), rtol=1e-5, atol=1e-5)
