"""What the encoder made of the prompts of a completion, for a client that wants to see it (`return_encoder_output`).

Each prompt is a request of its own to the workers, ahead of its completions: these find the encoder's output cached.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from uuid import uuid4

from cluster.config import LimitsConfig
from cluster.errors import InvalidRequest, RequestError
from cluster.hidden_states import DTYPE, ITEM_BYTES, HiddenStates
from cluster.request import Pooling, SamplingParams
from deploy.embedding import together
from deploy.generation import Prompt
from deploy.openai_answers import EncoderOutput
from deploy.served_model import ServedModel
from router.flight import RouterRequest
from router.router import Router

_FIELD = "return_encoder_output"


def check_size(prompts: Sequence[Prompt], model: ServedModel, limits: LimitsConfig) -> None:
    """Raises InvalidRequest for more than an answer may hold."""
    num_tokens = sum(len(prompt.token_ids) for prompt in prompts)
    num_bytes = num_tokens * (model.hidden_size or 0) * ITEM_BYTES
    if num_bytes > limits.max_encoder_output_bytes:
        told = f"{num_tokens} tokens of {model.hidden_size} numbers are {num_bytes} bytes, over the limit of"
        raise InvalidRequest(f"{_FIELD}: {told} {limits.max_encoder_output_bytes}; send less at once", _FIELD)


class EncoderOutputs:
    """Of all prompts of one HTTP request; they end together."""

    def __init__(self, router: Router, requests: Sequence[RouterRequest], *, max_running: int) -> None:
        """`requests`: the first completion of each prompt."""
        self._router = router
        self._requests = [
            replace(
                request,
                request_id=uuid4().hex,
                sampling=SamplingParams(max_tokens=1, pooling=Pooling.STATES),
                leader_id="",
                journal=None,
            )
            for request in requests
        ]
        self._max_running = max_running

    async def read(self) -> list[EncoderOutput]:
        """In the order of the prompts. The first failure ends all; raises the RequestError family."""
        found = await together([self._states(request) for request in self._requests], self._max_running)
        return [
            EncoderOutput(
                index=index,
                shape=[states.num_tokens, states.width],
                dtype=DTYPE,
                data=base64.b64encode(states.data).decode(),
            )
            for index, states in enumerate(found)
        ]

    async def _states(self, request: RouterRequest) -> HiddenStates:
        async with aclosing(self._router.generate(request)) as deltas:
            async for delta in deltas:
                if delta.states is not None:
                    return delta.states
        raise RequestError(f"request {request.request_id} ended without its encoder's output; report its id")
