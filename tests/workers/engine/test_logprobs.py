from __future__ import annotations

import torch
from torch import Tensor

from workers.engine.logprobs import DrawnRows, hidden_logprobs, token_logprobs


def test_they_are_those_of_the_raw_distribution_in_float32() -> None:
    logits = (torch.randn(6, 50) * 5).to(torch.bfloat16)
    tokens = torch.tensor([0, 49, 7, 7, 3, 20])
    expected = logits.float().log_softmax(-1)
    found = token_logprobs(logits, tokens, 4).collect()
    for row, token, entry in zip(expected, tokens.tolist(), found, strict=True):
        assert abs(entry.logprob - float(row[token])) < 1e-5
        best = row.topk(4)
        assert [token for token, _ in entry.top] == best.indices.tolist()
        torch.testing.assert_close(torch.tensor([value for _, value in entry.top]), best.values)
    assert [entry.top for entry in token_logprobs(logits, tokens, 0).collect()] == [()] * 6
    assert len(token_logprobs(logits, tokens, 1000).collect()[0].top) == 50


def test_rows_that_want_different_numbers_say_what_they_say_alone() -> None:
    logits = torch.randn(5, 30)
    tokens = torch.arange(5)
    wanted = [2, -1, 0, 7, 2]
    kept = DrawnRows.keep(logits, wanted)
    expected = {
        row: token_logprobs(logits[[row]], tokens[[row]], k).collect()[0] for row, k in enumerate(wanted) if k >= 0
    }
    logits.fill_(torch.nan)  # what happens to the logits while tokens are drawn does not matter
    found = {row: entry for rows in kept for row, entry in zip(rows.rows, rows.of(tokens).collect(), strict=True)}
    assert found == expected


def test_many_positions_never_have_all_their_logits_at_once() -> None:
    vocab_size, num_rows = 50_000, 300
    head, hidden = torch.randn(4, vocab_size), torch.randn(num_rows, 4)
    heights: list[int] = []

    def logits(states: Tensor) -> Tensor:
        heights.append(len(states))
        return states @ head

    targets = list(range(num_rows))
    entries = hidden_logprobs(hidden, logits, targets, 2).collect()
    assert sum(heights) == num_rows
    assert max(heights) * vocab_size <= 1 << 22
    expected = (hidden @ head).log_softmax(-1)
    torch.testing.assert_close(
        torch.tensor([entry.logprob for entry in entries]), expected[range(num_rows), targets], atol=1e-4, rtol=0
    )
    assert [entry.top[0][0] for entry in entries] == expected.argmax(-1).tolist()
