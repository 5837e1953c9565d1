"""Tokenizers read from a checkpoint's directory."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cluster.errors import CheckpointError, InvalidRequest
from deploy.chat_template import ChatPrompt
from deploy.openai_chat import ChatMessage
from deploy.tokenizer import Tokenizer
from tests.support.tokenizer_files import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    loaded = Tokenizer.load(directory)
    assert loaded is not None
    return loaded


def chat(*messages: tuple[str, str]) -> ChatPrompt:
    ids = {"tool": {"tool_call_id": "call-1"}}
    return ChatPrompt(
        messages=[
            ChatMessage.model_validate({"role": role, "content": content, **ids.get(role, {})})
            for role, content in messages
        ]
    )


def test_text_there_and_back(tokenizer: Tokenizer) -> None:
    text = "the quick brown fox: 東京 🦊\n\ttabs"
    ids = asyncio.run(tokenizer.encode(text))
    assert tokenizer.backend.decode(ids) == text and len(ids) < len(text.encode())


def test_a_chat_becomes_the_templates_text(tokenizer: Tokenizer) -> None:
    ids = asyncio.run(tokenizer.encode_chat(chat(("system", "be brief"), ("user", "hi"))))
    shown = tokenizer.backend.decode(ids, skip_special_tokens=False)
    assert shown == "<|system|>be brief<|end|><|user|>hi<|end|><|assistant|>"
    end = tokenizer.backend.token_to_id("<|end|>")
    assert end is not None and ids.count(end) == 2  # special tokens, not their letters


def test_what_the_template_refuses_is_the_clients_mistake(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="chat template refuses these messages: role tool") as refused:
        asyncio.run(tokenizer.encode_chat(chat(("tool", "42"))))
    assert refused.value.param == "messages"


def test_without_a_template_there_is_no_chat(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template=None)
    loaded = Tokenizer.load(tmp_path)
    assert loaded is not None and not loaded.has_chat_template
    with pytest.raises(InvalidRequest, match="no chat template; use /v1/completions"):
        asyncio.run(loaded.encode_chat(chat(("user", "hi"))))


def test_a_directory_without_tokenizer_files_is_fine(tmp_path: Path) -> None:
    assert Tokenizer.load(tmp_path) is None


def test_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        Tokenizer.load(tmp_path)


def test_many_encodings_at_once_do_not_disturb_each_other(tokenizer: Tokenizer) -> None:
    texts = [f"the fox number {i} " * (i + 1) for i in range(40)]

    async def together() -> list[list[int]]:
        return list(await asyncio.gather(*(tokenizer.encode(text) for text in texts)))

    assert asyncio.run(together()) == [tokenizer.backend.encode(text).ids for text in texts]
