"""The HTTP API over scripted workers: what these were told, and answers that end as a real worker's never do on demand.

What a real worker can be asked for is asked at the public port, in the folder beside this file.
"""

from __future__ import annotations

import httpx
import openai
import pytest

from cluster.protos import worker_pb2 as pb
from cluster.request import SamplingParams
from deploy.tokenizer import Tokenizer
from tests.support.api import PROMPT, FrontDoor, complete, error, events, front_door, post, text_of
from tests.support.routing import eventually
from tests.support.scripted_worker import FOREVER, Die, Fail, Say, ScriptedWorker, Stop, Wait, all_tokens

# ---------------------------------------------------------------- answers


def test_a_chat_in_one_piece(door: FrontDoor, worker: ScriptedWorker, tokenizer: Tokenizer) -> None:
    """Without max_tokens it may use all that the context leaves."""
    worker.script = [Say(3), Stop()]
    answer = post(door, "/v1/chat/completions", messages=[{"role": "user", "content": "hi"}]).json()
    assert answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": text_of(worker, tokenizer, 3), "refusal": None}
    assert choice["finish_reason"] == "stop" and "token_ids" not in choice
    sent = worker.submits[-1]
    assert sent.sampling.max_tokens == 512 - len(sent.prompt_token_ids)


def test_token_ids_in_and_out(door: FrontDoor, worker: ScriptedWorker) -> None:
    worker.text = None
    worker.script = [Say(3), Say(5, together=True)]
    whole = complete(door, return_token_ids=True).json()
    assert whole["choices"][0]["token_ids"] == all_tokens(PROMPT, 8)
    worker.script = [Say(3), Say(5, together=True)]
    streamed = events(complete(door, return_token_ids=True, stream=True))
    ids = [token for chunk in streamed for choice in chunk["choices"] for token in choice["token_ids"]]
    assert ids == all_tokens(PROMPT, 8)
    assert "".join(c["choices"][0]["text"] for c in streamed) == whole["choices"][0]["text"]
    assert {chunk["object"] for chunk in streamed} == {"text_completion"}
    assert all("usage" not in chunk for chunk in streamed)


def test_what_is_asked_for_reaches_the_worker(door: FrontDoor, worker: ScriptedWorker, tokenizer: Tokenizer) -> None:
    options = {"temperature": 0.5, "top_p": 0.75, "top_k": 7, "seed": -1, "min_tokens": 2, "stop_token_ids": [3]}
    options |= {"presence_penalty": -2, "frequency_penalty": 1.5, "repetition_penalty": 1.25, "min_p": 0.25}
    options |= {"logit_bias": {"399": -100, "7": 2.5}, "bad_words": ["fox", [9, 8]]}
    assert complete(door, **options, ignore_eos=True, priority=-4, timeout_s=5).status_code == 200
    sent = worker.submits[-1]
    words = [tuple(tokenizer.backend.encode(word).ids) for word in ("fox", " fox")]
    assert SamplingParams.of(sent.sampling) == SamplingParams(
        max_tokens=8,
        min_tokens=2,
        temperature=0.5,
        top_p=0.75,
        top_k=7,
        min_p=0.25,
        seed=2**64 - 1,
        stop_token_ids=(3,),
        ignore_eos=True,
        presence_penalty=-2,
        frequency_penalty=1.5,
        repetition_penalty=1.25,
        logit_bias=((7, 2.5), (399, -100)),
        bad_words=(*words, (9, 8)),
    )
    assert sent.priority == -4 and 0 < sent.deadline_ms <= 5000
    complete(door)
    complete(door)
    first, second = (submit.sampling.seed for submit in worker.submits[-2:])
    assert first != second  # drawn


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_cut_text_tokens_and_usage(
    door: FrontDoor, worker: ScriptedWorker, tokenizer: Tokenizer, stream: bool
) -> None:
    """`never stop` spans tokens; what comes after it is neither shown nor counted, and the worker is told."""
    worker.script = [Say(30), Wait()]
    body = {"max_tokens": 200, "stop": ["nowhere", "never stop"], "return_token_ids": True, "stream": stream}
    if stream:
        *chunks, last = events(complete(door, **body, stream_options={"include_usage": True}))
        choices = [chunk["choices"][0] for chunk in chunks]
        usage = last["usage"]
    else:
        answer = complete(door, **body).json()
        choices, usage = answer["choices"], answer["usage"]
    assert "".join(choice["text"] for choice in choices) == "the quick 🦊 jumps; "
    assert choices[-1]["finish_reason"] == "stop"
    ids = [token for choice in choices for token in choice["token_ids"]]
    whole = tokenizer.backend.decode(ids)
    assert whole.startswith("the quick 🦊 jumps; never stop") and "never stop" not in tokenizer.backend.decode(ids[:-1])
    assert usage["completion_tokens"] == len(ids)
    worker.wait(lambda w: len(w.cancels) == 1)


def test_without_a_tokenizer_token_ids_are_enough(worker: ScriptedWorker) -> None:
    worker.text = None
    with front_door(None) as door:
        door.connect(worker)
        choice = complete(door).json()["choices"][0]
        assert choice["token_ids"] == all_tokens(PROMPT, 8) and choice["text"] == ""
        assert "no tokenizer; send token ids" in error(complete(door, prompt="hello"), 400)["message"]
        assert error(complete(door, stop="x"), 400)["param"] == "stop"


def test_a_request_id_is_told_where_no_server_around_it_does(door: FrontDoor) -> None:
    for sent, is_kept in (("abc-1", True), ("no spaces!", False), ("x" * 129, False)):
        (told,) = httpx.get(f"{door.url}/health", headers={"x-request-id": sent}).headers.get_list("x-request-id")
        assert told == sent if is_kept else len(told) == 32


# ---------------------------------------------------------------- streams that end otherwise


def test_a_dead_worker_is_not_noticed_by_the_client(door: FrontDoor, worker: ScriptedWorker) -> None:
    worker.text, worker.script = None, [Say(3), Die()]
    other = ScriptedWorker("decode-1")
    other.load.num_running = 1
    try:
        door.connect(worker, other)
        streamed = events(complete(door, stream=True, return_token_ids=True, return_route=True))
        ids = [token for chunk in streamed for choice in chunk["choices"] for token in choice["token_ids"]]
        assert ids == all_tokens(PROMPT, 8)
        route = streamed[-1]["usage"]["sluice"]
        assert route["attempts"] == 2 and route["decode"]["name"] == "decode-1"
    finally:
        other.stop()


def test_a_failure_after_the_first_token_is_said_in_the_stream(door: FrontDoor, worker: ScriptedWorker) -> None:
    worker.script = [Say(2), Fail(pb.INTERNAL, "a bug")]
    before = door.outcomes("failed")
    *_, last = events(complete(door, stream=True))
    assert "a bug" in last["error"]["message"] and last["error"]["type"] == "server_error"
    assert door.outcomes("failed") == before + 1
    client = openai.OpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.APIError, match="a bug"):
        list(client.completions.create(model="tiny", prompt=PROMPT, stream=True))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("said", [0, 3])
def test_a_client_that_leaves_cancels(door: FrontDoor, worker: ScriptedWorker, stream: bool, said: int) -> None:
    """Before its first token and after it, waiting for a stream or for a whole answer."""
    worker.script = [Say(said), Wait()] if said else [Wait()]
    before = door.outcomes("cancelled")
    body = {"model": "tiny", "prompt": PROMPT, "stream": stream}
    with httpx.Client(timeout=0.3) as client, pytest.raises(httpx.ReadTimeout):
        client.post(f"{door.url}/v1/completions", json=body)
    worker.wait(lambda w: len(w.cancels) == 1)
    door.run(eventually(lambda: door.outcomes("cancelled") == before + 1 and door.router.num_open == 0))


def test_what_clients_see_is_measured(tokenizer: Tokenizer, worker: ScriptedWorker) -> None:
    with front_door(tokenizer) as door:
        door.connect(worker)
        complete(door)
        worker.script = [Say(2), Wait(), FOREVER]
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "stream": True}
        with httpx.stream("POST", f"{door.url}/v1/completions", json=body, timeout=30) as stream:
            lines = stream.iter_lines()
            next(lines)  # the first tokens are out
            worker.go_on()
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        value = door.metrics.value
        assert door.outcomes("ok") == 2 and value("sluice_ingress_open_requests") == 0
        assert value("sluice_ingress_ttft_seconds_count") == value("sluice_ingress_end_to_end_seconds_count") == 2
        assert value("sluice_ingress_prompt_tokens_total") == 6
        generated = value("sluice_ingress_generated_tokens_total")
        assert generated == 16 and 6 <= value("sluice_ingress_inter_token_seconds_count") <= 14
