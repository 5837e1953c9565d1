"""Completions of a model with an encoder: what its workers are asked, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.config import SchedulerConfig
from cluster.config_file import parse
from cluster.errors import CheckpointError
from cluster.hashing import chain_root, salt_of
from cluster.protos import worker_pb2 as pb
from deploy.served_model import ServedEncoder, ServedModel
from deploy.tokenizer import Tokenizer
from tests.support.api import FrontDoor, error, front_door, post
from tests.support.checkpoints import checkpoint
from tests.support.encoder_decoders import START
from tests.support.scripted_worker import ScriptedWorker
from tests.support.tokenizer_files import write_tokenizer
from workers.models.loader import load

LANGUAGES = ("en_XX", "de_DE")
TEXT = "the quick brown fox"


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Puts its default language before a text, and the end behind it."""
    directory = tmp_path_factory.mktemp("languages")
    fast = write_tokenizer(directory, chat_template="{{ messages[0].content }}")
    fast.add_special_tokens({"additional_special_tokens": list(LANGUAGES)})
    from tokenizers.processors import TemplateProcessing

    ids = [(token, fast.convert_tokens_to_ids(token)) for token in ("en_XX", "<|end|>")]
    fast.backend_tokenizer.post_processor = TemplateProcessing("en_XX $A <|end|>", special_tokens=ids)
    fast.save_pretrained(str(directory))
    loaded = Tokenizer.load(directory)
    assert loaded is not None
    return loaded


@pytest.fixture(scope="module")
def served(speaker: Tokenizer) -> Iterator[tuple[FrontDoor, ScriptedWorker]]:
    worker = ScriptedWorker("decode-0")
    encoder = ServedEncoder(max_source_tokens=40, decoder_start_token_id=2)
    with front_door(speaker, vocab_size=500, max_model_len=30, encoder=encoder) as door:
        door.connect(worker)
        yield door, worker
    worker.stop()


def language(speaker: Tokenizer, code: str) -> int:
    found = speaker.backend.token_to_id(code)
    assert found is not None
    return found


def ask(served: tuple[FrontDoor, ScriptedWorker], **body: Any) -> pb.Submit:
    door, worker = served
    assert post(door, "/v1/completions", **{"max_tokens": 3, **body}).status_code == 200
    return worker.submits[-1]


def refusal(served: tuple[FrontDoor, ScriptedWorker], status: int = 400, **body: Any) -> str:
    return error(post(served[0], "/v1/completions", **{"max_tokens": 3, **body}), status)["message"]


def test_the_encoder_reads_the_prompt_and_the_decoder_has_its_own(
    served: tuple[FrontDoor, ScriptedWorker], speaker: Tokenizer
) -> None:
    english, german = (language(speaker, code) for code in LANGUAGES)
    plain = speaker.backend.encode(TEXT).ids
    assert plain[0] == english
    submit = ask(served, prompt=TEXT)
    assert (list(submit.encoder_token_ids), list(submit.prompt_token_ids)) == (plain, [2])
    (encode,) = [stage for stage in submit.plan.stages if stage.stage == pb.ENCODE]
    assert encode.worker.name == "decode-0"
    assert submit.chain_root == chain_root(served[1].compatibility_hash, encoder_tokens=plain)
    salted = ask(served, prompt=TEXT, cache_salt="s")
    salt = salt_of("", "s")
    assert salted.chain_root == chain_root(served[1].compatibility_hash, salt=salt, encoder_tokens=plain)

    translated = ask(served, prompt=TEXT, source_language="de_DE", target_language="en_XX", decoder_prompt="jumps")
    assert list(translated.encoder_token_ids) == [german, *plain[1:]]
    jumps = speaker.backend.encode("jumps", add_special_tokens=False).ids
    assert list(translated.prompt_token_ids) == [2, english, *jumps]
    given = ask(served, prompt=[5, 6], decoder_prompt=[7, 8])
    assert (list(given.encoder_token_ids), list(given.prompt_token_ids)) == ([5, 6], [7, 8])
    answer = post(served[0], "/v1/completions", prompt=[5, 6], max_tokens=3, return_route=True).json()
    assert answer["usage"]["prompt_tokens"] == 2 and answer["usage"]["completion_tokens"] == 3


def test_a_model_that_starts_with_a_language(speaker: Tokenizer) -> None:
    english, german = (language(speaker, code) for code in LANGUAGES)
    worker = ScriptedWorker("decode-0")
    encoder = ServedEncoder(max_source_tokens=40, decoder_start_token_id=english)
    with front_door(speaker, vocab_size=500, encoder=encoder) as door:
        door.connect(worker)
        assert list(ask((door, worker), prompt=TEXT, target_language="de_DE").prompt_token_ids) == [german]
        assert list(ask((door, worker), prompt=TEXT).prompt_token_ids) == [english]
    worker.stop()


def test_what_is_refused(served: tuple[FrontDoor, ScriptedWorker], door: FrontDoor) -> None:
    assert "41 tokens are over the 40 that the encoder reads" in refusal(served, 413, prompt=[1] * 41)
    assert "ask for at most 28" in refusal(served, 413, prompt=[1], decoder_prompt=[1, 2], max_tokens=29)
    assert "'fr_XX' is no language of the model; it has de_DE, en_XX" in refusal(
        served, prompt=TEXT, target_language="fr_XX"
    )
    assert "no token for its language" in refusal(served, prompt=[5], source_language="de_DE")
    assert "token ids say it" in refusal(served, prompt=[5], decoder_prompt=[2], target_language="de_DE")
    assert "token id 500 is outside" in refusal(served, prompt=[5], decoder_prompt=[500])
    assert "not empty" in refusal(served, prompt=[5], decoder_prompt=[])
    for name, value in (("echo", True), ("prompt_logprobs", 0)):
        assert f"{name}: the answer does not go on" in refusal(served, prompt=[5], **{name: value})
    chat = post(served[0], "/v1/chat/completions", messages=[{"role": "user", "content": "hi"}])
    assert "reads its prompts with an encoder; use /v1/completions" in error(chat, 400)["message"]
    long = error(post(served[0], "/v1/embeddings", input=[5] * 41), 413)
    assert "input: 41 tokens are over the 40" in long["message"] and long["param"] == "input"
    for name in ("decoder_prompt", "source_language", "target_language"):
        told = error(post(door, "/v1/completions", prompt=[5], **{name: "en_XX"}), 400)
        assert f"{name}: 'tiny' has no encoder" in told["message"] and told["param"] == name


@pytest.mark.parametrize("family", ["t5", "bart", "mbart"])
def test_the_front_door_and_the_workers_read_the_same_of_a_checkpoint(family: str, tmp_path: Path) -> None:
    model = ServedModel.read(parse({"model": {"path": str(checkpoint(family))}}))
    spec = load(checkpoint(family)).model.spec
    assert spec.encoder is not None and model.encoder is not None
    assert model.encoder.decoder_start_token_id == spec.encoder.decoder_start_token_id == START[family]
    limit = SchedulerConfig().max_encoder_tokens
    assert model.encoder.max_source_tokens == min(spec.encoder.max_source_tokens, limit)
    assert model.max_model_len == spec.max_position_embeddings
    (tmp_path / "config.json").write_text('{"is_encoder_decoder": true, "model_type": "t5", "vocab_size": 9}')
    with pytest.raises(CheckpointError, match="decoder_start_token_id = None is no token id"):
        ServedModel.read(parse({"model": {"path": str(tmp_path)}}))
