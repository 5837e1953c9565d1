"""The quick ways to what transformers says, against the slow one: a prompt at a time, a token at a time."""

from __future__ import annotations

import pytest

from tests.support.checkpoints import confirmed, decided, greedy, greedy_each, ragged_prompts

NUM_TOKENS = 16
PROMPTS = tuple(map(tuple, ragged_prompts(4, longest=40)))


@pytest.mark.parametrize("family", ["llama", "deepseek-v32"])
def test_many_prompts_at_once(family: str) -> None:
    expected = [greedy(family, prompt, NUM_TOKENS) for prompt in PROMPTS]
    assert greedy_each(family, PROMPTS, NUM_TOKENS) == expected
    tokens = dict(zip(PROMPTS, expected, strict=True))
    assert all(run.tokens == tokens[tuple(run.prompt)] for run in decided(family, PROMPTS, 2, NUM_TOKENS))


@pytest.mark.parametrize("wrong", [0, 7, NUM_TOKENS - 1])
def test_a_wrong_guess_changes_nothing(wrong: int) -> None:
    right = greedy("llama", PROMPTS[1], NUM_TOKENS)
    guess = [*right[:wrong], right[wrong] ^ 1, *right[wrong + 1 :]]
    assert confirmed("llama", PROMPTS[1], guess) == confirmed("llama", PROMPTS[1], right) == right
