"""The bytes that each token of a vocabulary stands for, told one by one: for logprobs, where text has no context.

A character may take several tokens, so a token is bytes first, and text only where these are UTF-8.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Final

import tokenizers

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORD_START: Final = "\u2581"  # what SentencePiece writes for a space


class TokenTexts:
    """Of one tokenizer. Ids past its vocabulary (rows that only pad a model's) stand for no bytes."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        written = "null" if backend.decoder is None else backend.decoder.__getstate__().decode()
        kinds = set(_decoder_kinds(json.loads(written)))
        self._is_byte_level = "ByteLevel" in kinds
        self._has_byte_tokens = "ByteFallback" in kinds
        self._marks_words = "Metaspace" in kinds or _WORD_START in written or json.dumps(_WORD_START)[1:-1] in written
        self._added = {each: token.content.encode() for each, token in backend.get_added_tokens_decoder().items()}

    def bytes_of(self, token_id: int) -> bytes:
        added = self._added.get(token_id)
        if added is not None:
            return added
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            return b"".join(_BYTES.get(char, char.encode()) for char in token)
        found = _BYTE_TOKEN.fullmatch(token) if self._has_byte_tokens else None
        if found is not None:
            return bytes.fromhex(found[1])
        if self._marks_words:
            return token.replace(_WORD_START, " ").encode()
        return self._backend.decode([token_id], skip_special_tokens=False).encode()

    def text_of(self, token_id: int) -> str:
        r"""Where the bytes are no UTF-8 they are spelled out, as OpenAI does: `bytes:\xf0\x9f`."""
        data = self.bytes_of(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _decoder_kinds(decoder: Mapping[str, object] | None) -> Iterator[str]:
    if decoder is None:
        return
    yield str(decoder["type"])
    parts = decoder.get("decoders", ())
    assert isinstance(parts, list | tuple)
    for part in parts:
        yield from _decoder_kinds(part)


def _byte_level_alphabet() -> dict[str, bytes]:
    """Byte-level BPE shows each byte as one character: printable Latin-1 as itself, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    shown = {chr(byte): bytes([byte]) for byte in printable}
    return shown | {chr(0x100 + rank): bytes([byte]) for rank, byte in enumerate(others)}


_BYTES: Final = _byte_level_alphabet()
