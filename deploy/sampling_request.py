"""From what a client asks for to what a worker is asked: sampling parameters, checked against the model."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.errors import InvalidRequest
from cluster.request import Grammar, SamplingParams
from deploy.openai_requests import CompletionRequest, SamplingRequest
from deploy.request_fields import TokenIds
from deploy.served_model import ServedModel
from deploy.tokenizer import Tokenizer


async def sampling_of(
    body: SamplingRequest,
    model: ServedModel,
    tokenizer: Tokenizer | None,
    *,
    max_tokens: int,
    seed: int,
    grammar: Grammar | None = None,
) -> SamplingParams:
    """Of the first sample. Raises InvalidRequest."""
    if body.min_tokens > max_tokens:
        raise InvalidRequest(f"min_tokens: {body.min_tokens} is over max_tokens = {max_tokens}", "min_tokens")
    if body.stop and tokenizer is None:
        raise InvalidRequest("stop: the model has no tokenizer to find stop strings; use stop_token_ids", "stop")
    check_ids((token for token, _ in body.logit_bias), model, "logit_bias")
    check_ids(body.stop_token_ids, model, "stop_token_ids")
    num_logprobs, num_prompt_logprobs = body.num_logprobs, body.prompt_logprobs
    if isinstance(body, CompletionRequest) and body.echo and num_logprobs is not None:
        num_prompt_logprobs = max(num_logprobs, num_prompt_logprobs or 0)
    search = body if isinstance(body, CompletionRequest) else None
    searches = search is not None and search.searches
    if num_logprobs is None and body.num_samples > body.n:
        num_logprobs = 0  # the best is the one with the largest
    return SamplingParams(
        max_tokens=max(1, max_tokens),
        min_tokens=body.min_tokens,
        temperature=0.0 if searches else body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        seed=seed,
        stop_token_ids=tuple(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=body.logit_bias,
        bad_words=await _bad_words(body.bad_words, model, tokenizer),
        num_logprobs=num_logprobs,
        num_prompt_logprobs=num_prompt_logprobs,
        grammar=grammar,
        no_repeat_ngram_size=0 if search is None else search.no_repeat_ngram_size,
        beams=None if search is None else search.beams(search.num_choices),
    )


def check_ids(token_ids: Iterable[int], model: ServedModel, param: str) -> None:
    """Raises InvalidRequest for the largest that the model does not know."""
    largest = max(token_ids, default=0)
    if largest >= model.vocab_size:
        raise InvalidRequest(f"{param}: token id {largest} is outside the vocabulary of {model.vocab_size}", param)


async def _bad_words(
    words: list[str | TokenIds], model: ServedModel, tokenizer: Tokenizer | None
) -> tuple[tuple[int, ...], ...]:
    """A text is forbidden as it stands and after a space, which most vocabularies write into the token."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        if isinstance(word, str):
            if tokenizer is None:
                raise InvalidRequest("bad_words: the model has no tokenizer; send lists of token ids", "bad_words")
            for text in (word, " " + word.lstrip()):
                found[tuple(await tokenizer.encode(text, add_special_tokens=False))] = None
        else:
            check_ids(word, model, "bad_words")
            found[tuple(word)] = None
    return tuple(word for word in found if word)
