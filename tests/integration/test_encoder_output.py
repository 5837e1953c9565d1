"""What encode workers hand over, and what a client may see of it: hidden states, through processes and over HTTP."""

from __future__ import annotations

import asyncio
import base64
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.config import EncoderOutput
from deploy.answer_file import AnswerFile, fingerprints
from deploy.batch import Batch
from tests.support.encode_scenes import BLOCK_SIZE, NUM_TOKENS, Scene, front_door, over_http, running
from tests.support.encoder_decoders import START, Text, encoded, texts
from tests.support.watch import Watch

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
    check_outputs(stage, answer, *sources)
    return answer


def check_outputs(stage: Scene, answer: dict[str, Any], *sources: tuple[int, ...]) -> None:
    told = answer["encoder_outputs"]
    assert [output["index"] for output in told] == list(range(len(sources)))
    for source, output in zip(sources, told, strict=True):
        assert output["dtype"] == "float32" and output["shape"] == [len(source), HIDDEN_SIZE]
        states = np.frombuffer(base64.b64decode(output["data"]), "<f4").reshape(output["shape"])
        np.testing.assert_allclose(states, encoded(stage.family, source)[0].numpy(), rtol=1e-4, atol=1e-4)


async def answer_lines(stage: Scene, folder: Path, *lines: dict[str, object]) -> list[dict[str, Any]]:
    """As a file of requests."""
    written = [json.dumps(line).encode() for line in lines]
    output = AnswerFile.create(folder / "out.jsonl", folder / "in.jsonl")
    batch = Batch(front_door(stage.cluster), max_open=4, explain=False)
    await batch.run(written, fingerprints(stage.cluster.config, written), output, lambda: None)
    output.close()
    return [json.loads(line) for line in output.path.read_text().splitlines()]


def test_hidden_states_are_moved_and_shown(tmp_path: Path) -> None:
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

        line: dict[str, object] = {"prompt_token_ids": list(fresh), "max_tokens": 2}
        shown, hidden = await answer_lines(stage, tmp_path, {**line, "return_encoder_output": True}, line)
        check_outputs(stage, shown, fresh)
        assert shown["token_ids"] and "encoder_outputs" not in hidden

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
def test_an_encoder_dies_before_it_has_shown_anything() -> None:
    """Another one shows it; the request that waited for the first one's answer is the same."""

    async def scene(stage: Scene) -> None:
        cluster, watch = stage.cluster, Watch(stage.cluster)
        for name in ("encode-0", "encode-1"):
            cluster.workers[name].signal(signal.SIGSTOP)
        sources = [tuple(range(5 + number, 40)) for number in range(6)]
        asked = [asyncio.ensure_future(expect_states(stage, source)) for source in sources]
        await watch.until("decode-0", lambda load: load.num_waiting == len(sources), "all wait for encoders")
        cluster.workers["encode-1"].signal(signal.SIGCONT)
        await cluster.kill("encode-0")
        answers = await asyncio.gather(*asked)
        assert {answer["usage"]["sluice"]["encoded_by"] for answer in answers} == {"encode-1"}
        watch.stop()

    hidden: dict[str, Any] = {"kv.encoder_output": "hidden_states"}
    with running("t5", encode=2, **hidden) as stage:
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
