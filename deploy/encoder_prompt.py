"""What an encoder–decoder model reads of a completion request: the prompt with its encoder, and what its decoder
begins with.

A language is a special token like en_XX. It goes where the tokenizer puts its default one into the source, and into
the decoder's prompt: in the place of its start where the model starts with a language (mBART), else behind it
(mBART-50).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from cluster.errors import InvalidRequest
from deploy.generation import Prompt
from deploy.openai_requests import CompletionRequest
from deploy.sampling_request import check_ids
from deploy.served_model import ServedEncoder, ServedModel
from deploy.tokenizer import Tokenizer

_LANGUAGE: Final = re.compile(r"[a-z]{2,3}_[A-Z]{2,4}")
_OWN_FIELDS: Final = ("decoder_prompt", "source_language", "target_language", "return_encoder_output")


def check_fields(body: CompletionRequest, model: ServedModel) -> None:
    """Raises InvalidRequest for what the other kind of model takes."""
    if model.encoder is None:
        for name in _OWN_FIELDS:
            if getattr(body, name) not in (None, False):
                raise InvalidRequest(f"{name}: {model.name!r} has no encoder and no decoder prompt; remove it", name)
        return
    for name, asked in (("echo", body.echo), ("prompt_logprobs", body.prompt_logprobs is not None)):
        if asked:
            raise InvalidRequest(
                f"{name}: the answer does not go on from a prompt that an encoder reads; remove it", name
            )


async def with_decoder(
    body: CompletionRequest, prompts: Sequence[Prompt], model: ServedModel, tokenizer: Tokenizer | None
) -> list[Prompt]:
    """The same prompts, as an encoder's input. Raises InvalidRequest."""
    encoder = model.encoder
    assert encoder is not None
    languages = {} if tokenizer is None else languages_of(tokenizer)
    source = _language(body.source_language, "source_language", languages)
    target = _language(body.target_language, "target_language", languages)
    if source is not None:
        prompts = [_from(prompt, source, languages) for prompt in prompts]
    for prompt in prompts:
        encoder.check(len(prompt.token_ids))
    decoder = await _decoder_prompt(body, encoder, model, tokenizer, target, languages)
    return [Prompt(text=prompt.text, token_ids=prompt.token_ids, decoder_token_ids=decoder) for prompt in prompts]


def languages_of(tokenizer: Tokenizer) -> Mapping[str, int]:
    """Token ids by code."""
    added = tokenizer.backend.get_added_tokens_decoder()
    return {token.content: number for number, token in added.items() if _LANGUAGE.fullmatch(token.content)}


def _language(code: str | None, param: str, languages: Mapping[str, int]) -> int | None:
    if code is None:
        return None
    if not languages:
        raise InvalidRequest(f"{param}: the model's tokenizer knows no languages; remove it", param)
    if code not in languages:
        known = ", ".join(sorted(languages))
        raise InvalidRequest(f"{param}: {code[:40]!r} is no language of the model; it has {known}", param)
    return languages[code]


def _from(prompt: Prompt, source: int, languages: Mapping[str, int]) -> Prompt:
    known = set(languages.values())
    token_ids = tuple(source if token in known else token for token in prompt.token_ids)
    if source not in token_ids:
        raise InvalidRequest(
            "source_language: the prompt has no token for its language to stand in; send text, with its special tokens",
            "source_language",
        )
    return Prompt(text=prompt.text, token_ids=token_ids)


async def _decoder_prompt(
    body: CompletionRequest,
    encoder: ServedEncoder,
    model: ServedModel,
    tokenizer: Tokenizer | None,
    target: int | None,
    languages: Mapping[str, int],
) -> tuple[int, ...]:
    given, start = body.decoder_prompt, encoder.decoder_start_token_id
    if isinstance(given, list):
        if target is not None:
            raise InvalidRequest(
                "target_language: the decoder prompt's token ids say it; remove one", "target_language"
            )
        check_ids(given, model, "decoder_prompt")
        return tuple(given)
    if target is None:
        begin: tuple[int, ...] = (start,)
    else:
        begin = (target,) if start in languages.values() else (start, target)
    if given is None:
        return begin
    if tokenizer is None:
        raise InvalidRequest("decoder_prompt: the model has no tokenizer; send token ids", "decoder_prompt")
    return (*begin, *await tokenizer.encode(given, add_special_tokens=False))
