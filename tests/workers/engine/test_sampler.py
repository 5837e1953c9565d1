from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cluster.request import SamplingParams
from tests.support import plain_sampler
from workers.engine import sampler
from workers.engine.philox import gumbel, philox, philox_scalar
from workers.engine.sampler import Draws, token_noise

# From Random123's kat_vectors, "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
WORD = st.integers(0, 0xFFFFFFFF)


def draws(
    n: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    sample_index: int = 0,
    first_position: int = 0,
    min_p: float = 0.0,
) -> Draws:
    return Draws(
        temperature=np.full(n, temperature, np.float32),
        top_k=np.full(n, top_k, np.int64),
        top_p=np.full(n, top_p, np.float32),
        min_p=np.full(n, min_p, np.float32),
        seed=np.full(n, seed, np.uint64),
        sample=np.full(n, sample_index, np.int64),
        position=np.arange(first_position, first_position + n, dtype=np.int64),
    )


def sample(logits: Tensor, values: Draws) -> Tensor:
    drawn = sampler.sample(logits, values)
    assert drawn.is_valid.all()
    return drawn.tokens


def pick(values: Draws, rows: list[int]) -> Draws:
    return Draws(
        temperature=values.temperature[rows],
        top_k=values.top_k[rows],
        top_p=values.top_p[rows],
        min_p=values.min_p[rows],
        seed=values.seed[rows],
        sample=values.sample[rows],
        position=values.position[rows],
    )


def one(word: int) -> Tensor:
    return torch.tensor([word])


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    assert philox_scalar(counter, key) == expected
    words = philox((one(counter[0]), one(counter[1]), one(counter[2]), one(counter[3])), (one(key[0]), one(key[1])))
    assert tuple(int(word) for word in words) == expected


@given(counter=st.tuples(WORD, WORD, WORD, WORD), key=st.tuples(WORD, WORD))
def test_philox_equals_the_scalar_reference(counter: tuple[int, int, int, int], key: tuple[int, int]) -> None:
    words = philox((one(counter[0]), one(counter[1]), one(counter[2]), one(counter[3])), (one(key[0]), one(key[1])))
    assert tuple(int(word) for word in words) == philox_scalar(counter, key)


def test_the_noise_of_a_token_is_the_documented_word() -> None:
    seed = 0x0123_4567_89AB_CDEF
    noise = token_noise(11, np.array([seed], np.uint64), np.array([3]), np.array([70_000]), device=torch.device("cpu"))
    key = (seed & 0xFFFFFFFF, seed >> 32)
    words = [philox_scalar((token // 4, 70_000, 3, 0), key)[token % 4] for token in range(11)]
    assert torch.equal(noise[0], gumbel(torch.tensor(words)))


def test_gumbel_is_finite_at_the_ends_and_close_to_the_double_precision_formula() -> None:
    words = torch.tensor([0, 1, 2**16, 2**31, 2**32 - 2**16, 2**32 - 1])
    noise = gumbel(words)
    assert noise.isfinite().all()
    exact = [-math.log(-math.log1p(-(int(word) + 0.5) * 2.0**-32)) for word in words[:-1]]
    assert torch.allclose(noise[:-1], torch.tensor(exact), atol=1e-5)
    assert (noise.diff() < 0).all()  # larger words lose


@given(
    n=st.integers(1, 9),
    vocabulary=st.integers(1, 70),
    data=st.data(),
    seed=st.integers(0, 2**64 - 1),
    temperatures=st.lists(st.sampled_from([0.0, 0.3, 1.0, 2.0]), min_size=9, max_size=9),
    top_ks=st.lists(st.sampled_from([0, 1, 3, 1000]), min_size=9, max_size=9),
    top_ps=st.lists(st.sampled_from([0.0, 0.05, 0.5, 0.9, 1.0]), min_size=9, max_size=9),
    min_ps=st.lists(st.sampled_from([0.0, 0.05, 0.5, 1.0]), min_size=9, max_size=9),
)
def test_a_row_draws_the_same_token_alone_and_in_any_batch(
    n: int,
    vocabulary: int,
    data: st.DataObject,
    seed: int,
    temperatures: list[float],
    top_ks: list[int],
    top_ps: list[float],
    min_ps: list[float],
) -> None:
    logits = torch.randn(n, vocabulary, generator=torch.Generator().manual_seed(seed % 2**32)) * 3
    values = Draws(
        temperature=np.array(temperatures[:n], np.float32),
        top_k=np.array(top_ks[:n], np.int64),
        top_p=np.array(top_ps[:n], np.float32),
        min_p=np.array(min_ps[:n], np.float32),
        seed=np.array([(seed + 7 * i) % 2**64 for i in range(n)], np.uint64),
        sample=np.arange(n, dtype=np.int64) % 3,
        position=np.arange(n, dtype=np.int64) * 1000,
    )
    together = sample(logits.clone(), values).tolist()
    rows = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n, unique=True))
    assert sample(logits[rows].clone(), pick(values, rows)).tolist() == [together[row] for row in rows]
    assert [int(sample(logits[[i]].clone(), pick(values, [i]))) for i in range(n)] == together


def test_greedy_takes_the_largest_and_the_lowest_of_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]])
    assert sample(logits, draws(2, temperature=0.0)).tolist() == [1, 0]


def test_draws_follow_the_softmax_of_logits_over_temperature() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    n = 20_000
    tokens = sample(logits.repeat(n, 1), draws(n, temperature=0.7, seed=11))
    shares = torch.bincount(tokens, minlength=5) / n
    expected = (logits / 0.7).softmax(-1)
    bound = 4.5 * (expected * (1 - expected) / n).sqrt()  # 4.5 standard deviations; the seed is fixed
    assert ((shares - expected).abs() < bound).all(), (shares, expected)


@pytest.mark.parametrize(("seed", "sample_index", "position"), [(1, 0, 0), (1 << 40, 0, 0), (0, 1, 0), (0, 0, 500)])
def test_every_part_of_the_key_matters(seed: int, sample_index: int, position: int) -> None:
    logits = torch.zeros(200, 64)
    base = sample(logits.clone(), draws(200))
    other = sample(logits.clone(), draws(200, seed=seed, sample_index=sample_index, first_position=position))
    assert (base == other).float().mean() < 0.2
    assert torch.equal(base, sample(logits.clone(), draws(200)))


def test_top_k_keeps_the_k_largest() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)).repeat(2000, 1)
    tokens = set(sample(logits.clone(), draws(2000, top_k=4, temperature=3.0)).tolist())
    assert tokens == set(logits[0].topk(4).indices.tolist())


def test_top_p_keeps_the_smallest_set_that_has_the_mass() -> None:
    probabilities = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    logits = probabilities.log().repeat(2000, 1)
    for top_p, expected in [
        (0.01, {1}),
        (0.39, {1}),
        (0.41, {1, 3}),
        (0.69, {1, 3}),
        (0.84, {1, 3, 4}),
        (1.0, set(range(5))),
    ]:
        assert set(sample(logits.clone(), draws(2000, top_p=top_p)).tolist()) == expected, top_p


def test_top_p_looks_at_what_top_k_left() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().repeat(2000, 1)
    # Of the two largest, the first has 0.57 of the mass: alone enough for 0.5, not enough for 0.6.
    assert set(sample(logits.clone(), draws(2000, top_k=2, top_p=0.5)).tolist()) == {0}
    assert set(sample(logits.clone(), draws(2000, top_k=2, top_p=0.6)).tolist()) == {0, 1}


@given(
    seed=st.integers(0, 2**32 - 1),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 7, 60, 1000]),
    top_p=st.sampled_from([0.05, 0.3, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.4, 1.0]),
)
def test_the_limits_leave_what_transformers_leave(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Asked of the sampler itself: with noise in the place of every token in turn, whom it can be made to draw."""
    logits = torch.randn(60, generator=torch.Generator().manual_seed(seed)) * 3
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = plain_sampler.filtered(logits, params)
    scores = (logits - logits.max())[None] / temperature
    scores = sampler.limit_mass(scores, torch.tensor([top_k]), torch.tensor([top_p]))
    scores = sampler.limit_ratio(scores, torch.tensor([min_p]))[0]
    torch.testing.assert_close(scores.softmax(-1), expected.softmax(-1))
    many = draws(300, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    drawn = set(sample(logits.repeat(300, 1), many).tolist())
    assert drawn <= set((expected != -torch.inf).nonzero()[:, 0].tolist())


def test_min_p_looks_at_what_top_p_left_and_keeps_the_most_likely() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(2000, 1)
    assert set(sample(logits, draws(2000, min_p=0.31)).tolist()) == {0, 1}
    assert set(sample(logits, draws(2000, min_p=0.29)).tolist()) == {0, 1, 2}
    assert set(sample(logits, draws(2000, top_p=0.45, min_p=0.01)).tolist()) == {0}
    assert set(sample(logits, draws(2000, min_p=7.0)).tolist()) == {0}


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e30])
def test_no_temperature_is_too_low_or_too_high(temperature: float) -> None:
    logits = torch.tensor([[-300.0, 80.0, 79.0, 300.0]]).repeat(400, 1)
    tokens = set(sample(logits, draws(400, temperature=temperature, top_p=0.999)).tolist())
    assert tokens == ({3} if temperature < 1 else {0, 1, 2, 3})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_draw_what_the_same_values_draw_in_float32(dtype: torch.dtype) -> None:
    logits = (torch.randn(2000, 400, generator=torch.Generator().manual_seed(0)) * 2).to(dtype)
    values = draws(2000, temperature=6.0, min_p=0.05)
    assert torch.equal(sample(logits, values), sample(logits.float(), values))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_numbers_are_named_and_leave_the_others_alone(bad: float, temperature: float) -> None:
    logits = torch.randn(4, 20)
    values = draws(4, temperature=temperature, top_k=5, top_p=0.9, min_p=0.1)
    expected = sample(logits, values).tolist()
    logits[2] = bad
    if not math.isinf(bad):
        logits[2, 3:] = 0.0  # one of them is enough
    drawn = sampler.sample(logits, values)
    assert drawn.is_valid.tolist() == [True, True, False, True]
    assert [token for i, token in enumerate(drawn.tokens.tolist()) if i != 2] == [*expected[:2], expected[3]]
    assert 0 <= int(drawn.tokens[2]) < 20  # a later step may read it


def test_large_batches_are_drawn_in_chunks_of_the_same_tokens() -> None:
    logits = torch.randn(40, 20_000, generator=torch.Generator().manual_seed(3))
    values = draws(40, seed=5)
    together = sample(logits.clone(), values).tolist()
    assert [int(sample(logits[[i]].clone(), pick(values, [i]))) for i in range(0, 40, 13)] == together[::13]
