"""What one shard can take on, and the refusal of what it never could."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from cluster.errors import InvalidRequest, RequestTooLong
from cluster.request import Pooling
from workers.engine.block_manager import GroupCapacity
from workers.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    max_batched_tokens: int  # per step, all sequences
    max_sequences: int  # rows per step
    max_model_len: int  # tokens of a sequence, the last sampled one included
    prefill_reserve: float  # share of every group that reservations of pulls leave alone
    chunk_tokens: int  # known input of one sequence per step
    vocab_size: int | None = None  # token ids of requests are below it; None: not checked
    max_encoder_tokens: int = 0  # read by the encoder per step, and so in one input; 0: the model has no encoder
    max_source_tokens: int | None = None  # of one input, as far as the model's positions go; None: no end

    def __post_init__(self) -> None:
        if min(self.max_batched_tokens, self.max_sequences, self.chunk_tokens) < 1 or self.max_model_len < 2:
            raise ValueError(f"{self}: limits must be positive, max_model_len at least 2")
        if self.max_sequences > self.max_batched_tokens:
            raise ValueError(f"{self}: every running sequence needs a token per step; lower max_sequences")
        if not 0.0 <= self.prefill_reserve < 1.0:
            raise ValueError(f"prefill_reserve={self.prefill_reserve} must be at least 0 and under 1")

    def max_total_tokens(self, seq: Sequence) -> int:
        """Length at which the sequence ends with LENGTH, over all attempts."""
        if seq.stop_after_first or seq.only_encodes or seq.params.pooling is not None:
            return len(seq.tokens) + 1
        return min(seq.num_prompt + seq.params.max_tokens, self.max_model_len)

    def last_position(self, seq: Sequence) -> int:
        """Of the token with which its length ends it, whoever draws it."""
        return min(seq.num_prompt + seq.params.max_tokens, self.max_model_len) - 1

    def chunk(self, seq: Sequence, budget: int, block_size: int) -> int:
        """Tokens of its next chunk. One that is not the last ends with a full block where it can."""
        remaining = len(seq.tokens) - seq.num_computed
        num_tokens = min(remaining, self.chunk_tokens, budget)
        if num_tokens < remaining:
            over = (seq.num_computed + num_tokens) % block_size
            if over < num_tokens:
                num_tokens -= over
        return num_tokens

    def max_pull_blocks(self, group: GroupCapacity) -> int:
        """What all waiting reservations together may hold of a group."""
        return int((1.0 - self.prefill_reserve) * group.num_blocks + 1e-9)

    def check(self, seq: Sequence, groups: SequenceOf[GroupCapacity]) -> None:
        """Raises for a sequence that could never finish here, however empty the pool: it would starve unseen."""
        self._check_encoder_input(seq, groups)
        if seq.only_encodes:
            self._check_tokens(seq)
            self._check_pool(seq, groups, 0, None)
            return
        self._check_beams(seq)
        assert len(seq.extents) in (0, len(groups)), f"{seq}: extents {seq.extents} for {len(groups)} groups"
        growing = [group for index, group in enumerate(groups) if seq.grows(index)]
        assert growing and all(g.block_size == groups[0].block_size for g in growing), f"{seq}: growing groups differ"
        if not 0 < seq.num_prompt <= len(seq.tokens):
            raise InvalidRequest(f"{seq.num_prompt} prompt tokens; send at least one", "prompt")
        if seq.num_emitted >= seq.params.max_tokens:
            raise InvalidRequest(
                f"max_tokens={seq.params.max_tokens} with {seq.num_emitted} tokens emitted already; raise it",
                "max_tokens",
            )
        if seq.params.pooling is Pooling.STATES:
            raise InvalidRequest(
                "all hidden states are told of an encoder's input alone; the model has no encoder", "prompt"
            )
        if seq.params.pooling is not None and seq.num_emitted:
            raise InvalidRequest(f"{seq.num_emitted} emitted tokens: an embedding is of a prompt alone", "prompt")
        self._check_tokens(seq)
        num_new = 0 if seq.params.pooling is not None else 1
        if len(seq.tokens) + num_new > self.max_model_len:
            raise RequestTooLong(
                f"{len(seq.tokens)} tokens and {num_new} new are over max_model_len={self.max_model_len}; "
                "shorten the prompt",
                "prompt",
            )
        # The last token is emitted without KV of its own.
        self._check_pool(seq, groups, self.max_total_tokens(seq) - 1, None)

    def _check_beams(self, seq: Sequence) -> None:
        if seq.params.beams is None:
            return
        unfit = seq.params.unfit_for_beams
        if unfit is not None:
            raise InvalidRequest(f"num_beams: a search goes without {unfit}; remove one of them", unfit)
        if seq.num_emitted or seq.stop_after_first:
            raise InvalidRequest("num_beams: a search begins behind the prompt, and nowhere else", "num_beams")
        if seq.num_rows > self.max_sequences:
            raise InvalidRequest(
                f"num_beams={seq.num_rows} is over the max_sequences={self.max_sequences} of this worker; lower it",
                "num_beams",
            )

    def _check_encoder_input(self, seq: Sequence, groups: SequenceOf[GroupCapacity]) -> None:
        """Its blocks are `_check_pool`'s to check."""
        if seq.encoder_input is None:
            if self.max_encoder_tokens and not seq.extents:
                raise InvalidRequest("this model reads an encoder input, and none is given; send one", "prompt")
            return
        if not self.max_encoder_tokens or not any(group.is_fixed for group in groups):
            raise InvalidRequest("this model has no encoder; leave the encoder input out", "prompt")
        length = len(seq.encoder_input.tokens)
        if length == 0:
            raise InvalidRequest("the encoder input is empty; send at least one token", "prompt")
        if self.max_source_tokens is not None and length > self.max_source_tokens:
            raise RequestTooLong(
                f"{length} tokens of encoder input are over the model's {self.max_source_tokens}; shorten it", "prompt"
            )
        if length > self.max_encoder_tokens:
            raise RequestTooLong(
                f"{length} tokens of encoder input are over max_encoder_tokens={self.max_encoder_tokens}: an input is "
                "read in one piece; shorten it",
                "prompt",
            )

    def _check_tokens(self, seq: Sequence) -> None:
        """A token id that the model does not have would fail the step of everybody in it."""
        params = seq.params
        if not all(params.bad_words):
            raise InvalidRequest("a bad word has no tokens; leave it out", "bad_words")
        if self.vocab_size is None:
            return
        for name, token_ids in (
            ("prompt", seq.tokens),
            ("prompt", () if seq.encoder_input is None else seq.encoder_input.tokens),
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", [token for token, _ in params.logit_bias]),
            ("bad_words", [token for word in params.bad_words for token in word]),
        ):
            if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self.vocab_size:
                wrong = next(token for token in token_ids if not 0 <= token < self.vocab_size)
                raise InvalidRequest(f"token id {wrong}: the model has {self.vocab_size}, from 0 on", name)

    def check_output_pull(self, seq: Sequence, groups: SequenceOf[GroupCapacity]) -> None:
        """As `check_pull`, for the output of its encoder alone."""
        self._check_pool(seq, groups, 0, self.prefill_reserve)

    def check_pull(self, seq: Sequence, groups: SequenceOf[GroupCapacity]) -> None:
        """Raises RequestTooLong if reservations of pulls may never hold that much: compute it locally instead."""
        self._check_pool(seq, groups, len(seq.tokens), self.prefill_reserve)

    def _check_pool(
        self, seq: Sequence, groups: SequenceOf[GroupCapacity], num_tokens: int, reserve: float | None
    ) -> None:
        for index, group in enumerate(groups):
            extent = seq.extents[index] if seq.extents else None
            tokens = num_tokens if extent is None else extent
            needed = -(-tokens // group.block_size)
            if seq.num_rows > 1 and extent is None and reserve is None:
                full, rest = divmod(len(seq.tokens), group.block_size)  # of the prompt: the beams share full blocks
                needed = full + bool(rest) + seq.num_rows * (needed - full)
            have = group.num_blocks if reserve is None else self.max_pull_blocks(group)
            if needed > have:
                where = (
                    f"{have} blocks" if reserve is None else f"the {have} blocks that prefill_reserve={reserve} leaves"
                )
                raise RequestTooLong(
                    f"{tokens} tokens need {needed} blocks of group {group.name}, over {where} of this worker; "
                    "shorten the prompt, lower max_tokens, or give the worker more KV memory",
                    "max_tokens",
                )
