"""What encode workers hand over, and what a client may see of it: hidden states, through processes and over HTTP."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
import pytest

from cluster.config import EncoderOutput
from tests.support.encode_scenes import BLOCK_SIZE, NUM_TOKENS, Scene, over_http, running
from tests.support.encoder_decoders import START, Text, encoded, texts

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

READ = "sluice_engine_encoder_tokens_total"
HIDDEN_SIZE, FLOAT_BYTES = 64, 4
ONE: dict[str, Any] = {"pools": {"decode": {"workers": 1, "roles": ["encode", "prefill", "decode"], "threads": 1}}}
APART: dict[str, Any] = {"prefill": 1}


async def expect_states(stage: Scene, *sources: tuple[int, ...], **more: object) -> dict[str, Any]:
    """Asks for what the encoder makes of each, beside a text: as transformers has it."""
    body: dict[str, object] = {"model": "t5", "prompt": [list(source) for source in sources], "max_tokens": NUM_TOKENS}
    body |= {"decoder_prompt": [START[stage.family]], "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    answer = await over_http(stage.cluster, {**body, "return_encoder_output": True, "return_route": True, **more})
    told = answer["encoder_outputs"]
    assert [output["index"] for output in told] == list(range(len(sources)))
    for source, output in zip(sources, told, strict=True):
        assert output["dtype"] == "float32" and output["shape"] == [len(source), HIDDEN_SIZE]
        states = np.frombuffer(base64.b64decode(output["data"]), "<f4").reshape(output["shape"])
        np.testing.assert_allclose(states, encoded(stage.family, source)[0].numpy(), rtol=1e-4, atol=1e-4)
    return answer


def test_hidden_states_are_moved_and_shown() -> None:
    """Prefill and decode worker each fetch them, once for equal inputs, and make their keys and values themselves."""
    wanted = texts("t5", 40)

    async def scene(stage: Scene) -> None:
        total = stage.cluster.total
        answers = await asyncio.gather(*(stage.ask(text) for text in wanted))
        assert len(stage.check(wanted, answers)) >= 60
        sources = {text.source for text in wanted}
        blocks = sum(-(-len(source) // BLOCK_SIZE) for source in sources)
        routes = [answer.route.encoded for answer in answers]
        assert sum(route.blocks for route in routes) == blocks
        assert sum(route.bytes for route in routes) == blocks * BLOCK_SIZE * HIDDEN_SIZE * FLOAT_BYTES
        assert await total(READ) == await total(READ, "encode-0") == sum(map(len, sources))
        await stage.search(wanted[:4])

        # Read for who wants to see it, and never again for the text: it finds what was kept.
        fresh = tuple(range(20, 57))
        read = await total(READ)
        answer = await expect_states(stage, fresh)
        assert answer["usage"]["sluice"]["encoded_by"] == "encode-0" and await total(READ) == read + len(fresh)
        answers = [await stage.ask(Text(fresh, (START["t5"],)))]
        assert answers[0].token_ids == answer["choices"][0]["token_ids"]
        answer = await expect_states(stage, fresh, wanted[5].source, n=2, temperature=1, seed=3)
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        answer = await expect_states(stage, wanted[6].source, num_beams=4, n=2)
        assert len(answer["choices"]) == 2

        # Without its encoder the decode worker reads for itself.
        await stage.cluster.kill("encode-0")
        late = [Text(text.source[::-1], text.prompt) for text in wanted[3:7]]
        answers = await asyncio.gather(*(stage.ask(text) for text in late))
        stage.check(late, answers)
        await expect_states(stage, late[0].source, fresh)

    hidden: dict[str, Any] = {"kv.encoder_output": "hidden_states"}
    with running("t5", prefill=1, **hidden) as stage:
        stage.play(scene(stage))


@pytest.mark.full
@pytest.mark.parametrize("family", ["t5-gated", "bart", "mbart"])
@pytest.mark.parametrize("encoder_output", ["cross_kv", "hidden_states"])
@pytest.mark.parametrize("layout", [ONE, {}, APART], ids=["one worker", "E+D", "E+P+D"])
def test_families(family: str, encoder_output: EncoderOutput, layout: dict[str, Any]) -> None:
    """Ragged inputs, cached and not; memory for a few only, so that some are preempted and read again."""
    wanted = texts(family, 112, num_sources=28)

    async def scene(stage: Scene) -> None:
        answers = await stage.expect(wanted)
        assert len({token for answer in answers for token in answer.token_ids}) >= 100
        await expect_states(stage, wanted[4].source, wanted[27].source, (7,) * 33)
        await stage.search(wanted[:4])

    with running(family, **layout, **{"kv.encoder_output": encoder_output, "kv.num_blocks": 40}) as stage:
        stage.play(scene(stage))
