"""What must hold of every answer, whatever was asked; and of a 200, whatever was sampled."""

from __future__ import annotations

import base64
import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deploy.tokenizer import Tokenizer
from tests.fuzz.bodies import Json, is_number

ERROR_TYPES = {
    400: "invalid_request_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable",
    504: "timeout",
}
_SPELLED_BYTES = re.compile(r"\\x([0-9a-f]{2})")
_LEAST_LOGPROB = -9999.0


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]  # names in small letters
    content: bytes


@dataclass
class Said:
    """One choice, whole or put together from the events of a stream."""

    text: str = ""
    token_ids: list[int] | None = None
    finish: str | None = None
    logprobs: Json | None = None
    prompt_logprobs: list[Json | None] | None = None


@dataclass
class Whole:
    choices: dict[int, Said] = field(default_factory=dict)
    usage: Json | None = None


def check_error(answer: Answer, *, may_time_out: bool = False) -> None:
    """A refusal that its client can read and act on."""
    allowed = ERROR_TYPES.keys() - {503, 504} | ({504} if may_time_out else set())
    assert answer.status in allowed, f"status {answer.status}: {answer.content[:300]!r}"
    assert answer.headers["content-type"] == "application/json", answer.headers
    assert answer.headers["x-request-id"], answer.headers
    tree = json.loads(answer.content)
    assert set(tree) == {"error"} and set(tree["error"]) == {"message", "type", "param", "code"}, tree
    error = tree["error"]
    assert error["type"] == ERROR_TYPES[answer.status] and len(error["message"]) > 8, error
    assert len(answer.content) < 20_000, "a refusal quotes no document"
    assert error["param"] is None or isinstance(error["param"], str), error
    error["message"].encode()  # no halves of surrogate pairs


@dataclass(frozen=True)
class Oracle:
    """Knows the model."""

    tokenizer: Tokenizer
    vocab_size: int
    max_model_len: int
    eos_token_id: int
    hidden_size: int

    def check(self, path: str, body: Json, answer: Answer) -> Whole | None:
        """Of a 200. None where nothing was generated."""
        assert answer.headers["x-request-id"]
        if path in ("/v1/completions", "/v1/chat/completions"):
            whole = whole_of(answer, stream=body.get("stream") is True)
            (self._completion if path == "/v1/completions" else self._chat)(body, whole)
            return whole
        assert answer.headers["content-type"] == "application/json"
        tree = json.loads(answer.content)
        if path == "/v1/embeddings":
            self._embedding(body, tree)
        elif path == "/tokenize":
            assert tree["count"] == len(tree["tokens"]) and tree["max_model_len"] == self.max_model_len
            if body.get("add_special_tokens") is False and isinstance(body.get("prompt"), str):
                assert self._decode(tree["tokens"], skip=False) == body["prompt"]
        elif path == "/detokenize":
            assert tree == {"prompt": self._decode(body["tokens"], skip=False)}
        return None

    # ------------------------------------------------------------ generation

    def _completion(self, body: Json, whole: Whole) -> None:
        prompts = _each(body["prompt"])
        n, samples = body.get("n") or 1, body.get("best_of") or body.get("n") or 1
        assert sorted(whole.choices) == list(range(len(prompts) * n))
        for index, said in whole.choices.items():
            prompt = prompts[index // n]
            echoed = ""
            if body.get("echo"):
                echoed = prompt if isinstance(prompt, str) else self._decode(prompt)
                assert said.text.startswith(echoed), (said.text, echoed)
            self._said(body, said, said.text[len(echoed) :], body.get("max_tokens", 16))
            if body.get("logprobs") is not None:
                assert said.logprobs is not None
                self._table(body, prompt, len(echoed), said)
        self._usage(body, whole, [prompt for prompt in prompts if not isinstance(prompt, str)], samples == n)

    def _chat(self, body: Json, whole: Whole) -> None:
        assert sorted(whole.choices) == list(range(body.get("n") or 1))
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        for said in whole.choices.values():
            self._said(body, said, said.text, limit)
            if body.get("logprobs"):
                assert said.logprobs is not None
                self._content(body, said)
        self._usage(body, whole, [], True)

    def _said(self, body: Json, said: Said, text: str, max_tokens: int | None) -> None:
        _check_prompt_logprobs(body, said.prompt_logprobs)
        if said.token_ids is None:
            assert not body.get("return_token_ids")
            return
        ids = said.token_ids
        if max_tokens is None:
            max_tokens = self.max_model_len
        ends = set(body.get("stop_token_ids") or [])
        if not body.get("ignore_eos"):
            ends.add(self.eos_token_id)
        min_tokens = body.get("min_tokens") or 0
        assert len(ids) <= max_tokens and all(0 <= token < self.vocab_size for token in ids)
        assert all(token not in ends for token in ids[:-1]), (ids, ends)
        ended = bool(ids) and ids[-1] in ends
        whole = self._decode(ids[:-1] if ended else ids)
        stops = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop") or []
        if said.finish == "length":
            assert len(ids) == max_tokens or max_tokens == self.max_model_len, (ids, max_tokens)
            assert text == whole, (text, whole)
        else:
            assert said.finish == "stop" and len(ids) >= min_tokens, said
            if ended:
                assert text == whole or any(whole.startswith(text + stop) for stop in stops), (text, whole)
            else:
                shown = body.get("include_stop_str_in_output") is True
                found = [
                    stop
                    for stop in stops
                    if (text.endswith(stop) and whole.startswith(text) if shown else whole.startswith(text + stop))
                ]
                assert found, f"{said.finish} of {text!r} where the tokens say {whole!r}, stops {stops!r}"
                assert not all(stop in self._decode(ids[:-1]) for stop in found) or min_tokens, (
                    "an earlier token completed it"
                )
        if not min_tokens and not body.get("include_stop_str_in_output"):
            assert all(stop not in text for stop in stops), (text, stops)
        for word in body.get("bad_words") or []:
            if isinstance(word, list):
                assert all(ids[at : at + len(word)] != word for at in range(len(ids))), (word, ids)

    def _usage(self, body: Json, whole: Whole, id_prompts: list[list[int]], exact: bool) -> None:
        usage = whole.usage
        if usage is None:
            assert body.get("stream")
            return
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert 0 <= usage["prompt_tokens_details"]["cached_tokens"] <= usage["prompt_tokens"]
        if id_prompts:
            assert usage["prompt_tokens"] == sum(map(len, id_prompts))
        told = [said.token_ids for said in whole.choices.values()]
        if all(ids is not None for ids in told):
            num_tokens = sum(len(ids or []) for ids in told)
            assert usage["completion_tokens"] == num_tokens if exact else usage["completion_tokens"] >= num_tokens, (
                usage
            )

    # ------------------------------------------------------------ logprobs

    def _table(self, body: Json, prompt: str | list[int], num_echoed: int, said: Said) -> None:
        table = said.logprobs
        assert table is not None
        sizes = {len(table[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
        assert len(sizes) == 1
        (size,) = sizes
        if said.token_ids is None:
            return
        num_tokens = len(said.token_ids)
        first = size - num_tokens
        if body.get("echo"):
            assert first > 0 if isinstance(prompt, str) else first == len(prompt)
            assert table["token_logprobs"][0] is None and table["top_logprobs"][0] is None
        else:
            assert first == 0, (size, num_tokens)
        offsets = table["text_offset"]
        assert offsets == sorted(offsets) and (not offsets or offsets[0] >= 0), offsets
        if num_tokens and not body.get("stop"):
            assert num_echoed <= offsets[first] and offsets[-1] <= len(said.text), (offsets, said.text)
        start = 1 if body.get("echo") else 0
        for logprob, top in zip(table["token_logprobs"][start:], table["top_logprobs"][start:], strict=True):
            _check_logprob(logprob)
            assert 1 <= len(top) <= body["logprobs"] + 1 and logprob in top.values(), (logprob, top)
        for token, spelled in zip(said.token_ids, table["tokens"][first:], strict=True):
            assert _bytes_of(spelled) == self.tokenizer.texts.bytes_of(token), (token, spelled)

    def _content(self, body: Json, said: Said) -> None:
        assert said.logprobs is not None
        content = said.logprobs["content"]
        spelled = [bytes(told["bytes"]) for told in content]
        if said.token_ids is not None:
            assert spelled == [self.tokenizer.texts.bytes_of(token) for token in said.token_ids]
        for told in content:
            _check_logprob(told["logprob"])
            top = [each["logprob"] for each in told["top_logprobs"]]
            assert len(top) == (body.get("top_logprobs") or 0) and top == sorted(top, reverse=True)

    # ------------------------------------------------------------ the rest

    def _embedding(self, body: Json, tree: Json) -> None:
        inputs = _each(body["input"])
        assert [each["index"] for each in tree["data"]] == list(range(len(inputs)))
        assert tree["usage"]["prompt_tokens"] == tree["usage"]["total_tokens"] >= len(inputs)
        for each in tree["data"]:
            vector = each["embedding"]
            if body.get("encoding_format") == "base64":
                vector = struct.unpack(f"<{self.hidden_size}f", base64.b64decode(vector))
            assert len(vector) == self.hidden_size
            assert abs(sum(value * value for value in vector) - 1) < 1e-4

    def _decode(self, ids: Sequence[int], *, skip: bool = True) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=skip)


def _check_prompt_logprobs(body: Json, told: list[Json | None] | None) -> None:
    """Of a choice that is whole."""
    wanted = body.get("prompt_logprobs")
    assert (told is None) == (wanted is None)
    if told is not None:
        first, *others = told
        assert first is None and all(len(each["top_logprobs"]) == wanted for each in others if each is not None)


def whole_of(answer: Answer, *, stream: bool) -> Whole:
    if not stream:
        assert answer.headers["content-type"] == "application/json"
        tree = json.loads(answer.content)
        whole = Whole(usage=tree["usage"])
        for choice in tree["choices"]:
            text = choice["text"] if "text" in choice else choice["message"]["content"]
            whole.choices[choice["index"]] = Said(
                text,
                choice.get("token_ids"),
                choice["finish_reason"],
                choice["logprobs"],
                choice.get("prompt_logprobs"),
            )
        return whole
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix(b"data: ") for line in answer.content.split(b"\n\n")]
    assert events[-2:] == [b"[DONE]", b""], events[-2:]
    whole = Whole()
    for event in events[:-2]:
        tree = json.loads(event)
        assert "error" not in tree, tree
        whole.usage = tree.get("usage") or whole.usage
        for choice in tree["choices"]:
            _add(whole.choices.setdefault(choice["index"], Said()), choice)
    return whole


def _add(said: Said, choice: Json) -> None:
    assert said.finish is None, "a choice goes on after its end"
    said.text += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
    if "token_ids" in choice:
        said.token_ids = (said.token_ids or []) + choice["token_ids"]
    said.prompt_logprobs = said.prompt_logprobs or choice.get("prompt_logprobs")
    said.finish = choice["finish_reason"]
    if choice["logprobs"] is not None:
        told = said.logprobs or {}
        said.logprobs = {
            name: value if value is None else told.get(name, []) + value for name, value in choice["logprobs"].items()
        }


def _each(given: Any) -> list[Any]:
    """Prompts one by one."""
    return [given] if isinstance(given, str) or isinstance(given[0], int) else given


def _check_logprob(logprob: object) -> None:
    assert is_number(logprob) and _LEAST_LOGPROB <= logprob <= 1e-5, logprob  # type: ignore[operator]
    assert math.isfinite(logprob)  # type: ignore[arg-type]


def _bytes_of(spelled: str) -> bytes:
    if spelled.startswith("bytes:\\x"):
        return bytes(int(each, 16) for each in _SPELLED_BYTES.findall(spelled))
    return spelled.encode()
