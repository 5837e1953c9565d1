"""Lines of a file as requests, and what is wrong with them."""

from __future__ import annotations

import pytest

from cluster.errors import InvalidRequest
from deploy.batch import Line
from deploy.batch import read as read_line
from deploy.openai_requests import ChatRequest, CompletionRequest

SEED = 2**64 - 1


def read(text: str, model: str) -> Line:
    return read_line(text.encode(), model, SEED)


def test_a_line_of_token_ids_is_a_completion_with_its_route() -> None:
    line = '{"prompt_token_ids": [1, 2], "max_tokens": 3, "min_tokens": 2, "temperature": 0, "ignore_eos": true}'
    request = read(line, "m")
    assert isinstance(request, CompletionRequest)
    assert (request.seed, request.n) == (SEED, 1)
    assert (request.model, request.prompt, request.max_tokens, request.min_tokens) == ("m", [1, 2], 3, 2)
    assert request.ignore_eos and request.temperature == 0 and request.return_route and not request.stream


def test_text_and_messages_too() -> None:
    text = read('{"prompt": "hello", "seed": 3}', "m")
    assert isinstance(text, CompletionRequest) and text.prompt == "hello" and text.seed == 3
    assert isinstance(again := read('{"prompt": "a", "seed": null}', "m"), CompletionRequest) and again.seed == SEED
    chat = read('{"messages": [{"role": "user", "content": "hello"}]}', "m")
    assert isinstance(chat, ChatRequest) and chat.messages[0].content == "hello"


@pytest.mark.parametrize(
    ("line", "message", "param"),
    [
        ("{", "the line is no JSON: .*; write one JSON object per line", None),
        ("[1, 2]", "the line holds list; write one JSON object per line", None),
        ("", "the line is blank; write one JSON object per line", None),
        (" \r", "the line is blank; write one JSON object per line", None),
        pytest.param("[" * 100_000, "the line is nested too deeply", None, id="deep"),
        ('{"prompt": "\\ud83d"}', "the line has half a surrogate pair", None),
        ('{"prompt": "a", "temperature": NaN}', "temperature: .*; got NaN", "temperature"),
        ('{"prompt": "a", "temperature": 1e999}', "temperature: .*; got Infinity", "temperature"),
        ("{}", "the line has no prompt; give one of prompt_token_ids, prompt, messages", "prompt_token_ids"),
        ('{"prompt": "a", "messages": []}', "the line has prompt and messages; give one of", "prompt"),
        ('{"prompt_token_ids": []}', "prompt_token_ids: give a list of token ids", "prompt_token_ids"),
        ('{"prompt_token_ids": [true]}', "prompt_token_ids: give a list of token ids", "prompt_token_ids"),
        ('{"prompt_token_ids": [-1]}', "prompt_token_ids: give a list of token ids", "prompt_token_ids"),
        ('{"prompt_token_ids": "5"}', "prompt_token_ids: give a list of token ids", "prompt_token_ids"),
        ('{"prompt_token_ids": [1], "max_tokns": 3}', "max_tokns; remove it", "max_tokns"),
        ('{"prompt_token_ids": [1], "max_tokens": -1}', "max_tokens: .*; got -1", "max_tokens"),
        ('{"prompt_token_ids": [1], "stream": true}', "stream has no meaning in a file; remove it", "stream"),
    ],
)
def test_what_is_wrong_with_a_line(line: str, message: str, param: str | None) -> None:
    error = read(line, "m")
    assert isinstance(error, InvalidRequest)
    assert error.param == param
    with pytest.raises(InvalidRequest, match=message):
        raise error


def test_bytes_that_are_no_text() -> None:
    error = read_line(b'{"prompt": "\xff"}', "m", SEED)
    assert isinstance(error, InvalidRequest) and "no UTF-8: invalid start byte at byte 12" in str(error)
    whole = read('{"prompt": "\\ud83e\\udd8a"}', "m")  # both halves
    assert isinstance(whole, CompletionRequest) and whole.prompt == "🦊"
