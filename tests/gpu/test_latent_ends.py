"""Into latent space and out of it, against torch: odd numbers of tokens, strided inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.tensor_errors import error

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
