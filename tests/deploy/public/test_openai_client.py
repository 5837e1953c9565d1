"""OpenAI's own client, unchanged, against the public port. What it returns is kept in tests/fixtures."""

from __future__ import annotations

import asyncio

import openai
import pytest
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs

from tests.support.public_door import MODEL, PublicDoor
from tests.support.recordings import assert_as_recorded

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(240)]

EXTRA = {"ignore_eos": True}


def _tokens(logprobs: ChoiceLogprobs | None) -> list[str]:
    return [each.token for each in (logprobs and logprobs.content) or ()]


@pytest.fixture
def client(door: PublicDoor) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=0)


def test_completions(client: openai.OpenAI) -> None:
    whole = client.completions.create(
        model=MODEL, prompt=["def main():", "import os"], max_tokens=6, temperature=0, n=2, logprobs=1, echo=True,
        seed=1, extra_body=EXTRA,
    )  # fmt: skip
    parts = client.completions.create(
        model=MODEL, prompt="def main():", max_tokens=6, temperature=0, n=2, seed=1, stream=True,
        stream_options={"include_usage": True}, extra_body=EXTRA,
    )  # fmt: skip
    events = [part.model_dump() for part in parts]
    texts = ["".join(c["text"] for e in events for c in e["choices"] if c["index"] == index) for index in (0, 1)]
    assert texts == [choice.text.removeprefix("def main():") for choice in whole.choices[:2]]
    assert events[-1]["usage"]["completion_tokens"] == 12 and all(event["usage"] is None for event in events[:-1])
    assert_as_recorded("openai-completions", whole.model_dump())


def test_chat(client: openai.OpenAI) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "ann"},
    ]
    options = {"model": MODEL, "messages": messages, "temperature": 0, "extra_body": EXTRA, "logprobs": True}
    whole = client.chat.completions.create(**options, max_completion_tokens=6, top_logprobs=2)  # type: ignore[call-overload]
    parts = list(client.chat.completions.create(**options, max_tokens=6, stream=True))  # type: ignore[call-overload]
    first, *others = parts
    assert first.choices[0].delta.role == "assistant" and first.choices[0].delta.content == ""
    assert "".join(part.choices[0].delta.content or "" for part in others) == whole.choices[0].message.content
    assert [part.choices[0].finish_reason for part in parts][-1] == "length"
    assert [told for part in others for told in _tokens(part.choices[0].logprobs)] == _tokens(whole.choices[0].logprobs)
    assert_as_recorded("openai-chat", whole.model_dump())


def test_embeddings_models_and_errors(client: openai.OpenAI) -> None:
    """The client asks for base64 unless told otherwise."""
    vectors = client.embeddings.create(model=MODEL, input=["def main():", "import os"])
    floats = client.embeddings.create(model=MODEL, input=["def main():", "import os"], encoding_format="float")
    for one, other in zip(vectors.data, floats.data, strict=True):
        assert len(one.embedding) == 96 and one.embedding == pytest.approx(other.embedding, abs=1e-4)
    assert [model.id for model in client.models.list()] == [MODEL]
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=MODEL, prompt="a", suffix="b")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-4", prompt="a")
    assert refused.value.param == "suffix" and refused.value.code == "unsupported_parameter"
    assert refused.value.request_id and "," not in refused.value.request_id
    assert_as_recorded("openai-errors", refused.value.body)


def test_many_at_once(door: PublicDoor) -> None:
    """The asynchronous client: streams and whole answers side by side say what each says alone."""

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=0) as client:

            async def one(number: int) -> str:
                prompt = f"number {number % 4}"
                options = {"model": MODEL, "prompt": prompt, "max_tokens": 12, "temperature": 0, "extra_body": EXTRA}
                if number < 4:
                    return (await client.completions.create(**options)).choices[0].text  # type: ignore[call-overload]
                stream = await client.completions.create(**options, stream=True)  # type: ignore[call-overload]
                return "".join([chunk.choices[0].text async for chunk in stream])

            return list(await asyncio.gather(*(one(number) for number in range(12))))

    texts = asyncio.run(ask())
    assert texts[:4] == texts[4:8] == texts[8:] and len(set(texts)) == 4
