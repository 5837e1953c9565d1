"""What the words say about an encoder's input, for the engine."""

from __future__ import annotations

from collections.abc import Iterable

from cluster import hashing
from workers.engine.sequence import NOTHING_FORCED, EncoderInput, ForcedTokens
from workers.models.model import EncoderSpec


def encoder_input(token_ids: Iterable[int], chain_root: bytes | None, compatibility_hash: bytes) -> EncoderInput | None:
    """None: there is none. A root that is given covers the input and whatever else tells its output from others'."""
    tokens = tuple(token_ids)
    if not tokens:
        return None
    return EncoderInput(tokens, chain_root or hashing.chain_root(compatibility_hash, encoder_tokens=tokens))


def forced_tokens(spec: EncoderSpec | None) -> ForcedTokens:
    return NOTHING_FORCED if spec is None else ForcedTokens(spec.forced_bos_token_id, spec.forced_eos_token_id)
