"""What the front door must know of the model that it serves, read from the checkpoint's config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

from cluster.config import SluiceConfig
from cluster.errors import CheckpointError, RequestTooLong

# Of a model whose positions have no end: what its workers take (workers/models/t5.py).
_MAX_RELATIVE_POSITIONS: Final = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedEncoder:
    """Of a model whose decoder reads what an encoder made of the prompt."""

    max_source_tokens: int
    decoder_start_token_id: int

    def check(self, num_tokens: int, param: str = "prompt") -> None:
        """Raises RequestTooLong."""
        if num_tokens > self.max_source_tokens:
            limit = f"{self.max_source_tokens} that the encoder reads"
            raise RequestTooLong(f"{param}: {num_tokens} tokens are over the {limit}; shorten it", param)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    name: str
    max_model_len: int  # prompt and output, in tokens
    vocab_size: int
    created: int  # seconds since 1970: when the checkpoint was written
    eos_token_ids: frozenset[int] = frozenset()
    hidden_size: int | None = None  # of an embedding
    encoder: ServedEncoder | None = None  # None: a decoder alone
    fingerprint: str = "fp_none"  # changes with what the checkpoint holds

    @classmethod
    def read(cls, config: SluiceConfig) -> ServedModel:
        """Raises CheckpointError, naming the file and what it lacks."""
        path = Path(config.model.path) / "config.json"
        try:
            tree = _read(path)
            text = tree.get("text_config", tree)
            has_encoder = text.get("is_encoder_decoder") is True
            if has_encoder and text.get("model_type") == "t5":
                text = {**text, "max_position_embeddings": _MAX_RELATIVE_POSITIONS}
            vocab_size, longest = int(text["vocab_size"]), int(text["max_position_embeddings"])
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}; name the directory of a Hugging Face model") from None
        except KeyError as error:
            raise CheckpointError(f"{path}: {error} is missing; the model cannot be served without it") from None
        except (TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: a value has the wrong type ({error}); save the model again") from None
        defaults = path.with_name("generation_config.json")
        generation = _read(defaults) if defaults.is_file() else {}
        eos = generation.get("eos_token_id", text.get("eos_token_id"))
        encoder = None
        if has_encoder:
            start = generation.get("decoder_start_token_id", text.get("decoder_start_token_id"))
            if not isinstance(start, int):
                raise CheckpointError(f"{path}: decoder_start_token_id = {start!r} is no token id; a decoder begins so")
            read_at_once = min(longest, config.scheduler.max_encoder_tokens)
            encoder = ServedEncoder(max_source_tokens=read_at_once, decoder_start_token_id=start)
        return cls(
            name=config.served_name,
            max_model_len=min(longest, config.model.max_model_len or longest),
            vocab_size=vocab_size,
            created=int(path.stat().st_mtime),
            encoder=encoder,
            hidden_size=text.get("hidden_size", text.get("d_model")),
            fingerprint=_fingerprint(path.parent),
            eos_token_ids=frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos]),
        )


def _fingerprint(directory: Path) -> str:
    """Of the settings' bytes, and of the names and sizes of the weights, which are too many to read."""
    digest = blake2b(digest_size=5)
    for file in sorted(directory.glob("*.json")):
        digest.update(file.name.encode() + file.read_bytes())
    for file in sorted(directory.glob("*.safetensors")):
        digest.update(f"{file.name}:{file.stat().st_size}".encode())
    return f"fp_{digest.hexdigest()}"


def _read(path: Path) -> Mapping[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: no JSON ({error}); save the model again") from None
