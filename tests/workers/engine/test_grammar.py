"""Grammars over a real byte-level BPE vocabulary: whatever is drawn from the masks ends in what was asked for."""

from __future__ import annotations

import json
import random
import re
from functools import cache
from pathlib import Path

import jsonschema
import numpy as np
import numpy.typing as npt
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.errors import InvalidRequest
from cluster.request import Grammar, GrammarKind
from tests.support.tokenizer_files import SPECIAL, write_tokenizer
from workers.engine.grammar import MAX_GRAMMAR_BYTES, MAX_KNOWN, GrammarCompiler, GrammarState

VOCAB_SIZE = 450  # over the tokenizer's 400: padding rows, and a last word that is not full
EOS = frozenset({0, 3})  # <|end|> and <|assistant|>


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def compiler(folder: Path) -> GrammarCompiler:
    return GrammarCompiler(folder / "tokenizer.json", VOCAB_SIZE, EOS)


@pytest.fixture(scope="module")
def backend(folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def words() -> npt.NDArray[np.uint32]:
    return np.full((VOCAB_SIZE + 31) // 32, 0xFFFFFFFF, dtype=np.uint32)  # dirty: fill must clear


def allowed(state: GrammarState) -> list[int]:
    mask = words()
    state.fill(mask)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def schema(tree: object) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(tree))


def regex(text: str) -> Grammar:
    return Grammar(GrammarKind.REGEX, text)


@cache
def _bytes_of(backend: tokenizers.Tokenizer) -> list[bytes]:
    """What each token stands for, read off the byte-level alphabet."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(byte): byte for byte in printable}
    hidden = (byte for byte in range(256) if byte not in printable)
    letters |= {chr(256 + nth): byte for nth, byte in enumerate(hidden)}
    names = [backend.id_to_token(token) or "" for token in range(backend.get_vocab_size())]
    return [b"" if name.startswith("<|") else bytes(letters[letter] for letter in name) for name in names]


class Walk:
    """Draws tokens from the masks, the shortest way out preferred after `max_free` of them."""

    def __init__(self, state: GrammarState, backend: tokenizers.Tokenizer, seed: int, max_free: int = 12) -> None:
        self.tokens: list[int] = []
        self.masks: list[list[int]] = []
        pieces, dice = _bytes_of(backend), random.Random(seed)
        for step in range(600):
            choices = allowed(state)
            self.masks.append(choices)
            assert choices, "an empty mask"
            assert max(choices) < backend.get_vocab_size(), "a token without a text"
            ends = [token for token in choices if token in EOS]
            assert set(ends) in (set(), EOS), "all end tokens or none"
            if len(ends) == len(choices) or (ends and (step >= max_free or dice.random() < 0.5)):
                self.ended = True
                break
            free = [token for token in choices if token not in EOS]
            if step >= max_free:  # what closes something, else anything
                closing = [token for token in free if pieces[token] in (b'"', b"}", b"]", b'"}', b'"]')]
                free = closing or free
            self.tokens.append(dice.choice(free))
            state.advance(self.tokens[-1:])
        else:
            self.ended = False
        self.text = b"".join(pieces[token] for token in self.tokens).decode(
            "utf-8", "strict" if self.ended else "replace"
        )


_names = st.sampled_from(["a", "b", "name", "ü", 'q"uote', "x y", "z/1"])
_scalars = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.tuples(st.integers(-1000, 1000), st.integers(0, 500)).map(
        lambda pair: {"type": "integer", "minimum": pair[0], "maximum": pair[0] + pair[1]}
    ),
    st.tuples(st.integers(-50, 50), st.integers(1, 50)).map(
        lambda pair: {"type": "number", "minimum": pair[0], "exclusiveMaximum": pair[0] + pair[1]}
    ),
    st.tuples(st.integers(0, 3), st.integers(0, 5)).map(
        lambda pair: {"type": "string", "minLength": pair[0], "maxLength": pair[0] + pair[1]}
    ),
    st.sampled_from(["^[a-f]{2,4}$", "^(ab|c)*d$", "^[0-9]{3}-[0-9]{2}$", "^(é|ß)$"]).map(
        lambda pattern: {"type": "string", "pattern": pattern}
    ),
    st.sampled_from(["date", "uuid", "ipv4", "date-time"]).map(lambda name: {"type": "string", "format": name}),
    st.lists(st.one_of(st.integers(-9, 99), _names, st.booleans(), st.none()), min_size=1, max_size=4).map(
        lambda values: {"enum": values}
    ),
    st.one_of(st.integers(), _names).map(lambda value: {"const": value}),
    st.just({"$ref": "#/$defs/node"}),
)


def _containers(inner: st.SearchStrategy[dict[str, object]]) -> st.SearchStrategy[dict[str, object]]:
    def with_required(properties: dict[str, dict[str, object]]) -> st.SearchStrategy[dict[str, object]]:
        needed = st.lists(st.sampled_from(sorted(properties)), unique=True) if properties else st.just([])
        return needed.map(
            lambda names: {
                "type": "object",
                "properties": properties,
                "required": names,
                "additionalProperties": False,
            }
        )

    return st.one_of(
        st.dictionaries(_names, inner, max_size=4).flatmap(with_required),
        st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(
            lambda each: {"type": "array", "items": each[0], "minItems": each[1], "maxItems": each[1] + each[2]}
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda schemas: {"anyOf": schemas}),
    )


_DEFS = {
    "node": {
        "type": "object",
        "properties": {"value": {"type": "integer"}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
        "required": ["value", "next"],
        "additionalProperties": False,
    }
}
schemas = st.recursive(_scalars, _containers, max_leaves=6).map(lambda tree: {**tree, "$defs": _DEFS})


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(schemas, st.integers(0, 2**32))
def test_what_is_drawn_from_the_masks_of_a_schema_is_valid(
    compiler: GrammarCompiler, backend: tokenizers.Tokenizer, tree: dict[str, object], seed: int
) -> None:
    grammar = schema(tree)
    compiler.check(grammar)
    walk = Walk(compiler.compile(grammar), backend, seed)
    assert walk.ended, walk.text
    jsonschema.validate(json.loads(walk.text), tree)
    cut = seed % (len(walk.tokens) + 1)
    rebuilt = compiler.compile(grammar)
    rebuilt.advance(walk.tokens[:cut])
    assert allowed(rebuilt) == walk.masks[cut]


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (regex("[a-c]{3,5}(é|😀)+x?"), "[a-c]{3,5}(é|😀)+x?"),
        (regex("yes|no|maybe"), "yes|no|maybe"),
        (
            Grammar(GrammarKind.LARK, 'start: "<" word ("," word)* ">"\nword: /[a-z]{1,6}/\n'),
            "<[a-z]{1,6}(,[a-z]{1,6})*>",
        ),
    ],
)
def test_regex_and_lark(
    compiler: GrammarCompiler, backend: tokenizers.Tokenizer, grammar: Grammar, pattern: str
) -> None:
    texts = [Walk(compiler.compile(grammar), backend, seed).text for seed in range(20)]
    assert [text for text in texts if re.fullmatch(pattern, text) is None] == []
    assert len(set(texts)) > 1


def test_a_character_may_be_split_over_tokens(compiler: GrammarCompiler, backend: tokenizers.Tokenizer) -> None:
    """Each byte of 😀 is a token of its own here, and within the character there is no way out."""
    state = compiler.compile(regex("😀"))
    tokens = backend.encode("😀").ids
    assert len(tokens) == 4
    for token in tokens:
        assert allowed(state) == [token]
        state.advance([token])
    assert allowed(state) == sorted(EOS)


@pytest.mark.parametrize(
    "grammar",
    [
        schema({"const": "<|user|> and <|end|>"}),
        schema({"type": "string", "pattern": "^(<\\|user\\|>|<\\|end\\|>)+$"}),
        regex(r"<\|user\|>(<\|end\|>)?"),
        Grammar(GrammarKind.LARK, 'start: "<|user|>" "<|end|>"'),
    ],
)
def test_no_special_token_is_ever_text(
    compiler: GrammarCompiler, backend: tokenizers.Tokenizer, grammar: Grammar
) -> None:
    """Text that spells one is said in other tokens; and spelled text ends nothing."""
    special = {backend.token_to_id(name) for name in SPECIAL}
    for seed in range(10):
        walk = Walk(compiler.compile(grammar), backend, seed, max_free=100)
        assert (walk.ended and "<|user|>" in walk.text) or "<|end|>" in walk.text
        assert special.isdisjoint(walk.tokens)
        for before, choices in enumerate(walk.masks):
            assert set(choices) & (special - EOS) == set(), walk.tokens[:before]
    state = compiler.compile(grammar)
    state.advance(backend.encode('"<|user|>').ids)
    with pytest.raises(InvalidRequest, match="cannot go on"):
        allowed(state)


def test_any_text_has_no_special_tokens(compiler: GrammarCompiler) -> None:
    for grammar in (regex(r"(.|\n)*"), Grammar(GrammarKind.LARK, "start: ANY\nANY: /(.|\\n)*/")):
        assert set(range(len(SPECIAL))).intersection(allowed(compiler.compile(grammar))) == EOS


def test_end_tokens_alone_after_the_end(compiler: GrammarCompiler, backend: tokenizers.Tokenizer) -> None:
    state = compiler.compile(regex("ab?"))
    state.advance(backend.encode("a").ids)
    assert set(allowed(state)) > EOS, "may end, or go on"
    state.advance([3, 0, 0, *backend.encode("x").ids])
    assert allowed(state) == sorted(EOS)


def test_any_json_object(compiler: GrammarCompiler, backend: tokenizers.Tokenizer) -> None:
    for seed in range(10):
        walk = Walk(compiler.compile(schema({"type": "object"})), backend, seed, max_free=12)
        assert walk.ended and isinstance(json.loads(walk.text), dict), walk.text


def test_white_space_is_bounded(compiler: GrammarCompiler, backend: tokenizers.Tokenizer) -> None:
    """A model that likes blanks comes to an end all the same."""
    state = compiler.compile(schema({"type": "object", "properties": {"a": {}}, "required": ["a"]}))
    state.advance(backend.encode("{").ids)
    blanks = {token for token, piece in enumerate(_bytes_of(backend)) if piece and not piece.strip()}
    num_bytes = 0
    while choices := blanks.intersection(allowed(state)):
        token = max(choices)
        state.advance([token])
        num_bytes += len(_bytes_of(backend)[token])
    assert 0 < num_bytes <= 17


_REFUSED = {
    "no regex": (regex("(a"), "unclosed group"),
    "look-ahead": (regex("(?=a)b"), "look-around"),
    "lone surrogate": (regex("\ud800"), "surrogates"),
    "no JSON": (Grammar(GrammarKind.JSON_SCHEMA, "{"), "EOF"),
    "no object": (Grammar(GrammarKind.JSON_SCHEMA, "[1]"), "object"),
    "deep JSON": (Grammar(GrammarKind.JSON_SCHEMA, '{"items":' * 900 + "{}" + "}" * 900), "recursion limit"),
    "number out of range": (Grammar(GrammarKind.JSON_SCHEMA, '{"type": "number", "minimum": 1e999}'), "out of range"),
    "unsupported keyword": (schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
    "unsupported, further in": (schema({"properties": {"a": {"not": {}}}}), "not"),
    "lenient by itself": (schema({"not": {}, "x-guidance": {"lenient": True}}), "not"),
    "unknown format": (schema({"type": "string", "format": "zzz"}), "zzz"),
    "from elsewhere": (schema({"$ref": "http://x.y/z"}), "x.y"),
    "itself": (schema({"$ref": "#"}), "refused"),
    "nothing fits": (schema({"type": "integer", "minimum": 5, "maximum": 3}), "minimum"),
    "thousands of properties": (schema({"properties": {f"k{nth:x}": {} for nth in range(4000)}}), "too"),
    "over the size": (regex("a" * (MAX_GRAMMAR_BYTES + 1)), str(MAX_GRAMMAR_BYTES)),
    "no finite text": (Grammar(GrammarKind.LARK, 'start: start "a"'), "refused"),
    "explosion": (schema({"type": "integer", "multipleOf": 99999989, "minimum": 7}), "fuel"),
}


@pytest.mark.parametrize(("grammar", "says"), _REFUSED.values(), ids=_REFUSED)
def test_refused(compiler: GrammarCompiler, grammar: Grammar, says: str) -> None:
    """The bound is in the parser's own units, so that this cannot hang; see the limits."""
    with pytest.raises(InvalidRequest, match=re.escape(says)) as refusal:
        compiler.check(grammar)
    assert len(str(refusal.value)) < 400


def test_a_limit_reached_midway_ends_the_sequence(compiler: GrammarCompiler, backend: tokenizers.Tokenizer) -> None:
    """Sequences of one grammar share a lexer, but none the limits that another met."""
    exploding = regex("b|(a{1,1000}){1,1000}")
    compiler.check(exploding)
    letter, other = backend.encode("a").ids, compiler.compile(exploding)
    state = compiler.compile(exploding)
    with pytest.raises(InvalidRequest, match="too many"):
        for _ in range(1_000):
            assert letter[0] in allowed(state)
            state.advance(letter)
    with pytest.raises(InvalidRequest, match="too many"):
        allowed(state)
    other.advance(backend.encode("b").ids)
    assert allowed(other) == sorted(EOS)


def test_a_token_against_the_grammar_ends_the_sequence(
    compiler: GrammarCompiler, backend: tokenizers.Tokenizer
) -> None:
    state = compiler.compile(regex("abc"))
    state.advance(backend.encode("x").ids)
    with pytest.raises(InvalidRequest, match="cannot go on"):
        allowed(state)


def test_known_grammars_are_bounded(folder: Path, backend: tokenizers.Tokenizer) -> None:
    compiler = GrammarCompiler(folder / "tokenizer.json", VOCAB_SIZE, EOS)
    for nth in range(MAX_KNOWN + 10):
        compiler.check(regex(f"a{nth}"))
    assert compiler.num_known == MAX_KNOWN
    state = compiler.compile(regex("a0"))  # forgotten, and compiled again
    state.advance(backend.encode("a0").ids)
    assert allowed(state) == sorted(EOS)


def test_a_verdict_is_known_either_way(compiler: GrammarCompiler) -> None:
    for grammar, is_refused in ((regex("known"), False), (regex("(known"), True)):
        assert not compiler.knows(grammar)
        for _ in range(2):
            try:
                compiler.check(grammar)
            except InvalidRequest as error:
                assert is_refused and "unclosed group" in str(error)
            else:
                assert not is_refused
            assert compiler.knows(grammar)


def test_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"tokenizer\.json.*convert"):
        GrammarCompiler(tmp_path / "tokenizer.json", VOCAB_SIZE, EOS).check(regex("a"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidRequest, match=r"cannot use the model's tokenizer\.json"):
        GrammarCompiler(tmp_path / "tokenizer.json", VOCAB_SIZE, EOS).check(regex("a"))


def test_without_an_end_token(folder: Path) -> None:
    with pytest.raises(InvalidRequest, match="eos_token_id"):
        GrammarCompiler(folder / "tokenizer.json", VOCAB_SIZE, frozenset({VOCAB_SIZE})).check(regex("a"))
