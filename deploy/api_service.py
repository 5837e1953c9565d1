"""What the HTTP routes work with: from a checked request body to a running completion."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from uuid import uuid4

from cluster.config import HttpConfig, LimitsConfig
from cluster.errors import InvalidRequest, RequestTooLong
from cluster.log import Log
from cluster.metrics import Metrics
from cluster.request import SamplingParams
from deploy.completion import Completion, Tally
from deploy.openai_errors import UnknownModel
from deploy.openai_schema import ChatRequest, CompletionRequest
from deploy.served_model import ServedModel
from deploy.stream import Detokenizer
from deploy.tokenizer import Tokenizer
from router.flight import RouterRequest
from router.router import Router


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiService:
    """One ingress replica, without its HTTP. `api_keys` empty: no key is asked for."""

    router: Router
    tokenizer: Tokenizer | None
    model: ServedModel
    http: HttpConfig
    limits: LimitsConfig
    metrics: Metrics
    log: Log
    api_keys: frozenset[str] = field(default=frozenset(), repr=False)

    async def complete(self, body: CompletionRequest, tally: Tally) -> Completion:
        """Raises the InvalidRequest family."""
        self._check_model(body.model)
        if isinstance(body.prompt, str):
            prompt = await self._tokenizer("prompt").encode(body.prompt)
        else:
            prompt = body.prompt
            largest = max(prompt)
            if largest >= self.model.vocab_size:
                raise InvalidRequest(
                    f"prompt: token id {largest} is outside the vocabulary of {self.model.vocab_size}", "prompt"
                )
        return self._completion(body, prompt, body.max_tokens, "prompt", tally)

    async def chat(self, body: ChatRequest, tally: Tally) -> Completion:
        """Raises the InvalidRequest family."""
        self._check_model(body.model)
        messages = [message.plain() for message in body.messages]
        prompt = await self._tokenizer("messages").encode_chat(messages)
        return self._completion(body, prompt, body.max_completion_tokens or body.max_tokens, "messages", tally)

    def _completion(
        self, body: CompletionRequest | ChatRequest, prompt: list[int], max_tokens: int | None, param: str, tally: Tally
    ) -> Completion:
        max_tokens = self._fit(prompt, max_tokens, param)
        if body.min_tokens > max_tokens:
            raise InvalidRequest(f"min_tokens: {body.min_tokens} is over max_tokens = {max_tokens}", "min_tokens")
        if body.stop and self.tokenizer is None:
            raise InvalidRequest("stop: the model has no tokenizer to find stop strings; use stop_token_ids", "stop")
        longest_s = self.http.request_timeout_s
        if body.timeout_s is not None and body.timeout_s > longest_s:
            raise InvalidRequest(f"timeout_s: {body.timeout_s:g} is over the limit of {longest_s:g} s", "timeout_s")
        seed = secrets.randbits(64) if body.seed is None else body.seed % 2**64
        request = RouterRequest(
            request_id=uuid4().hex,
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(
                max_tokens=max_tokens,
                min_tokens=body.min_tokens,
                temperature=body.temperature,
                top_p=body.top_p,
                top_k=body.top_k,
                seed=seed,
                stop_token_ids=tuple(body.stop_token_ids),
                ignore_eos=body.ignore_eos,
            ),
            priority=body.priority,
            deadline_s=body.timeout_s or longest_s,
        )
        self.metrics.prompt_tokens.inc(len(prompt))
        detokenizer = None if self.tokenizer is None else Detokenizer(self.tokenizer.backend)
        return Completion(
            self.router,
            request,
            tally,
            detokenizer=detokenizer,
            stops=tuple(body.stop or ()),
            eos_token_ids=self.model.eos_token_ids,
        )

    def _fit(self, prompt: list[int], max_tokens: int | None, param: str) -> int:
        """max_tokens, all that is left where none is asked for."""
        longest, limit = self.model.max_model_len, self.limits.max_prompt_tokens
        if not prompt:
            raise InvalidRequest(f"{param}: it has no tokens; send some text", param)
        if limit is not None and len(prompt) > limit:
            raise RequestTooLong(f"{param}: {len(prompt)} tokens are over the limit of {limit}; shorten it", param)
        left = longest - len(prompt)
        if left < 1:
            raise RequestTooLong(
                f"{param}: {len(prompt)} tokens leave no room for an answer in the model's context of {longest}; "
                "shorten it",
                param,
            )
        if max_tokens is not None and max_tokens > left:
            raise RequestTooLong(
                f"{len(prompt)} prompt tokens and max_tokens = {max_tokens} are over the model's context of {longest}; "
                f"ask for at most {left}",
                "max_tokens",
            )
        return max_tokens or left

    def _check_model(self, name: str) -> None:
        if name != self.model.name:
            raise UnknownModel(f"the model {name!r} does not exist; use {self.model.name!r}", "model")

    def _tokenizer(self, param: str) -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidRequest(f"{param}: the model has no tokenizer; send token ids to /v1/completions", param)
        return self.tokenizer
