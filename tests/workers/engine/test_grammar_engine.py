"""Grammars in a running engine: rows with one beside rows without, cut anywhere, and one that gives up."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import tokenizers

from cluster.request import FinishReason, Grammar, GrammarKind, SamplingParams
from tests.support.engines import TinyEngine, limits
from tests.support.tokenizer_files import write_tokenizer
from workers.engine.grammar import GrammarCompiler

VOCAB_SIZE = 97  # of the tiny model: the end token and printable ASCII of the tokenizer's 400
EOS = frozenset({0})
PROMPT = [5, 9, 23, 42]
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["red", "green"]},
        "sizes": {"type": "array", "maxItems": 3, "items": {"const": 7}},
    },
    "required": ["kind", "sizes"],
    "additionalProperties": False,
}
GRAMMAR = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA))
EXPLODING = Grammar(GrammarKind.REGEX, "(a{1,1000}){1,1000}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return path


@pytest.fixture
def engine(folder: Path) -> TinyEngine:
    return TinyEngine(
        num_blocks=512,
        scheduler_limits=limits(max_model_len=1_100),
        eos_token_ids=EOS,
        constraints=GrammarCompiler(folder / "tokenizer.json", VOCAB_SIZE, EOS),
    )


def test_answers_match_and_go_on_from_any_cut(engine: TinyEngine, folder: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    free = SamplingParams(max_tokens=40, ignore_eos=True)
    alone = engine.submit(PROMPT, free)
    engine.run()
    wanted = [
        SamplingParams(max_tokens=200, grammar=GRAMMAR, temperature=temperature, seed=seed)
        for temperature, seed in ((0.0, 0), (20.0, 1), (20.0, 2), (20.0, 3))
    ]
    sequences = [engine.submit(PROMPT, params) for params in wanted]
    mate = engine.submit(PROMPT, free)
    engine.run()
    assert engine.emitted(mate) == engine.emitted(alone), "a row without a grammar"
    for params, sequence in zip(wanted, sequences, strict=True):
        tokens = engine.emitted(sequence)
        assert engine.finish(sequence) is FinishReason.STOP and tokens[-1] in EOS
        jsonschema.validate(json.loads(backend.decode(tokens)), SCHEMA)
        for cut in range(0, len(tokens), 5):
            replay = engine.submit([*PROMPT, *tokens[:cut]], params, num_prompt=len(PROMPT))
            engine.run()
            assert engine.emitted(replay) == tokens[cut:]
    assert len({tuple(engine.emitted(sequence)) for sequence in sequences}) > 1


def test_a_grammar_that_gives_up_ends_its_sequence_alone(engine: TinyEngine) -> None:
    free = SamplingParams(max_tokens=200, ignore_eos=True)
    alone = engine.submit(PROMPT, free)
    engine.run()
    wrong = engine.submit(PROMPT, SamplingParams(max_tokens=1_000, min_tokens=1_000, grammar=EXPLODING))
    mate = engine.submit(PROMPT, free)
    engine.run()
    failed = [sequence for outcome in engine.outcomes for sequence in outcome.failed]
    assert failed == [wrong]
    assert 0 < len(engine.emitted(wrong)) < 1_000
    assert engine.emitted(mate) == engine.emitted(alone)
    assert engine.finish(mate) is FinishReason.LENGTH
