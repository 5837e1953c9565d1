"""The one block-hash chain, shared by the workers' prefix caches and the router.

Hash i covers everything before it: h_i = BLAKE2b-128(key=root, h_{i-1} ‖ tokens of block i as uint32 LE),
h_{-1} = 16 zero bytes. The root covers what makes equal tokens different KV: weights and geometry
(compatibility hash), the tenant's salt, the LoRA id, and for encoder–decoder models the encoder input.
"""

import sys
from array import array
from collections.abc import Iterator, Sequence
from hashlib import blake2b

HASH_BYTES = 16


def chain_root(
    compatibility_hash: bytes, *, salt: str = "", lora_id: str = "", encoder_tokens: Sequence[int] = ()
) -> bytes:
    """16-byte key of a chain. Fields are length-prefixed, so that no two differ only in where they split."""
    digest = blake2b(digest_size=HASH_BYTES, person=b"sluice.root")
    for part in (compatibility_hash, salt.encode(), lora_id.encode(), _token_bytes(encoder_tokens)):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def salt_of(owner: str, request: str) -> str:
    """Of a request's chain: what its client always has, and what it named. "": neither. No two pairs make the same."""
    return f"{len(owner)}:{owner}{request}" if owner or request else ""


def root_of(wire: bytes) -> bytes | None:
    """Of a frame; None: it has none. Raises ValueError."""
    if len(wire) not in (0, HASH_BYTES):
        raise ValueError(f"{len(wire)} bytes are no root of a hash chain; it has {HASH_BYTES}")
    return wire or None


def block_hashes(root: bytes, tokens: Sequence[int], block_size: int, previous: bytes | None = None) -> list[bytes]:
    """Hashes of the full blocks of `tokens`; a partial last block has none.

    `previous` is the hash of the block before tokens[0], to extend a chain.
    """
    return list(iter_block_hashes(root, tokens, block_size, previous))


def iter_block_hashes(
    root: bytes, tokens: Sequence[int], block_size: int, previous: bytes | None = None
) -> Iterator[bytes]:
    data = _token_bytes(tokens)
    stride = 4 * block_size
    parent = previous or bytes(HASH_BYTES)
    for start in range(0, len(data) - stride + 1, stride):
        parent = blake2b(parent + data[start : start + stride], digest_size=HASH_BYTES, key=root).digest()
        yield parent


def encoder_hashes(root: bytes, num_blocks: int) -> list[bytes]:
    """Names of the blocks of an encoder's output, the partial last one included: every block depends on the whole
    input, which the root covers."""
    person = b"sluice.encoder"
    return [
        blake2b(i.to_bytes(8, "little"), digest_size=HASH_BYTES, key=root, person=person).digest()
        for i in range(num_blocks)
    ]


def split(packed: bytes) -> list[bytes]:
    """The hashes of a wire field that holds them one after the other."""
    if len(packed) % HASH_BYTES:
        raise ValueError(f"{len(packed)} bytes are no whole number of {HASH_BYTES}-byte hashes")
    return [packed[i : i + HASH_BYTES] for i in range(0, len(packed), HASH_BYTES)]


def _token_bytes(tokens: Sequence[int]) -> bytes:
    packed = array("I", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()
