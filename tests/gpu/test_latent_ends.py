"""Into latent space and out of it, against torch: odd numbers of tokens, strided inputs, runs of which some saw
nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.support.tensor_errors import error
from workers.attention.merging import PartialAttention, merge

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
@pytest.mark.parametrize("count", COUNTS)
def test_into_latent_space(count: int, heads: int) -> None:
    from workers.kernels.latent_ends import enter_latents

    keys, _ = matrices(heads)
    q = random(count, heads * (NOPE + ROPE) + 96)[:, : heads * (NOPE + ROPE)].unflatten(1, (heads, -1))[..., :NOPE]
    want = torch.einsum("ahn,hnl->ahl", q.float(), keys.float())
    assert error(enter_latents(q, keys), want) < 3e-3


@pytest.mark.parametrize("heads", [16, 5, 128])
@pytest.mark.parametrize("count", COUNTS)
def test_out_of_latent_space(count: int, heads: int) -> None:
    from workers.kernels.latent_ends import leave_latents

    _, values = matrices(heads)
    seen, out = random(count, heads, LATENT), random(count + 1, heads, VALUE)
    untouched = out[count].clone()
    leave_latents(seen, values, out[:count])
    assert error(out[:count], torch.einsum("ahl,hvl->ahv", seen.float(), values.float())) < 3e-3
    assert torch.equal(out[count], untouched)


@pytest.mark.parametrize("num_parts", [2, 4, 8])
@pytest.mark.parametrize(("count", "heads"), [(1, 16), (33, 5), (128, 16), (65, 128)])
def test_out_of_latent_space_from_runs(count: int, heads: int, num_parts: int) -> None:
    from workers.kernels.latent_ends import leave_latents
    from workers.kernels.split_merge import Parts, merged

    _, values = matrices(heads)
    parts = torch.randn(count, heads, num_parts, LATENT, device=CUDA)
    lse = 3 * torch.randn(count, heads, num_parts, device=CUDA)
    natural = lse * math.log(2)
    want = PartialAttention(parts[:, :, 0], natural[:, :, 0])
    for part in range(1, num_parts):
        want = merge(want, PartialAttention(parts[:, :, part], natural[:, :, part]))
    saw_nothing = torch.arange(count, device=CUDA) % 3 == 0
    parts[saw_nothing, :, 1:] = float("nan")  # as memory is that nobody wrote
    lse[saw_nothing, :, 1:] = float("-inf")
    seen = torch.where(saw_nothing[:, None, None], parts[:, :, 0], want.out)
    out = random(count, heads, VALUE)
    leave_latents(Parts(parts, lse), values, out)
    assert error(out, torch.einsum("ahl,hvl->ahv", seen, values.float())) < 5e-3
    whole = random(count, heads, VALUE)
    leave_latents(merged(Parts(parts, lse), BF16), values, whole)
    assert error(out, whole.float()) < 3e-3
