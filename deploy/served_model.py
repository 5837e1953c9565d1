"""What the front door must know of the model that it serves, read from the checkpoint's config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from cluster.config import SluiceConfig
from cluster.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    name: str
    max_model_len: int  # prompt and output, in tokens
    vocab_size: int
    created: int  # seconds since 1970: when the checkpoint was written
    eos_token_ids: frozenset[int] = frozenset()
    hidden_size: int | None = None  # of an embedding
    fingerprint: str = "fp_none"  # changes with what the checkpoint holds

    @classmethod
    def read(cls, config: SluiceConfig) -> ServedModel:
        """Raises CheckpointError, naming the file and what it lacks."""
        path = Path(config.model.path) / "config.json"
        try:
            tree = _read(path)
            text = tree.get("text_config", tree)
            vocab_size, longest = int(text["vocab_size"]), int(text["max_position_embeddings"])
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}; name the directory of a Hugging Face model") from None
        except KeyError as error:
            raise CheckpointError(f"{path}: {error} is missing; the model cannot be served without it") from None
        except (TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: a value has the wrong type ({error}); save the model again") from None
        defaults = path.with_name("generation_config.json")
        eos = (_read(defaults) if defaults.is_file() else {}).get("eos_token_id", text.get("eos_token_id"))
        return cls(
            name=config.served_name,
            max_model_len=min(longest, config.model.max_model_len or longest),
            vocab_size=vocab_size,
            created=int(path.stat().st_mtime),
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
