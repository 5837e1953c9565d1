"""Text of a known number of tokens: words of a tokenizer that are one token each."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

_CORPUS_BYTES = 600_000
_SPACE = "Ġ"  # how byte-level tokenizers write it


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Any text made of `words`, by `text`, has one token for each."""

    words: dict[int, str]  # by token id, each with its space in front

    @classmethod
    def read(cls, directory: Path) -> Vocabulary:
        """From tokenizer.json of a byte-level tokenizer. Raises ValueError when it has no such words."""
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        named = {
            token_id: " " + token[1:]
            for token, token_id in tokenizer.get_vocab().items()
            if token.startswith(_SPACE) and token[1:].isascii() and token[1:].isalpha()
        }
        words = {i: word for i, word in sorted(named.items()) if tokenizer.encode(word).ids == [i]}
        if len(words) < 2:
            raise ValueError(f"{directory}/tokenizer.json has {len(words)} words of one token; use one with more")
        return cls(words)

    def text(self, token_ids: Sequence[int]) -> str:
        return "".join(self.words[token_id] for token_id in token_ids)


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """A byte-level BPE tokenizer in Hugging Face format, learned from the sources of Python's library: seconds."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def _corpus() -> Iterator[str]:
    num_bytes = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if num_bytes >= _CORPUS_BYTES:
            return
        text = path.read_text("utf-8", "replace")
        num_bytes += len(text)
        yield text
