"""What a client may see of an encoder: asked for apart, as much as an answer may hold. See tests/integration, too."""

from __future__ import annotations

import json

import pytest

from cluster.config import LimitsConfig
from cluster.errors import InvalidRequest
from deploy.encoder_output import check_size
from deploy.generation import Prompt
from deploy.served_model import ServedEncoder, ServedModel
from tests.support.api import FrontDoor, error, post

MODEL = ServedModel(
    name="tiny",
    max_model_len=100,
    vocab_size=400,
    created=1,
    hidden_size=64,
    encoder=ServedEncoder(max_source_tokens=100, decoder_start_token_id=0),
)


def test_an_answer_holds_as_much_as_the_limit_says() -> None:
    prompts = [Prompt(text="", token_ids=(5,) * length, decoder_token_ids=(0,)) for length in (10, 20)]
    check_size(prompts, MODEL, LimitsConfig(max_encoder_output_bytes=30 * 64 * 4))
    with pytest.raises(InvalidRequest) as caught:
        check_size(prompts, MODEL, LimitsConfig(max_encoder_output_bytes=30 * 64 * 4 - 1))
    told = "30 tokens of 64 numbers are 7680 bytes, over the limit of 7679; send less at once"
    assert str(caught.value) == f"return_encoder_output: {told}" and caught.value.param == "return_encoder_output"


def test_who_has_no_encoder_shows_none(door: FrontDoor) -> None:
    told = error(post(door, "/v1/completions", prompt=[5], return_encoder_output=True), 400)
    assert "return_encoder_output: 'tiny' has no encoder" in told["message"]
    assert told["param"] == "return_encoder_output"
    streamed = error(post(door, "/v1/completions", prompt=[5], return_encoder_output=True, stream=True), 400)
    assert "it comes with a whole answer only; remove it or stream" in streamed["message"]
    assert post(door, "/v1/completions", prompt=[5], max_tokens=2, return_encoder_output=False).status_code == 200
    answer = post(door, "/v1/completions", prompt=[5], max_tokens=2)
    assert "encoder_outputs" not in json.loads(answer.text)
