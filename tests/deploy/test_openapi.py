"""The API's fields, frozen: a client relies on every one. Extend the lists on purpose."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from deploy.openai_api import create_app
from tests.support.api import FrontDoor

PATHS = """
/detokenize /health /metrics /ready /tokenize /v1/chat/completions /v1/completions /v1/embeddings /v1/models
/v1/models/{name} /v1/requests/{answer_id}/route
"""

FIELDS = {
    "AssistantMessage": "content refusal role tool_calls",
    "CalledFunction": "arguments name",
    "CalledTool": "function id type",
    "ChatAnswer": "choices created id model object service_tier system_fingerprint usage",
    "ChatChoice": "finish_reason index logprobs message prompt_logprobs token_ids",
    "ChatLogprobs": "content refusal",
    "ChatMessage": "audio content function_call name refusal role tool_call_id tool_calls",
    "ChatRequest": """
        add_generation_prompt audio bad_words cache_salt chat_template_kwargs continue_final_message frequency_penalty
        function_call functions ignore_eos include_stop_str_in_output logit_bias logprobs max_completion_tokens
        max_tokens messages metadata min_p min_tokens modalities model n parallel_tool_calls prediction
        presence_penalty priority prompt_cache_key prompt_cache_retention prompt_logprobs reasoning_effort
        repetition_penalty response_format return_route return_token_ids safety_identifier seed service_tier stop
        stop_token_ids store stream stream_options temperature timeout_s tool_choice tools top_k top_logprobs top_p
        user verbosity web_search_options
    """,
    "CompletionAnswer": "choices created encoder_outputs id model object system_fingerprint usage",
    "CompletionChoice": "finish_reason index logprobs prompt_logprobs score text token_ids",
    "CompletionLogprobs": "text_offset token_logprobs tokens top_logprobs",
    "CompletionRequest": """
        add_special_tokens bad_words best_of cache_salt decoder_prompt early_stopping echo frequency_penalty ignore_eos
        include_stop_str_in_output length_penalty logit_bias logprobs max_tokens min_p min_tokens model n
        no_repeat_ngram_size num_beams num_return_sequences presence_penalty priority
        prompt prompt_logprobs repetition_penalty return_encoder_output return_route return_token_ids seed
        source_language stop stop_token_ids stream stream_options suffix target_language temperature timeout_s top_k
        top_p user
    """,
    "DetokenizeRequest": "model tokens",
    "Embedding": "embedding index object",
    "EmbeddingAnswer": "data model object usage",
    "EmbeddingRequest": """
        add_special_tokens cache_salt dimensions encoding_format input model pooling priority timeout_s user
    """,
    "EmbeddingUsage": "prompt_tokens total_tokens",
    "EncoderOutput": "data dtype index shape",
    "ErrorBody": "error",
    "ErrorDetail": "code message param type",
    "FormatSchema": "description name schema strict",
    "Function": "description name parameters strict",
    "FunctionCall": "arguments name",
    "FunctionName": "name",
    "Health": "reason status",
    "ModelCard": "created id max_model_len object owned_by",
    "ModelList": "data object",
    "NamedTool": "function type",
    "PromptDetails": "cached_tokens",
    "ResponseFormat": "json_schema type",
    "RouteReport": """
        attempts blocks bytes chunks decode decode_prefix_hit_tokens encode_ms encoded_blocks encoded_by encoded_bytes
        encoder_tokens fetch_ms fetched_blocks fetched_bytes fetched_from
        gb_per_s itl_ms local_prefill plan preemptions prefill prefill_ms prefill_prefix_hit_tokens prefix_hit_tokens
        prompt_tokens queue_ms recomputed_tokens request_id skipped_blocks spare_used transfer_ms transport ttft_ms
    """,
    "StreamOptions": "continuous_usage_stats include_obfuscation include_usage",
    "Text": "prompt",
    "TextPart": "text type",
    "TokenLogprob": "bytes logprob token top_logprobs",
    "TokenizeRequest": """
        add_generation_prompt add_special_tokens chat_template_kwargs continue_final_message messages model prompt
        tools
    """,
    "Tokens": "count max_model_len tokens",
    "Tool": "function type",
    "ToolCall": "function id type",
    "TopLogprob": "bytes logprob token",
    "Usage": """
        completion_tokens prompt_tokens prompt_tokens_details sluice sluice_sequences total_tokens
    """,
    "WorkerRoute": "incarnation name pid",
}


@pytest.fixture(scope="module")
def schema(shared_door: FrontDoor) -> dict[str, Any]:
    return create_app(shared_door.service).openapi()


def test_the_paths_are_these(schema: dict[str, Any]) -> None:
    assert sorted(schema["paths"]) == PATHS.split()


def test_the_fields_are_these(schema: dict[str, Any]) -> None:
    found = {
        name: " ".join(sorted(part.get("properties", ()))) for name, part in schema["components"]["schemas"].items()
    }
    assert found == {name: " ".join(fields.split()) for name, fields in FIELDS.items()}


def test_the_page_on_the_api_names_every_path_and_field() -> None:
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    words = {word for code in re.findall("`([^`]+)`", page) for word in re.findall(r"[a-z_]+", code)}
    for name, fields in FIELDS.items():
        assert words >= set(fields.split()), name
    assert all(f"{path}`" in page for path in PATHS.split())


def test_the_documented_answers_are_the_given_ones(schema: dict[str, Any]) -> None:
    streamed = {"application/json", "text/event-stream"}
    content = {
        "/v1/completions": streamed,
        "/v1/chat/completions": streamed,
        "/metrics": {"text/plain"},
    }
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            answers = operation["responses"]
            assert set(answers) == {"200", "4XX", "5XX"} | ({"503"} if path in ("/health", "/ready") else set()), path
            assert set(answers["200"]["content"]) == content.get(path, {"application/json"}), path
            assert all(set(answer["headers"]) == {"x-request-id"} for answer in answers.values()), path
            for status in ("4XX", "5XX"):
                assert answers[status]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorBody")
