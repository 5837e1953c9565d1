"""Into latent space and out of it, against torch: odd numbers of tokens, strided inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.gpu.test_kernels import BLOCK, norm_of
from tests.support.tensor_errors import error
from workers.layers.rotary import RotaryEmbedding

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
BF16 = torch.bfloat16
NOPE, ROPE, VALUE, LATENT = 128, 64, 128, 512
COUNTS = [1, 15, 16, 17, 128, 131, 256]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=CUDA).to(BF16)


def matrices(heads: int) -> tuple[Tensor, Tensor]:
    """Keys' and values', as views of one."""
    both = random(heads, NOPE + VALUE, LATENT) * 0.1
    return both[:, :NOPE], both[:, NOPE:]


@pytest.mark.parametrize("heads", [16, 5, 128])
@pytest.mark.parametrize(("tokens", "singles"), [*((count, count) for count in COUNTS), (29, 0), (300, 7), (300, 300)])
def test_rows_and_queries_are_rotated_and_those_of_few_tokens_enter_latent_space(
    tokens: int, singles: int, heads: int
) -> None:
    from workers.kernels.latent_entry import ENDS_ROWS, enter_latents
    from workers.kernels.rotary import RotationTable

    layers, layer = 3, 1
    keys, _ = matrices(heads)
    rotary = RotaryEmbedding(ROPE, 1e4)
    table = rotary.rotation(torch.arange(5000, device=CUDA), torch.float32)
    positions = torch.randint(0, 5000, (tokens,), device=CUDA)
    slots = torch.randperm(9 * BLOCK, device=CUDA)[:tokens] + BLOCK
    pages = torch.zeros(10, layers, BLOCK, LATENT + ROPE, dtype=BF16, device=CUDA)
    both = random(tokens, heads * (NOPE + ROPE) + LATENT + ROPE)
    given, rows = both.clone().split([heads * (NOPE + ROPE), LATENT + ROPE], -1)
    given, norm, rotation = given.unflatten(-1, (heads, -1)), norm_of(LATENT), rotary.rotation(positions, torch.float32)
    want_q = torch.cat((given[..., :NOPE].float(), rotation.apply_interleaved(given[..., NOPE:].float())), -1)
    turned = rotation.apply_interleaved(rows[:, LATENT:].float().unsqueeze(1)).squeeze(1)
    want_rows = torch.cat((norm(rows[:, :LATENT]).float(), turned), -1)
    q, kv = both.split([heads * (NOPE + ROPE), LATENT + ROPE], -1)
    q = q.unflatten(-1, (heads, -1))
    absorbed = enter_latents(
        q,
        kv,
        RotationTable(table.cos.flatten(1), table.sin.flatten(1)),
        positions,
        norm.weight,
        norm.eps,
        pages,
        slots,
        layer,
        singles,
        keys,
    )
    assert error(q, want_q) < 3e-3
    assert torch.equal(q[..., :NOPE], given[..., :NOPE])
    assert error(kv, want_rows) < 3e-3
    assert torch.equal(pages[slots // BLOCK, layer, slots % BLOCK], kv)
    assert pages[:, [0, 2]].abs().max() == 0
    if not 0 < singles <= ENDS_ROWS:
        assert absorbed is None
        return
    assert absorbed is not None and absorbed.shape == (singles, heads, LATENT)
    want = torch.einsum("ahn,hnl->ahl", given[:singles, :, :NOPE].float(), keys.float())
    assert error(absorbed, want) < 3e-3


@pytest.mark.parametrize("heads", [16, 5, 128])
@pytest.mark.parametrize("count", COUNTS)
def test_out_of_latent_space(count: int, heads: int) -> None:
    from workers.kernels.latent_exit import leave_latents

    _, values = matrices(heads)
    seen, out = random(count, heads, LATENT), random(count + 1, heads, VALUE)
    untouched = out[count].clone()
    leave_latents(seen, values, out[:count])
    assert error(out[:count], torch.einsum("ahl,hvl->ahv", seen.float(), values.float())) < 3e-3
    assert torch.equal(out[count], untouched)
