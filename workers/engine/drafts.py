"""Rows that carry guesses of what comes next beside their last known token, and what a step makes of them.

A sequence has one such row at a time: how many of its guesses stand is known when the step is settled, and nothing can
be planned for it before. Guesses take what the budget leaves and no block: they are written behind the known tokens
into blocks that the sequence has, and what proves wrong is written over. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from cluster.request import FinishReason
from workers.engine.plan_builder import PlanBuilder
from workers.engine.sequence import Sequence
from workers.engine.step_plan import ScheduledSequence, StepOutcome
from workers.speculative.proposer import Proposer
from workers.speculative.verify import standing


class Drafts:
    """Of one shard. Without a proposer there are none."""

    def __init__(self, proposer: Proposer | None, eos_token_ids: frozenset[int]) -> None:
        self._proposer = proposer
        self._eos_token_ids = eos_token_ids

    def add(self, batch: PlanBuilder) -> None:
        """To the rows of a plan that compute the last known token of their sequence and nothing else."""
        if self._proposer is None:
            return
        for seq, num_tokens in list(batch.rows.values()):
            if batch.budget <= 0:
                return
            known = len(seq.tokens)
            if num_tokens == 1 and seq.num_computed == known - 1 and seq.params.takes_drafts:
                room = min(batch.budget, seq.capacity - known, seq.max_total_tokens - known - 1)
                if room > 0 and (drafts := self._proposer.propose(seq.id, seq.tokens, room)):
                    batch.draft(seq, drafts)

    def settle(
        self, seq: Sequence, row: ScheduledSequence, drawn: SequenceOf[int], outcome: StepOutcome
    ) -> FinishReason | None:
        """Takes the tokens that stand, up to the one that ends the sequence; says whether and why one does."""
        assert self._proposer is not None and row.num_drafts
        tokens = standing(row.drafts, drawn)
        outcome.num_drafted_rows += 1
        outcome.num_drafts += row.num_drafts
        outcome.num_accepted_drafts += len(tokens) - 1
        seq.num_pending -= len(drawn)
        finish = None
        for token in tokens:
            finish = seq.accept(token, self._eos_token_ids)
            outcome.drew(seq, token, finish)
            if finish is not None:
                break
        self._proposer.judged(seq.id, row.num_drafts, len(tokens) - 1, len(seq.tokens))
        return finish

    def forget(self, seq: Sequence) -> None:
        """It has ended."""
        if self._proposer is not None:
            self._proposer.forget(seq.id)
