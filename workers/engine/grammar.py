"""Grammars over a checkpoint's vocabulary: what may come next, from llguidance's incremental parser.

Every limit is in llguidance's own units (fuel, items, states) and not in seconds, so that the front door, a worker and
a replay elsewhere agree on what is too large. A grammar that passes `check` may still run into a limit after some
tokens: `fill` then raises, which ends that sequence and no other.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import llguidance
import numpy as np
import numpy.typing as npt

from cluster.errors import InvalidRequest
from cluster.request import Grammar, GrammarKind

TOKENIZER_FILE = "tokenizer.json"  # of a checkpoint
MAX_GRAMMAR_BYTES = 65_536
MAX_KNOWN = 256  # as many may be open on a worker; from 0.1 to 2 MB each
# One space, or a new line and its indentation. Unbounded white space lets a model fill its context with it.
JSON_WHITESPACE = r"[ ]|\n[ ]{0,16}"
_WORD_BITS = 32


def _limits() -> llguidance.LLParserLimits:
    """Tenths of a second to compile, tens of milliseconds a step.

    The time to compile grows with the square of the grammar's size; an object has about 7 symbols per property, and
    4 items in a row, so that these two limits meet at about 900 properties.
    """
    return llguidance.LLParserLimits(
        initial_lexer_fuel=200_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_items_in_row=4_000,
        max_lexer_states=50_000,
        max_grammar_size=6_000,
        verbose_errors=False,  # their text holds the grammar, which is the client's
    )


class GrammarState:
    """A Constraint. `fill` raises InvalidRequest once the grammar has run into a limit, or was given a wrong token.

    Copies of a matcher share its lexer, and with it what other sequences have used of the limits. So the first error
    is tried again on a matcher of its own.
    """

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        fresh: Callable[[], llguidance.LLMatcher],
        eos_token_ids: frozenset[int],
        vocab_size: int,
    ) -> None:
        self._matcher = matcher
        self._fresh: Callable[[], llguidance.LLMatcher] | None = fresh  # None: used
        self._eos = eos_token_ids
        self._vocab_size = vocab_size
        self._tokens: list[int] = []
        self._ended = False

    def advance(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._ended = self._ended or token in self._eos
            if self._ended:
                return
            self._tokens.append(token)
            self._matcher.consume_token(token)

    def fill(self, mask: npt.NDArray[np.uint32]) -> None:
        num_words = -(-self._vocab_size // _WORD_BITS)
        mask[:] = 0
        if not self._ended:
            allowed = np.frombuffer(self._allowed(), dtype=np.uint32)[:num_words]
            mask[: len(allowed)] = allowed
        if past := self._vocab_size % _WORD_BITS:
            mask[num_words - 1] &= np.uint32((1 << past) - 1)
        if not mask.any():
            for token in self._eos:
                mask[token // _WORD_BITS] |= np.uint32(1 << token % _WORD_BITS)

    def _allowed(self) -> bytes:
        allowed = self._matcher.compute_bitmask()
        if (error := self._matcher.get_error()) and self._fresh is not None:
            self._matcher, self._fresh = self._fresh(), None
            self._matcher.consume_tokens(self._tokens)
            allowed = self._matcher.compute_bitmask()
            error = self._matcher.get_error()
        if error:
            raise InvalidRequest(f"the grammar cannot go on: {_one_line(error)}; simplify it")
        return allowed


class GrammarCompiler:
    """A ConstraintCompiler. Any thread; the vocabulary is read at the first grammar, which takes up to a second.

    `vocab_size` is the model's. Where the tokenizer has fewer tokens the rest is never allowed.
    """

    def __init__(self, tokenizer_file: Path, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._file = tokenizer_file
        self._vocab_size = vocab_size
        self._eos = frozenset(token for token in eos_token_ids if token < vocab_size)
        self._lock = threading.Lock()  # of the verdicts; held for a look only
        self._reading = threading.Lock()  # of the vocabulary; held for as long as that takes
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._verdicts: OrderedDict[Grammar, llguidance.LLMatcher | str] = OrderedDict()  # str: why it is refused

    @property
    def num_known(self) -> int:
        return len(self._verdicts)

    def knows(self, grammar: Grammar) -> bool:
        with self._lock:
            return grammar in self._verdicts

    def check(self, grammar: Grammar) -> None:
        self._matcher(grammar)

    def compile(self, grammar: Grammar) -> GrammarState:
        matcher = self._matcher(grammar).deep_copy()
        return GrammarState(matcher, partial(self._renew, grammar), self._eos, self._vocab_size)

    def _renew(self, grammar: Grammar) -> llguidance.LLMatcher:
        """One that shares nothing; later sequences do not get the worn one, either."""
        with self._lock:
            self._verdicts.pop(grammar, None)
        return self._compile(grammar)

    def _matcher(self, grammar: Grammar) -> llguidance.LLMatcher:
        """At the start of the text, never advanced. Two threads may compile the same; nobody waits for another's."""
        with self._lock:
            verdict = self._verdicts.get(grammar)
            if verdict is not None:
                self._verdicts.move_to_end(grammar)
        if verdict is None:
            try:
                verdict = self._compile(grammar)
            except InvalidRequest as error:
                verdict = str(error)
            with self._lock:
                verdict = self._verdicts.setdefault(grammar, verdict)
                self._verdicts.move_to_end(grammar)
                if len(self._verdicts) > MAX_KNOWN:
                    self._verdicts.popitem(last=False)
        if isinstance(verdict, str):
            raise InvalidRequest(verdict)
        return verdict

    def _compile(self, grammar: Grammar) -> llguidance.LLMatcher:
        size = len(grammar.text.encode("utf-8", "surrogatepass"))
        if size > MAX_GRAMMAR_BYTES:
            raise InvalidRequest(f"the grammar has {size} bytes, over the limit of {MAX_GRAMMAR_BYTES}; simplify it")
        try:
            source = _source(grammar)
        except (ValueError, UnicodeEncodeError) as error:
            raise InvalidRequest(f"the {_noun(grammar)} cannot be read: {error}; correct it") from None
        matcher = llguidance.LLMatcher(self._vocabulary(), source, log_level=0, limits=_limits())
        probe = matcher.deep_copy()
        probe.compute_bitmask()  # finds what has no finite text at all, and what explodes at once
        if error := matcher.get_error() or probe.get_error():
            raise InvalidRequest(f"the {_noun(grammar)} is refused: {_one_line(error)}; simplify or correct it")
        return matcher

    def _vocabulary(self) -> llguidance.LLTokenizer:
        with self._reading:
            if self._tokenizer is None:
                self._tokenizer = self._read()
            return self._tokenizer

    def _read(self) -> llguidance.LLTokenizer:
        if not self._eos:
            raise InvalidRequest("the model has no end token for a grammar to end with; set eos_token_id in its config")
        try:
            text = self._file.read_text("utf-8")
        except OSError as error:
            raise InvalidRequest(
                f"grammars need the model's {self._file.name}, which cannot be read ({error.strerror}); convert its "
                "tokenizer to that format"
            ) from None
        eos = sorted(self._eos)
        try:
            tokenizer = llguidance.LLTokenizer(text, eos_token=eos)
            if tokenizer.vocab_size < self._vocab_size:
                tokenizer = llguidance.LLTokenizer(text, n_vocab=self._vocab_size, eos_token=eos)
        except ValueError as error:
            raise InvalidRequest(f"grammars cannot use the model's {self._file.name}: {error}; save it again") from None
        return tokenizer


def _source(grammar: Grammar) -> str:
    """In llguidance's own format. Raises ValueError for what is no JSON.

    All of them as Lark, because it alone takes `no_forcing`: the text that must come next would be allowed as the
    tokenizer cuts it, which makes a special token of a text that spells one, and that token breaks the grammar.
    """
    matcher = llguidance.LLMatcher
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            compiled = matcher.grammar_from_json_schema(
                grammar.text,
                overrides={"whitespace_pattern": JSON_WHITESPACE, "lenient": False, "coerce_one_of": False},
            )
            text = f"start: %json {json.dumps(json.loads(compiled)['grammars'][0]['json_schema'])}"
        case GrammarKind.REGEX:
            text = json.loads(matcher.grammar_from_regex(grammar.text))["grammars"][0]["lark_grammar"]
        case GrammarKind.LARK:
            text = grammar.text
    return matcher.grammar_from_lark('%llguidance {"no_forcing": true}\n' + text)


def _noun(grammar: Grammar) -> str:
    return {GrammarKind.JSON_SCHEMA: "schema", GrammarKind.REGEX: "regex", GrammarKind.LARK: "grammar"}[grammar.kind]


def _one_line(error: str) -> str:
    """On one line and bounded: parts of what the client sent stand in it."""
    return " ".join(error.replace("<non-verbose/>", "").split())[:200]
