"""Shapes of encoder–decoder models, what their steps compute and read at least, and requests to draw of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

T5: dict[str, object] = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "is_encoder_decoder": True,
    "vocab_size": 32128,
    "d_model": 1024,
    "d_kv": 64,
    "d_ff": 4096,
    "num_layers": 24,
    "num_heads": 16,
    "relative_attention_num_buckets": 32,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
BART: dict[str, object] = {
    "architectures": ["BartForConditionalGeneration"],
    "model_type": "bart",
    "is_encoder_decoder": True,
    "activation_function": "gelu",
    "vocab_size": 50264,
    "d_model": 1024,
    "encoder_layers": 12,
    "decoder_layers": 12,
    "encoder_attention_heads": 16,
    "decoder_attention_heads": 16,
    "encoder_ffn_dim": 4096,
    "decoder_ffn_dim": 4096,
    "max_position_embeddings": 1024,
    "scale_embedding": False,
    "decoder_start_token_id": 2,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
TINY: dict[str, dict[str, object]] = {
    "t5-large": {"vocab_size": 512, "d_model": 128, "d_ff": 128, "num_layers": 2, "num_heads": 2},
    "bart-large": {
        "vocab_size": 512,
        "d_model": 128,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128,
    },
}


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    config: dict[str, object]
    d: int
    inner: int  # of attention
    feed_forward: int
    encoder_layers: int
    decoder_layers: int
    vocab_size: int

    @classmethod
    def named(cls, name: str, *, tiny: bool) -> Shape:
        config = (T5 if name == "t5-large" else BART) | (TINY[name] if tiny else {})
        is_t5 = name == "t5-large"

        def number(key: str) -> int:
            return int(str(config[key]))

        d = number("d_model")
        return cls(
            name=name,
            config=config,
            d=d,
            inner=number("num_heads") * number("d_kv") if is_t5 else d,
            feed_forward=number("d_ff" if is_t5 else "encoder_ffn_dim"),
            encoder_layers=number("num_layers" if is_t5 else "encoder_layers"),
            decoder_layers=number("num_layers" if is_t5 else "decoder_layers"),
            vocab_size=number("vocab_size"),
        )

    def encoder_flops(self, lens: Sequence[int]) -> float:
        matrices = 2.0 * self.encoder_layers * (4 * self.d * self.inner + 2 * self.d * self.feed_forward)
        return matrices * sum(lens) + 4.0 * self.encoder_layers * self.inner * sum(length**2 for length in lens)

    def context_flops(self, sources: Sequence[int], prompts: Sequence[int]) -> float:
        """Keys and values of what the encoder made, the prompts, and the head of their last tokens."""
        layer = 6 * self.d * self.inner + 2 * self.d * self.feed_forward
        pairs = sum(n * (n + 1) / 2 + n * source for n, source in zip(prompts, sources, strict=True))
        layers = 2.0 * layer * sum(prompts) + 4.0 * self.d * self.inner * sum(sources) + 4.0 * self.inner * pairs
        return self.decoder_layers * layers + 2.0 * self.d * self.vocab_size * len(prompts)

    def hop_bytes(self, sources: Sequence[int], context: float) -> float:
        """What one step of single tokens reads."""
        layer = 6 * self.d * self.inner + 2 * self.d * self.feed_forward
        cached = 2 * self.inner * (sum(sources) + context * len(sources))
        return 2.0 * (self.decoder_layers * (layer + cached) + self.d * self.vocab_size)


@dataclass(frozen=True, slots=True)
class Workload:
    sources: list[list[int]]
    prompts: list[list[int]]

    @classmethod
    def draw(cls, count: int, vocab_size: int, *, longest: int, longest_prompt: int) -> Workload:
        draw = random.Random(0)

        def ids(length: int) -> list[int]:
            return [draw.randrange(3, vocab_size) for _ in range(length)]

        sources = [ids(draw.randint(longest // 8, longest)) for _ in range(count)]
        return cls(sources, [ids(draw.randint(longest_prompt // 8, longest_prompt)) for _ in range(count)])

    @property
    def source_lens(self) -> list[int]:
        return [len(tokens) for tokens in self.sources]

    @property
    def prompt_lens(self) -> list[int]:
        return [len(tokens) for tokens in self.prompts]
