"""Answers under a grammar through real processes: disaggregated equals aggregated equals the samplers of transformers
under masks made anew for every token; also when the pool is full, and when a worker dies in the middle."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import tokenizers
import torch
from torch import Tensor

from cluster.request import FinishReason, Grammar, GrammarKind, SamplingParams
from deploy.openai_requests import ChatRequest
from deploy.structured_output import grammar_of
from deploy.tool_format import HERMES
from tests.support.chaos import Chaos, prompts, running_chaos
from tests.support.checkpoints import VOCAB_SIZE, checkpoint, transformers_model
from tests.support.plain_cluster import Answer, PlainCluster, running_cluster
from tests.support.plain_sampler import generate
from tests.support.tokenizer_files import write_tokenizer
from workers.engine.grammar import GrammarCompiler

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

EOS = 0
NUM_TOKENS = 48
LIST = {
    "type": "array",
    "minItems": 3,
    "maxItems": 4,
    "items": {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green", "blue"]}, "size": {"type": "integer", "minimum": -5}},
        "required": ["colour"],
        "additionalProperties": False,
    },
}
TOOL = {"type": "function", "function": {"name": "paint", "parameters": LIST["items"]}}
SEEDED = SamplingParams(max_tokens=NUM_TOKENS, temperature=1.0, seed=7)
SETTINGS = {
    "kv.prefill_reserve": 0.1,
    "router.local_prefill": "never",
    "words.heartbeat_timeout_s": 20.0,
    "words.step_timeout_s": 20.0,  # a busy machine is no failure here
    "log.level": "error",
}


def schema(tree: object) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(tree))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer and an end token that this has, too."""
    path = tmp_path_factory.mktemp("model") / "llama"
    shutil.copytree(checkpoint("llama"), path)
    write_tokenizer(path)
    for file in path.glob("*config.json"):
        if "eos_token_id" in (config := json.loads(file.read_text())):
            file.write_text(json.dumps({**config, "eos_token_id": EOS}))
    return path


@pytest.fixture(scope="module")
def compiler(folder: Path) -> GrammarCompiler:
    return GrammarCompiler(folder / "tokenizer.json", VOCAB_SIZE, frozenset({EOS}))


@pytest.fixture(scope="module")
def split(folder: Path) -> Iterator[Chaos]:
    with running_chaos({**SETTINGS, "model.path": str(folder)}, prefill=2, decode=2) as chaos:
        yield chaos


@pytest.fixture(scope="module")
def grammars(compiler: GrammarCompiler) -> dict[str, Grammar]:
    def tools(choice: str) -> Grammar:
        asked = {"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": [TOOL], "tool_choice": choice}
        grammar = grammar_of(ChatRequest.model_validate(asked), HERMES, compiler)
        assert grammar is not None
        return grammar

    return {
        "json_schema": schema(LIST),
        "json_object": schema({"type": "object"}),
        "regex": Grammar(GrammarKind.REGEX, "([a-f]{1,4}-(é|😀)){8,9}"),
        "choice": Grammar(GrammarKind.REGEX, "yes, it is|no, it is not|maybe"),
        "tools, auto": tools("auto"),
        "tools, required": tools("required"),
    }


@pytest.fixture(scope="module")
def asked(grammars: dict[str, Grammar]) -> list[tuple[tuple[int, ...], SamplingParams]]:
    """Every grammar, greedy and drawn."""
    each = [replace(SEEDED, grammar=grammar) for grammar in grammars.values()]
    params = [*each, *(replace(one, temperature=0.0) for one in each)]
    return list(zip(prompts(len(params), 40, 90, seed=1), params, strict=True))


@pytest.fixture(scope="module")
def said(asked: list[tuple[tuple[int, ...], SamplingParams]], compiler: GrammarCompiler) -> list[list[int]]:
    """By transformers, one token at a time, each under the mask of a state that is made for it."""
    return [plain_answer(compiler, prompt, params) for prompt, params in asked]


def plain_answer(compiler: GrammarCompiler, prompt: tuple[int, ...], params: SamplingParams) -> list[int]:
    assert params.grammar is not None
    grammar = params.grammar

    def allowed(emitted: Sequence[int]) -> list[int]:
        state, mask = compiler.compile(grammar), np.zeros(VOCAB_SIZE // 32, np.uint32)
        state.advance(emitted)
        state.fill(mask)
        return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()

    return generate(_logits(), prompt, params, ending=(EOS,), allowed=allowed, until=EOS)


def _logits() -> Callable[[Sequence[int]], Tensor]:
    """Of one text, which each call has one more token of."""
    model, past = transformers_model("llama"), None

    @torch.inference_mode()
    def after(tokens: Sequence[int]) -> Tensor:
        nonlocal past
        fresh = tokens if past is None else tokens[-1:]
        output = model(torch.tensor([fresh]), past_key_values=past, use_cache=True)
        past = output.past_key_values
        return output.logits[0, -1]

    return after


async def together(cluster: PlainCluster, asked: Sequence[tuple[tuple[int, ...], SamplingParams]]) -> list[Answer]:
    return await asyncio.gather(*(cluster.ask(list(prompt), params) for prompt, params in asked))


def test_disaggregated_says_what_transformers_says_under_the_masks(
    split: Chaos,
    folder: Path,
    asked: list[tuple[tuple[int, ...], SamplingParams]],
    said: list[list[int]],
    grammars: dict[str, Grammar],
) -> None:
    answers = split.runner.run(together(split.cluster, asked))
    assert [answer.token_ids for answer in answers] == said
    assert len({token for tokens in said for token in tokens}) > 60, "few tokens prove little"
    for answer, tokens in zip(answers, said, strict=True):
        assert answer.finish is (FinishReason.STOP if tokens[-1] == EOS else FinishReason.LENGTH)
        assert answer.route.blocks > 0 and not answer.route.local_prefill
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = dict(zip(grammars, map(backend.decode, said), strict=False))
    assert texts["choice"] in ("yes, it is", "no, it is not", "maybe")
    assert texts["tools, required"].startswith("<tool_call>")


def test_aggregated_says_it_in_a_pool_that_is_too_small(
    folder: Path, asked: list[tuple[tuple[int, ...], SamplingParams]], said: list[list[int]]
) -> None:
    small = {**SETTINGS, "model.path": str(folder), "kv.block_size": 16, "kv.num_blocks": 32}
    with running_cluster({**small, "router.local_prefill": "always"}, mixed=1) as (cluster, runner):
        answers = runner.run(together(cluster, asked))
        assert [answer.token_ids for answer in answers] == said
        assert sum(answer.route.preemptions for answer in answers) > 0, "the pool was not full"
        runner.run(cluster.assert_all_free())


def test_killed_workers_leave_no_trace_in_an_answer(
    split: Chaos, folder: Path, compiler: GrammarCompiler, grammars: dict[str, Grammar]
) -> None:
    """A prefill worker before it has computed, then a decode worker in the middle of streams."""
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    params = replace(SEEDED, max_tokens=300, grammar=grammars["json_schema"])
    texts = prompts(4, 60, 90, seed=2)
    wanted = [plain_answer(compiler, text, params) for text in texts]
    for tokens in wanted:
        jsonschema.validate(json.loads(backend.decode(tokens)), LIST)

    async def without_prefill() -> list[Answer]:
        split.freeze("prefill-0")
        tasks = split.ask(texts, params)
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)  # the others wait for the frozen one
        await split.cluster.kill("prefill-0")
        return await asyncio.gather(*tasks)

    answers = split.runner.run(without_prefill())
    assert [answer.token_ids for answer in answers] == wanted
    assert sum(answer.route.spare_used for answer in answers) > 0
    assert {answer.attempt for answer in answers} == {1}

    killed: list[str] = []

    async def stream(text: tuple[int, ...]) -> tuple[list[int], int]:
        tokens, attempt = list[int](), 0
        async for delta in split.deltas(text, params):
            assert delta.first_index == len(tokens), "a token was lost or doubled"
            tokens += delta.token_ids
            attempt = delta.attempt
            if len(tokens) >= 20 and not killed:
                killed.append(delta.plan.decode.name)
                await split.cluster.kill(killed[0])
        return tokens, attempt

    async def without_decode() -> list[tuple[list[int], int]]:
        return await asyncio.gather(*map(stream, texts))

    streams = split.runner.run(without_decode())
    assert [tokens for tokens, _ in streams] == wanted
    assert sum(attempt > 1 for _, attempt in streams) > 0, "nobody was moved"
    split.runner.run(split.cluster.assert_all_free())
