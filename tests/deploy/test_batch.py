"""Lines of a file as requests, and what is wrong with them."""

from __future__ import annotations

import json

import pytest

from cluster.errors import InvalidRequest
from deploy.batch import needs_tokenizer, read
from deploy.openai_schema import ChatRequest, CompletionRequest


def test_a_line_of_token_ids_is_a_completion_with_its_route() -> None:
    line = '{"prompt_token_ids": [1, 2], "max_tokens": 3, "min_tokens": 2, "temperature": 0, "ignore_eos": true}'
    request = read(line, "m")
    assert isinstance(request, CompletionRequest)
    assert (request.model, request.prompt, request.max_tokens, request.min_tokens) == ("m", [1, 2], 3, 2)
    assert request.ignore_eos and request.temperature == 0 and request.return_route and not request.stream


def test_text_and_messages_too() -> None:
    text = read('{"prompt": "hello", "seed": 3}', "m")
    assert isinstance(text, CompletionRequest) and text.prompt == "hello" and text.seed == 3
    chat = read('{"messages": [{"role": "user", "content": "hello"}]}', "m")
    assert isinstance(chat, ChatRequest) and chat.messages[0].content == "hello"


@pytest.mark.parametrize(
    ("line", "message", "param"),
    [
        ("{", "the line is no JSON: .*; write one JSON object per line", None),
        ("[1, 2]", "the line holds list; write one JSON object per line", None),
        ("{}", "the line has no prompt; give one of prompt_token_ids, prompt, messages", "prompt_token_ids"),
        ('{"prompt": "a", "messages": []}', "the line has prompt and messages; give one of", "prompt"),
        ('{"prompt_token_ids": []}', "prompt_token_ids: give a list of token ids", "prompt_token_ids"),
        ('{"prompt_token_ids": [true]}', "prompt_token_ids: give a list of token ids", "prompt_token_ids"),
        ('{"prompt_token_ids": [-1]}', "prompt_token_ids: give a list of token ids", "prompt_token_ids"),
        ('{"prompt_token_ids": "5"}', "prompt_token_ids: give a list of token ids", "prompt_token_ids"),
        ('{"prompt_token_ids": [1], "max_tokns": 3}', "max_tokns; remove it", "max_tokns"),
        ('{"prompt_token_ids": [1], "max_tokens": 0}', "max_tokens: .*; got 0", "max_tokens"),
        ('{"prompt_token_ids": [1], "stream": true}', "stream has no meaning in a file; remove it", "stream"),
    ],
)
def test_what_is_wrong_with_a_line(line: str, message: str, param: str | None) -> None:
    error = read(line, "m")
    assert isinstance(error, InvalidRequest)
    assert error.param == param
    with pytest.raises(InvalidRequest, match=message):
        raise error


def test_a_tokenizer_is_wanted_only_where_text_is_spoken_of() -> None:
    ids = json.dumps({"prompt_token_ids": [1], "stop_token_ids": [2]})
    assert not needs_tokenizer([ids, "{"])
    for spoken in ('{"prompt": "a"}', '{"messages": []}', '{"prompt_token_ids": [1], "stop": "."}'):
        assert needs_tokenizer([ids, spoken])
