"""Text to token ids and back, for one model: what the checkpoint's directory says. Encoding leaves the event loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec

from cluster.errors import CheckpointError
from cluster.request import Grammar
from deploy.chat_template import ChatPrompt, render
from deploy.openai_requests import ChatRequest
from deploy.structured_output import grammar_of, wants_form
from deploy.token_texts import TokenTexts
from deploy.tool_format import ToolFormat, tool_format_of
from workers.engine.grammar import TOKENIZER_FILE, GrammarCompiler

if TYPE_CHECKING:
    import tokenizers
    from transformers.models.auto.tokenization_auto import AutoTokenizer
    from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

P = ParamSpec("P")

# Any of these makes a directory one with a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")  # before and since transformers 5
_THREADS = 2  # the library drops the GIL while it encodes


class Tokenizer:
    """`encode` and `encode_chat` from any event loop; `backend` is safe to read from any thread."""

    def __init__(self, fast: PreTrainedTokenizerFast, directory: Path) -> None:
        self._fast = fast
        self._directory = directory
        self._grammars: GrammarCompiler | None = None
        self.backend: tokenizers.Tokenizer = fast.backend_tokenizer
        self.backend.no_truncation()  # a prompt is never cut silently
        self.backend.no_padding()
        self.texts = TokenTexts(self.backend)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="sluice-tokenize")
        self._compiling = ThreadPoolExecutor(_THREADS, thread_name_prefix="sluice-grammar")  # not in the others' way

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer | None:
        """None if the directory has no tokenizer: prompts are token ids then. Takes seconds; raises CheckpointError."""
        path = Path(directory)
        if not any((path / name).is_file() for name in TOKENIZER_FILES):
            return None
        try:
            fast = _loader(path).from_pretrained(str(path), local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: the tokenizer cannot be read: {error}; save it again") from error
        if getattr(fast, "backend_tokenizer", None) is None:
            raise CheckpointError(f"{path}: {type(fast).__name__} is no fast tokenizer; convert it to tokenizer.json")
        return cls(fast, path)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._fast.chat_template)

    @cached_property
    def tool_format(self) -> ToolFormat:
        """How the model writes its calls of tools, as far as its chat template tells."""
        template = self._fast.chat_template
        found = tool_format_of(template if isinstance(template, str) else None)
        return found.over(self.backend.get_added_tokens_decoder())

    @cached_property
    def calls_are_special(self) -> bool:
        """Whether special tokens mark a call, which text without them would not show."""
        added = self.backend.get_added_tokens_decoder()
        return any(added[number].special for _, number in self.tool_format.tokens)

    def grammars(self, vocab_size: int, eos_token_ids: frozenset[int]) -> GrammarCompiler:
        """Of the one model that it serves; made once, and filled at the first use."""
        if self._grammars is None:
            self._grammars = GrammarCompiler(self._directory / TOKENIZER_FILE, vocab_size, eos_token_ids)
        return self._grammars

    async def grammar_of(self, body: ChatRequest, vocab_size: int, eos_token_ids: frozenset[int]) -> Grammar | None:
        """As structured_output's. Text that needs none waits for nobody's. Raises InvalidRequest."""
        if not wants_form(body):
            return None
        compiler = self.grammars(vocab_size, eos_token_ids)
        call = partial(grammar_of, body, self.tool_format, compiler)
        return await asyncio.get_running_loop().run_in_executor(self._compiling, call)

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """With the special tokens that the model puts around a text, unless they are not wanted."""
        return await self._run(self._encode, text, add_special_tokens)

    async def encode_chat(self, prompt: ChatPrompt) -> list[int]:
        """The chat template applied, up to where the assistant's answer begins. Raises InvalidRequest."""
        return await self._run(self._encode_chat, prompt)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def close(self) -> None:
        for threads in (self._threads, self._compiling):
            threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, call: Callable[P, list[int]], *args: P.args, **kwargs: P.kwargs) -> list[int]:
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(call, *args, **kwargs))

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def _encode_chat(self, prompt: ChatPrompt) -> list[int]:
        return self._encode(render(self._fast, prompt), False)  # the template writes the special tokens itself


def _loader(path: Path) -> type[AutoTokenizer] | type[PreTrainedTokenizerFast]:
    """The plain class where the checkpoint names it; any other is looked up, which imports torch."""
    settings = path / "tokenizer_config.json"
    named = json.loads(settings.read_text()).get("tokenizer_class") if settings.is_file() else None
    if named in _PLAIN_CLASSES and (path / "tokenizer.json").is_file():
        from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    return AutoTokenizer
