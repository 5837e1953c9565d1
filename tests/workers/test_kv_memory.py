"""How many blocks a pool gets: what the config says where it fits, else a share of what is free."""

from __future__ import annotations

import pytest

from cluster.config import KvConfig
from cluster.errors import ConfigError
from tests.support.kv_builders import latent_geometry
from workers.kv_memory import FreeMemory, num_blocks

(GROUP,) = latent_geometry(num_layers=4, block_size=64, row_size=576).groups
BLOCK = GROUP.block_bytes()
GPU = FreeMemory(1000 * BLOCK, 0.9, is_hard=True)
HOST = FreeMemory(1000 * BLOCK, 0.1, is_hard=False)


def count(kv: KvConfig, free: FreeMemory, pool_blocks: int | None = None) -> int:
    (found,) = num_blocks(kv, (GROUP,), [4096], free, pool="decode", pool_blocks=pool_blocks)
    return found


def test_what_is_free_is_shared_out_unless_the_config_is_exact() -> None:
    assert count(KvConfig(), HOST) == 100
    assert count(KvConfig(), GPU) == 900
    assert count(KvConfig(memory_fraction=0.5), GPU) == 500
    assert count(KvConfig(memory_bytes=7 * BLOCK), GPU) == 7
    assert count(KvConfig(num_blocks=999), GPU) == 999
    assert count(KvConfig(num_blocks=999), GPU, pool_blocks=12) == 12
    assert count(KvConfig(num_blocks=5000), HOST) == 5000, "a host's free memory is an estimate"


@pytest.mark.parametrize(
    ("kv", "pool_blocks", "said"),
    [
        (KvConfig(num_blocks=1000), None, r"^kv\.num_blocks: 1000 blocks of .* MB, but .* lower it to 999$"),
        (KvConfig(), 2000, r"^pools\.decode\.num_blocks: 2000 blocks .* lower it to 999$"),
        (KvConfig(memory_bytes=1001 * BLOCK), None, rf"^kv\.memory_bytes: .*; lower it to {1000 * BLOCK}$"),
        (KvConfig(memory_fraction=0.001), None, r"^kv\.memory_fraction: .* too little for blocks of"),
    ],
)
def test_more_than_fits_a_gpu_is_refused_with_what_would(kv: KvConfig, pool_blocks: int | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        count(kv, GPU, pool_blocks)
