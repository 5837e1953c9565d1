"""What the HTTP routes work with: from a checked request body to running sequences."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final
from uuid import uuid4

from cluster.config import HttpConfig, LimitsConfig
from cluster.errors import InvalidRequest, RequestTooLong
from cluster.log import Log
from cluster.metrics import Metrics
from cluster.request import Grammar, Pooling, SamplingParams
from deploy.api_keys import ApiKey, ApiKeys
from deploy.caller import Caller
from deploy.chat_template import ChatPrompt
from deploy.completion import Completion, Ending
from deploy.embedding import Embeddings
from deploy.encoder_output import EncoderOutputs, check_size
from deploy.encoder_prompt import check_fields, with_decoder
from deploy.generation import Generation, Prompt
from deploy.openai_answers import Text, Tokens
from deploy.openai_errors import UnknownModel
from deploy.openai_requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    SamplingRequest,
    TokenizeRequest,
)
from deploy.quota import Quotas
from deploy.request_fields import TokenIds
from deploy.sampling_request import check_ids, sampling_of
from deploy.search import Search
from deploy.served_model import ServedModel
from deploy.stream import Detokenizer
from deploy.structured_output import may_call
from deploy.tally import Tally
from deploy.tokenizer import Tokenizer
from router.flight import RouterRequest
from router.router import Router

if TYPE_CHECKING:  # OpenTelemetry is imported where traces are on
    from deploy.traces import Traces

_NOBODY: Final = Caller()


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiService:
    """One ingress replica, without its HTTP. `api_keys` None: no key is asked for; `quotas` None: no key has limits."""

    router: Router
    tokenizer: Tokenizer | None
    model: ServedModel
    http: HttpConfig
    limits: LimitsConfig
    metrics: Metrics
    log: Log
    api_keys: ApiKeys | None = None
    quotas: Quotas | None = None
    affinity_header: str | None = None
    traces: Traces | None = None

    async def complete(self, body: CompletionRequest, tally: Tally, caller: Caller = _NOBODY) -> Generation:
        self._check_model(body.model)
        check_fields(body, self.model)
        prompts = [
            await self._prompt(prompt, "prompt", with_text=body.echo, add_special_tokens=body.add_special_tokens)
            for prompt in body.prompts
        ]
        if self.model.encoder is not None:
            prompts = await with_decoder(body, prompts, self.model, self.tokenizer)
        return await self._generation(body, prompts, body.max_tokens, "prompt", tally, None, caller)

    async def chat(self, body: ChatRequest, tally: Tally, caller: Caller = _NOBODY) -> Generation:
        self._check_model(body.model)
        self._check_decoder("messages")
        prompt = ChatPrompt(
            messages=body.messages,
            tools=body.tools if may_call(body) else (),
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            variables=body.chat_template_kwargs,
        )
        tokenizer = self._tokenizer("messages")
        token_ids = await tokenizer.encode_chat(prompt)
        grammar = await tokenizer.grammar_of(body, self.model.vocab_size, self.model.eos_token_ids)
        max_tokens = body.max_completion_tokens or body.max_tokens
        prompts = [Prompt(text="", token_ids=tuple(token_ids))]
        return await self._generation(body, prompts, max_tokens, "messages", tally, grammar, caller)

    async def embed(self, body: EmbeddingRequest, tally: Tally, caller: Caller = _NOBODY) -> Embeddings:
        self._check_model(body.model)
        size = self.model.hidden_size
        if body.dimensions is not None and body.dimensions != size:
            raise InvalidRequest(
                f"dimensions: the model's vectors have {size}, no other number; remove it", "dimensions"
            )
        deadline_s = self._deadline_s(body.timeout_s)
        prompts = [
            await self._prompt(text, "input", with_text=False, add_special_tokens=body.add_special_tokens)
            for text in body.inputs
        ]
        encoder = self.model.encoder
        if encoder is not None:
            for prompt in prompts:
                encoder.check(len(prompt.token_ids), "input")
            prompts = [replace(prompt, decoder_token_ids=(encoder.decoder_start_token_id,)) for prompt in prompts]
        for prompt in prompts:
            self._fit(prompt, 1, "input", caller.key)
            tally.prompt(len(prompt.token_ids))
        asked = body.pooling or ("last" if encoder is None else "mean")
        sampling = SamplingParams(max_tokens=1, pooling=Pooling.MEAN if asked == "mean" else Pooling.LAST)
        requests = [
            RouterRequest(
                request_id=uuid4().hex,
                prompt_token_ids=prompt.continued,
                encoder_token_ids=prompt.encoded,
                sampling=sampling,
                priority=body.priority,
                deadline_s=deadline_s,
                cache_salt=caller.cache_salt(body.cache_salt),
                client=caller.key.name,
                weight=caller.key.limits.weight,
                journal=tally.journal(),
            )
            for prompt in prompts
        ]
        return Embeddings(self.router, requests, max_running=self.limits.max_samples)

    async def tokenize(self, body: TokenizeRequest) -> Tokens:
        self._check_model(body.model)
        if body.messages is None:
            tokenizer = self._tokenizer("prompt")
            token_ids = await tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)
        else:
            prompt = ChatPrompt(
                messages=body.messages,
                tools=body.tools,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                variables=body.chat_template_kwargs,
            )
            token_ids = await self._tokenizer("messages").encode_chat(prompt)
        return Tokens(tokens=token_ids, count=len(token_ids), max_model_len=self.model.max_model_len)

    def detokenize(self, body: DetokenizeRequest) -> Text:
        self._check_model(body.model)
        tokenizer = self._tokenizer("tokens")
        check_ids(body.tokens, self.model, "tokens")
        return Text(prompt=tokenizer.decode(body.tokens, skip_special_tokens=False))

    # ------------------------------------------------------------ inside

    async def _generation(
        self,
        body: SamplingRequest,
        prompts: Sequence[Prompt],
        max_tokens: int | None,
        param: str,
        tally: Tally,
        grammar: Grammar | None,
        caller: Caller,
    ) -> Generation:
        if body.num_samples > self.limits.max_samples:
            name = "n" if body.n == body.num_samples else "best_of"
            limit = f"{name}: {body.num_samples} is over the limit of {self.limits.max_samples}; send several requests"
            raise InvalidRequest(limit, name)
        if isinstance(body, CompletionRequest) and body.num_beams > self.limits.max_samples:
            limit = f"num_beams: {body.num_beams} is over the limit of {self.limits.max_samples}; lower it"
            raise InvalidRequest(limit, "num_beams")
        deadline_s = self._deadline_s(body.timeout_s)
        ending = Ending(
            stops=tuple(body.stop),
            show_stop=body.include_stop_str_in_output,
            eos_token_ids=self.model.eos_token_ids,
            wants_tokens=max_tokens != 0,
        )
        completions: list[Completion] = []
        scores_prompt = False
        for prompt in prompts:
            seed = secrets.randbits(64) if body.seed is None else body.seed % 2**64
            fitting = self._fit(prompt, max_tokens, param, caller.key)
            first = await sampling_of(body, self.model, self.tokenizer, max_tokens=fitting, seed=seed, grammar=grammar)
            scores_prompt = first.num_prompt_logprobs is not None
            leader_id = uuid4().hex
            for sample in range(body.num_samples):
                follows = sample > 0
                request = RouterRequest(
                    request_id=uuid4().hex if follows else leader_id,
                    prompt_token_ids=prompt.continued,
                    encoder_token_ids=prompt.encoded,
                    sampling=replace(first, sample=sample, num_prompt_logprobs=None) if follows else first,
                    priority=body.priority,
                    deadline_s=deadline_s,
                    leader_id=leader_id if follows else "",
                    session=caller.session,
                    cache_salt=caller.cache_salt(body.cache_salt),
                    client=caller.key.name,
                    weight=caller.key.limits.weight,
                    journal=tally.journal(),
                )
                parts = self.router, request, tally
                completions.append(
                    Completion(*parts, detokenizer=self._detokenizer(body), ending=ending)
                    if first.beams is None
                    else Search(*parts, detokenizer=partial(self._detokenizer, body), ending=ending)
                )
        read_encoder = None
        if isinstance(body, CompletionRequest) and body.return_encoder_output:
            check_size(prompts, self.model, self.limits)
            leaders = [completion.request for completion in completions[:: body.num_samples]]
            read_encoder = EncoderOutputs(self.router, leaders, max_running=self.limits.max_samples).read
        for prompt in prompts:
            tally.prompt(len(prompt.token_ids))
        return Generation(
            prompts,
            completions,
            tally,
            num_choices=body.num_choices,
            max_running=self.limits.max_samples,
            scores_prompt=scores_prompt,
            num_found=body.num_found,
            read_encoder=read_encoder,
        )

    async def _prompt(self, given: str | TokenIds, param: str, *, with_text: bool, add_special_tokens: bool) -> Prompt:
        if isinstance(given, str):
            token_ids = await self._tokenizer(param).encode(given, add_special_tokens=add_special_tokens)
            return Prompt(text=given, token_ids=tuple(token_ids))
        check_ids(given, self.model, param)
        text = self.tokenizer.decode(given) if with_text and self.tokenizer is not None else ""
        return Prompt(text=text, token_ids=tuple(given))

    def _fit(self, prompt: Prompt, max_tokens: int | None, param: str, key: ApiKey) -> int:
        """max_tokens, all that is left where none is asked for."""
        longest, limit = self.model.max_model_len, self.limits.max_prompt_tokens
        num_tokens = len(prompt.token_ids)
        if not num_tokens:
            raise InvalidRequest(f"{param}: it has no tokens; send some text", param)
        if limit is not None and num_tokens > limit:
            raise RequestTooLong(f"{param}: {num_tokens} tokens are over the limit of {limit}; shorten it", param)
        key.check(num_tokens, param)
        num_tokens = len(prompt.continued)
        left = longest - num_tokens
        if left < 1:
            raise RequestTooLong(
                f"{param}: {num_tokens} tokens leave no room for an answer in the model's context of {longest}; "
                "shorten it",
                param,
            )
        if max_tokens is not None and max_tokens > left:
            raise RequestTooLong(
                f"{num_tokens} prompt tokens and max_tokens = {max_tokens} are over the model's context of {longest}; "
                f"ask for at most {left}",
                "max_tokens",
            )
        return key.bound(left if max_tokens is None else max_tokens, asked=max_tokens is not None)

    def _deadline_s(self, timeout_s: float | None) -> float:
        longest_s = self.http.request_timeout_s
        if timeout_s is not None and timeout_s > longest_s:
            raise InvalidRequest(f"timeout_s: {timeout_s:g} is over the limit of {longest_s:g} s", "timeout_s")
        return timeout_s or longest_s

    def _detokenizer(self, body: SamplingRequest) -> Detokenizer | None:
        if self.tokenizer is None:
            return None
        shows_all = isinstance(body, ChatRequest) and may_call(body) and self.tokenizer.calls_are_special
        return Detokenizer(self.tokenizer.backend, skip_special_tokens=not shows_all)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.model.name:
            shown = name if len(name) <= 80 else name[:80] + "…"
            raise UnknownModel(f"the model {shown!r} does not exist; use {self.model.name!r}", "model")

    def _check_decoder(self, param: str) -> None:
        if self.model.encoder is not None:
            told = f"{param}: {self.model.name!r} reads its prompts with an encoder; use /v1/completions"
            raise InvalidRequest(told, param)

    def _tokenizer(self, param: str) -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidRequest(f"{param}: the model has no tokenizer; send token ids to /v1/completions", param)
        return self.tokenizer
