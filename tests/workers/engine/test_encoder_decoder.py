"""Encoder–decoder models in one engine against transformers, token for token, in fp32 on the CPU."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import pytest
import torch

from cluster.config import EncoderOutput
from cluster.errors import InvalidRequest, RequestTooLong
from cluster.request import Pooling, SamplingParams
from tests.support.checkpoints import checkpoint, transformers_model
from tests.support.encoder_decoders import START, Text, encoded, judge, texts
from tests.support.engines import LoadedEngine, limits
from tests.support.families import VOCAB_SIZE
from workers.engine.overlap import OverlappedEngine
from workers.engine.scheduler import SchedulerLimits
from workers.engine.sequence import ForcedTokens, Sequence, SequenceStatus
from workers.models.loader import load

NUM_TOKENS = 3
LIMITS = replace(
    limits(max_batched_tokens=40, max_sequences=12, max_model_len=200, chunk_tokens=8, max_encoder_tokens=80),
    vocab_size=VOCAB_SIZE,
)
ALL = ["t5", "t5-gated", "bart", "mbart"]
WIDE = ["t5-small", "bart-relu"]


def engine(
    family: str,
    *,
    num_blocks: int = 400,
    num_fixed_blocks: int = 200,
    scheduler_limits: SchedulerLimits = LIMITS,
    encoder_output: EncoderOutput = "cross_kv",
) -> LoadedEngine:
    loaded = LoadedEngine(
        load(checkpoint(family)),
        num_blocks=num_blocks,
        num_fixed_blocks=num_fixed_blocks,
        block_size=4,
        scheduler_limits=scheduler_limits,
        encoder_output=encoder_output,
    )
    for region in chain(*loaded.pool.regions):  # what nobody wrote is not read: NaN would spread; the null block pads
        region[1:].view(torch.float32).fill_(torch.nan)
    return loaded


def add(
    loaded: LoadedEngine, text: Text, *, max_tokens: int = NUM_TOKENS, forced: ForcedTokens | None = None
) -> Sequence:
    seq = loaded.sequence(
        text.prompt,
        SamplingParams(max_tokens=max_tokens, ignore_eos=True),
        encoder_tokens=text.source,
        forced=forced or ForcedTokens(),
    )
    loaded.scheduler.add(seq)
    return seq


def expect_nothing_held(loaded: LoadedEngine) -> None:
    loaded.scheduler.check_integrity()
    loaded.blocks.clear_cache()
    for group, capacity in enumerate(loaded.blocks.groups):
        assert loaded.blocks.counts(group).free == capacity.num_blocks, capacity.name


def expect_greedy(family: str, loaded: LoadedEngine, runs: list[tuple[Text, Sequence]]) -> set[int]:
    """All tokens of all runs that are not decided by a nose; which tokens were seen."""
    seen: set[int] = set()
    num_compared = 0
    for text, seq in runs:
        tokens = loaded.emitted(seq)
        verdict = judge(family, text, tokens)
        if verdict.is_decided:
            assert verdict.is_greedy, f"{text}: {tokens}"
            num_compared += 1
            seen.update(tokens)
    assert num_compared >= 0.9 * len(runs), f"{num_compared} of {len(runs)} are decided"
    return seen


@pytest.mark.parametrize(
    ("family", "encoder_output"),
    [
        *((family, "cross_kv") for family in ALL),
        *(pytest.param(family, "cross_kv", marks=pytest.mark.full) for family in WIDE),
        ("t5", "hidden_states"),
        *(pytest.param(family, "hidden_states", marks=pytest.mark.full) for family in [*ALL[1:], *WIDE]),
    ],
)
def test_every_way_at_once(family: str, encoder_output: EncoderOutput) -> None:
    """Ragged inputs, decoder prompts in chunks beside decodes, both pools too small for all, and some are cancelled."""
    loaded = engine(family, num_blocks=28, num_fixed_blocks=48, encoder_output=encoder_output)
    wanted = texts(family, 112, num_sources=28)
    lengths = [NUM_TOKENS + 30 * (i < 40 and i % 4 == 0) for i in range(len(wanted))]
    runs = [(text, add(loaded, text, max_tokens=length)) for text, length in zip(wanted, lengths, strict=True)]
    cancelled: list[Sequence] = []
    most = 0
    while loaded.engine.has_work:
        loaded.step()
        loaded.scheduler.check_integrity()
        most = max(most, len(loaded.outcomes[-1].tokens))
        if len(loaded.outcomes) % 7 == 0:
            seq = next((seq for _, seq in reversed(runs) if not seq.is_finished), None)
            if seq is not None and len(cancelled) < 12:
                cancelled.append(seq)
                loaded.scheduler.abort(seq)
    finished = [(text, seq) for text, seq in runs if seq not in cancelled]
    assert all(len(loaded.emitted(seq)) == seq.params.max_tokens for _, seq in finished)
    assert len(expect_greedy(family, loaded, finished)) >= 100
    assert most >= 8 and len({len(text.source) for text, _ in finished}) >= 7
    assert sum(len(outcome.preempted) for outcome in loaded.outcomes) > 0
    expect_nothing_held(loaded)


@pytest.mark.parametrize("family", ALL)
def test_two_encoder_inputs_behind_one_decoder_prompt(family: str) -> None:
    """A warm cache tells them apart, and finds what is equal: then neither encoder nor decoder computes it again."""
    first, second = (
        Text(text.source, texts(family, 8)[-1].prompt) for text in (texts(family, 8)[3], texts(family, 8)[7])
    )
    cold = []
    for text in (first, second):
        alone = engine(family)
        seq = add(alone, text)
        alone.run()
        cold.append(alone.emitted(seq))
    assert cold[0] != cold[1]
    loaded = engine(family)
    for _ in range(2):
        for text, tokens in zip((first, second), cold, strict=True):
            seq = add(loaded, text)
            loaded.run()
            assert loaded.emitted(seq) == tokens
            hit = 4 * ((len(text.prompt) - 1) // 4)
            assert seq.prefix_hit_tokens == (hit if loaded.num_added > 2 else 0)
    num_steps = loaded.engine.num_steps
    seq = add(loaded, first, max_tokens=1)
    loaded.run()
    assert loaded.engine.num_steps == num_steps + 1, "the cached output of the encoder was not found"
    expect_nothing_held(loaded)


@pytest.mark.parametrize("family", ALL)
def test_hidden_states_are_kept_beside_what_decoders_make_of_them(family: str) -> None:
    """The keys and values are, bit for bit, those that an encoder's own worker writes where these are handed over; a
    worker that only encodes makes none."""
    texts_ = [Text(text.source, (START[family], 9)) for text in texts(family, 8)[5:]]
    direct, states = engine(family), engine(family, encoder_output="hidden_states")
    for loaded in (direct, states):
        for text in texts_:
            seq = loaded.sequence([], SamplingParams(max_tokens=1), encoder_tokens=text.source, encodes=True)
            loaded.scheduler.add(seq)
            loaded.run()
    projected, kept = (region.view(torch.float32) for region in states.pool.regions[1])
    assert projected[1:].isnan().all() and not kept[1:].isnan().all()
    runs = [[(text, add(loaded, text)) for text in texts_] for loaded in (direct, states)]
    for loaded in (direct, states):
        loaded.run()
    for (_, one), (_, other) in zip(*runs, strict=True):
        assert direct.emitted(one) == states.emitted(other)
    expect_greedy(family, states, runs[1])
    (written,) = (region.view(torch.float32) for region in direct.pool.regions[1])
    torch.testing.assert_close(projected, written, equal_nan=True, rtol=1e-5, atol=1e-5)
    own, cross = states.pool.geometry.groups
    assert [region.name for region in cross.travelling] == ["states"] and own.travelling == own.regions
    (kv,), (moved,) = own.regions, cross.travelling
    assert kv.block_bytes() / moved.block_bytes() == 2 * kv.num_layers * kv.kv_heads * kv.head_dim / moved.row_size
    for loaded in (direct, states):
        expect_nothing_held(loaded)


def test_plans_that_are_made_one_step_ahead() -> None:
    loaded = engine("t5", num_blocks=20, num_fixed_blocks=24, encoder_output="hidden_states")
    loaded.engine = OverlappedEngine(loaded.scheduler, loaded.runner)
    wanted = texts("t5", 24)
    runs = [(text, add(loaded, text, max_tokens=20)) for text in wanted]
    loaded.run()
    assert all(len(loaded.emitted(seq)) == 20 for _, seq in runs)
    expect_greedy("t5", loaded, runs)
    assert sum(len(outcome.preempted) for outcome in loaded.outcomes) > 0
    expect_nothing_held(loaded)


@pytest.mark.parametrize("family", ["bart", "mbart"])
def test_forced_tokens(family: str) -> None:
    """The second token and the last one of the length, as transformers forces them; what is drawn between sees them."""
    source = texts(family, 8)[5].source
    loaded = engine(family)
    runs = [
        (length, add(loaded, Text(source, (START[family],)), max_tokens=length, forced=ForcedTokens(77, 99)))
        for length in (1, 2, 3, 6)
    ]
    loaded.run()
    for length, seq in runs:
        wanted = transformers_model(family).generate(  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
            torch.tensor([source]),
            do_sample=False,
            max_length=length + 1,
            forced_bos_token_id=77,
            forced_eos_token_id=99,
            eos_token_id=None,
        )
        assert [START[family], *loaded.emitted(seq)] == wanted[0].tolist()
    assert loaded.emitted(runs[-1][1])[0] == 77 and loaded.emitted(runs[-1][1])[-1] == 99


def test_vectors_of_what_the_encoder_makes_of_an_input() -> None:
    """Beside rows that decode; a cached output has kept no states, so the input is read again."""
    loaded = engine("t5")
    sources = [text.source for text in texts("t5", 8)[4:7]]
    for _ in range(2):
        decoding = [add(loaded, Text(source, (0, 9)), max_tokens=2) for source in sources]
        pooled = [
            (source, pooling, loaded.sequence([], SamplingParams(pooling=pooling), encoder_tokens=source, encodes=True))
            for source in sources
            for pooling in Pooling
        ]
        for *_, seq in pooled:
            loaded.scheduler.add(seq)
        loaded.run()
        for source, pooling, seq in pooled:
            states = encoded("t5", source)[0]
            wanted = {Pooling.MEAN: states.mean(0), Pooling.LAST: states[-1], Pooling.STATES: states.flatten()}[pooling]
            assert loaded.vector(seq) == pytest.approx(wanted.numpy(), abs=1e-4)
        assert all(len(loaded.emitted(seq)) == 2 for seq in decoding)
    loaded.step()
    expect_nothing_held(loaded)


def test_an_input_is_read_once_for_all_who_wait_for_it() -> None:
    loaded = engine("t5")
    text = texts("t5", 8)[7]
    sequences = [add(loaded, Text(text.source, (0, i + 5))) for i in range(6)]
    loaded.step()
    assert [seq.status for seq in sequences] == [SequenceStatus.WAITING] * 6
    assert loaded.blocks.counts(0).ready + loaded.blocks.counts(0).filling == 0, "decoder blocks are held"
    assert loaded.blocks.counts(1).ready == -(-len(text.source) // 4)
    loaded.step()
    assert [seq.status for seq in sequences] == [SequenceStatus.RUNNING] * 6
    assert loaded.blocks.counts(1).ready == -(-len(text.source) // 4)
    loaded.run()
    expect_nothing_held(loaded)


def test_requests_that_do_not_fit_the_model() -> None:
    loaded = engine("t5", num_fixed_blocks=10)
    params = SamplingParams(max_tokens=2)
    with pytest.raises(InvalidRequest, match="reads an encoder input, and none is given; send one"):
        loaded.scheduler.add(loaded.sequence([0], params))
    with pytest.raises(InvalidRequest, match="token id 512: the model has 512"):
        loaded.scheduler.add(loaded.sequence([0], params, encoder_tokens=[512]))
    with pytest.raises(RequestTooLong, match="81 tokens of encoder input are over max_encoder_tokens=80"):
        loaded.scheduler.add(loaded.sequence([0], params, encoder_tokens=[5] * 81))
    with pytest.raises(RequestTooLong, match="41 tokens need 11 blocks of group cross, over 10 blocks"):
        loaded.scheduler.add(loaded.sequence([0], params, encoder_tokens=[5] * 41))
    decoder = LoadedEngine(load(checkpoint("llama")), scheduler_limits=limits())
    with pytest.raises(InvalidRequest, match="this model has no encoder; leave the encoder input out"):
        decoder.scheduler.add(decoder.sequence([0], params, encoder_tokens=[5]))
    with pytest.raises(InvalidRequest, match="all hidden states are told of an encoder's input alone"):
        decoder.scheduler.add(decoder.sequence([0], SamplingParams(max_tokens=1, pooling=Pooling.STATES)))
