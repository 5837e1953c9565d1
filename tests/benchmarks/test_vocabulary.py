from pathlib import Path

import pytest
from tokenizers import Tokenizer

from benchmarks.vocabulary import Vocabulary, write_tokenizer


def test_a_text_has_the_tokens_it_was_made_of(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 512)
    vocabulary = Vocabulary.read(tmp_path)
    token_ids = [*vocabulary.words, *reversed(vocabulary.words)]
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert len(vocabulary.words) > 20 and max(token_ids) < tokenizer.get_vocab_size() == 512
    assert tokenizer.encode(vocabulary.text(token_ids)).ids == token_ids


def test_a_tokenizer_without_words_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 256)
    with pytest.raises(ValueError, match="has 0 words of one token"):
        Vocabulary.read(tmp_path)
