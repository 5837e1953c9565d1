"""Encoder–decoder models on the GPU: kernels beside their references, graphs against eager steps with inputs of mixed
lengths, the encoder on a stream of its own, and bf16 against fp32."""

from __future__ import annotations

import json
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor

from cluster.hashing import chain_root
from cluster.request import RequestKey, SamplingParams
from kvtransfer.layout import KvGeometry, RankLayout
from kvtransfer.pool import KvPool
from tests.support.checkpoints import redraw
from tests.support.tensor_errors import error
from tests.support.unreplayed import UnreplayedModel
from workers.attention.environment import Environment
from workers.attention.interface import AttentionBatch, EncoderBatch, FixedGroupMetadata, GroupMetadata
from workers.attention.kv_views import kv_cache
from workers.engine.block_manager import BlockManager, GroupCapacity
from workers.engine.cuda_graph import GraphedModel
from workers.engine.encoder_stream import EncoderStream
from workers.engine.model_runner import ModelRunner, StepModel
from workers.engine.overlap import OverlappedEngine
from workers.engine.scheduler import Scheduler, SchedulerLimits
from workers.engine.sequence import EncoderInput, Sequence
from workers.engine.static_inputs import StaticInputs
from workers.models.encoder_decoder import EncoderDecoderModel
from workers.models.loader import load

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
BLOCK, NUM_BLOCKS, VOCAB_SIZE = 64, 80, 1000
SIZES, PROMPT_SIZES = (1, 2, 4, 8), (64, 128, 256, 320)
WIDTHS = (6, 6)  # blocks of the longest sequence, and of the longest input
T5 = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 256,
    "d_kv": 64,
    "d_ff": 512,
    "num_layers": 3,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
BART = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 256,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 512,
    "decoder_ffn_dim": 512,
    "max_position_embeddings": 512,
    "decoder_start_token_id": 2,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}


def write_checkpoint(family: str, folder: Path, *, calm: bool = False) -> Path:
    """Calm: rounding stays small. Else nearly all tokens of a text differ, and a little rounding changes all of it."""
    from transformers.models.bart.configuration_bart import BartConfig
    from transformers.models.bart.modeling_bart import BartForConditionalGeneration
    from transformers.models.t5.configuration_t5 import T5Config
    from transformers.models.t5.modeling_t5 import T5ForConditionalGeneration

    torch.manual_seed(0)
    if family == "bart":
        model = BartForConditionalGeneration(BartConfig(**BART))  # pyright: ignore[reportArgumentType]
    else:
        gated = {"feed_forward_proj": "gated-gelu"} if family == "t5-gated" else {}
        model = T5ForConditionalGeneration(T5Config(**T5, **gated))  # pyright: ignore[reportArgumentType]
    redraw(model)
    for name, weight in model.named_parameters():
        if calm and weight.dim() == 2 and "embed" not in name and "shared" not in name:
            weight.data /= 4
    model.to(torch.bfloat16).save_pretrained(folder)  # pyright: ignore[reportArgumentType]
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == VOCAB_SIZE
    return folder


class Rank:
    """A model with a pool of its own, whose unwritten blocks are NaN."""

    def __init__(self, folder: Path, *, dtype: str = "bfloat16", plain: bool = False) -> None:
        model = load(folder, dtype=dtype, device=CUDA).model
        assert isinstance(model, EncoderDecoderModel)
        self.model = model
        groups = model.kv_groups(BLOCK)
        self.pool = KvPool.allocate(KvGeometry(groups, "none"), RankLayout(0), [NUM_BLOCKS] * 2, CUDA)
        self.caches = [kv_cache(group, regions) for group, regions in zip(groups, self.pool.regions, strict=True)]
        for cache in self.caches:
            cache.pages("kv")[1:].fill_(float("nan"))
        environment = Environment.probe(CUDA, disabled=["triton"] if plain else [], strict=not plain)
        assert model.bind_kv(self.caches, environment).chosen == ("reference" if plain else "hopper")

    def graphed(self) -> GraphedModel:
        graphed = GraphedModel(
            self.model, SIZES, WIDTHS[0], CUDA, max_fixed_blocks=WIDTHS[1:], prompt_sizes=PROMPT_SIZES
        )
        graphed.capture()
        return graphed

    def unreplayed(self) -> UnreplayedModel:
        static = StaticInputs(SIZES[-1], WIDTHS[0], CUDA, WIDTHS[1:], max_tokens=PROMPT_SIZES[-1])
        return UnreplayedModel(self.model, static, SIZES, PROMPT_SIZES)


FAMILIES = ["t5", "t5-gated", "bart"]


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_checkpoint(request.param, tmp_path)


SOURCES = [5, 64, 1, 200, 333, 130, 90, 64]


def sources(seed: int, lens: SequenceOf[int] = SOURCES) -> list[list[int]]:
    draw = Random(seed)
    return [[draw.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in lens]


def slots(blocks: Tensor, start: int, end: int) -> Tensor:
    at = torch.arange(start, end)
    return blocks[at // BLOCK] * BLOCK + at % BLOCK


def encoder_batch(lens: SequenceOf[int]) -> EncoderBatch:
    parts = [slots(torch.arange(6) + 6 * i + 1, 0, length) for i, length in enumerate(lens)]
    return EncoderBatch(list(lens), torch.cat(parts).to(CUDA))


def batch_of(rows: list[tuple[int, int, int]], lens: SequenceOf[int]) -> AttentionBatch:
    """(number of a sequence, cached tokens, new tokens); single tokens first. Sequence i owns blocks 6 i + 1 …"""
    table = torch.tensor([[6 * number + 1 + i for i in range(6)] for number, _, _ in rows])
    starts = [sum(new for _, _, new in rows[:i]) for i in range(len(rows) + 1)]
    parts = [slots(row, cached, cached + new) for row, (_, cached, new) in zip(table, rows, strict=True)]
    own = [lens[number] for number, _, _ in rows]
    cross = torch.where(torch.arange(6) * BLOCK < torch.tensor(own)[:, None], table, 0)
    return AttentionBatch(
        num_sequences=len(rows),
        num_decodes=sum(new == 1 for _, _, new in rows),
        query_lens=[new for _, _, new in rows],
        query_starts=starts,
        context_lens=[cached + new for _, cached, new in rows],
        positions=torch.cat([torch.arange(cached, cached + new) for _, cached, new in rows]).to(CUDA),
        groups=(GroupMetadata(table.to(CUDA), torch.cat(parts).to(CUDA)),),
        logits_rows=torch.tensor(starts[1:]).to(CUDA) - 1,
        fixed=(FixedGroupMetadata(cross.to(CUDA), own),),
    )


def read_inputs(rank: Rank, inputs: list[list[int]]) -> Tensor:
    lens = [len(tokens) for tokens in inputs]
    ids = torch.tensor([token for tokens in inputs for token in tokens], device=CUDA)
    states = rank.model.encode(ids, encoder_batch(lens))
    rank.model.keep(states, encoder_batch(lens))
    return states


@torch.inference_mode()
def test_graphs_return_what_eager_steps_return(folder: Path) -> None:
    """Bit for bit, with inputs of mixed lengths; padding rows change nothing, whatever stood there before."""
    rank = Rank(folder)
    graphed, eager = rank.graphed(), rank.unreplayed()
    read_inputs(rank, sources(0))
    torch.manual_seed(0)
    tokens = torch.randint(3, VOCAB_SIZE, (8, 200), device=CUDA)
    cached = [70 + 9 * number for number in range(8)]
    rank.model.forward(
        torch.cat([row[:count] for row, count in zip(tokens, cached, strict=True)]),
        batch_of([(number, 0, count) for number, count in enumerate(cached)], SOURCES),
    )
    for count in (8, 1, 2, 3, 5, 7, 4):
        numbers = list(range(8))[-count:]
        batch = batch_of([(number, cached[number], 1) for number in numbers], SOURCES)
        ids = torch.stack([tokens[number, cached[number]] for number in numbers])
        hidden = graphed.forward(ids, batch)
        logits = graphed.logits(hidden).clone()
        want = eager.logits(eager.forward(ids, batch))
        assert torch.equal(logits, want) and not logits.isnan().any()
        for number in numbers:
            cached[number] += 1


@torch.inference_mode()
def test_graphs_of_prompts_return_what_eager_steps_return(folder: Path) -> None:
    """Bit for bit at the padded shape; at their own, bf16's rounding apart."""
    rank = Rank(folder)
    graphed, eager = rank.graphed(), rank.unreplayed()
    read_inputs(rank, sources(0))
    torch.manual_seed(0)
    tokens = torch.randint(3, VOCAB_SIZE, (8, 400), device=CUDA)
    for rows in STEPS:
        batch = batch_of(rows, SOURCES)
        ids = torch.cat([tokens[number, cached : cached + new] for number, cached, new in rows])
        hidden = graphed.forward(ids, batch).clone()
        logits = graphed.logits(hidden[batch.logits_rows])
        assert torch.equal(hidden, eager.forward(ids, batch)) and not logits.isnan().any()
        own = rank.model.logits(rank.model.forward(ids, batch)[batch.logits_rows])
        assert error(logits, own) < 0.06
    assert {size for _, size in eager.padded_prompts} == {256, 320}


LIMITS = SchedulerLimits(
    max_batched_tokens=512,
    max_sequences=8,
    max_model_len=300,
    prefill_reserve=0.0,
    chunk_tokens=64,
    max_encoder_tokens=400,
)


def serve(rank: Rank, steps: StepModel, *, own_stream: bool = True) -> list[list[int]]:
    """16 requests of mixed inputs, half of them with decoder prompts, which come while others decode."""
    capacities = [GroupCapacity("self", NUM_BLOCKS, BLOCK), GroupCapacity("cross", NUM_BLOCKS, BLOCK, True)]
    scheduler = Scheduler(BlockManager(capacities, enable_prefix_cache=False), LIMITS, b"gpu tests".ljust(16))
    runner = ModelRunner(steps, rank.caches, rank.pool.generations, [BLOCK] * 2, device=CUDA, encoder=rank.model)
    if not own_stream:
        runner._encoder_stream = EncoderStream(torch.device("cpu"))  # reads where it is called
    engine = OverlappedEngine(scheduler, runner)
    draw, sequences = Random(1), list[Sequence]()
    waiting = [tokens for seed in (1, 2) for tokens in sources(seed)]
    while waiting or engine.has_work:
        for tokens in waiting[:3]:
            i = len(sequences)
            prompt = [2] + [draw.randrange(3, VOCAB_SIZE) for _ in range(i % 2 * draw.randint(1, 90))]
            read = EncoderInput(tuple(tokens), chain_root(b"gpu tests".ljust(16), encoder_tokens=tokens))
            params = SamplingParams(max_tokens=20 + i, ignore_eos=True)
            seq = Sequence(i, RequestKey(str(i), 0), prompt, len(prompt), params, arrival=i, encoder_input=read)
            sequences.append(seq)
            scheduler.add(seq)
        del waiting[:3]
        for _ in range(4):
            outcome = engine.step() if engine.has_work else None
            assert outcome is None or outcome.error is None
    assert [len(seq.tokens) - seq.num_prompt for seq in sequences] == [20 + i for i in range(len(sequences))]
    scheduler.check_integrity()
    return [seq.tokens[seq.num_prompt :] for seq in sequences]


def test_the_engine_says_the_same_with_graphs_and_on_whatever_stream_the_encoder_runs(folder: Path) -> None:
    """Token for token: the same steps, padded to the same sizes."""
    rank = Rank(folder)
    graphed, eager = rank.graphed(), rank.unreplayed()
    tokens = serve(rank, graphed)
    assert len({token for row in tokens for token in row}) > 20
    assert serve(rank, graphed, own_stream=False) == tokens
    assert serve(rank, eager) == tokens
    assert {size for _, size in eager.padded} >= {4, 8} and any(count < size for count, size in eager.padded)
    assert len({size for _, size in eager.padded_prompts}) > 1


def test_what_the_encoder_overwrites_was_read_by_then_and_what_it_wrote_is_there_when_it_is_told(folder: Path) -> None:
    """With the steps, then the encoder, held up on the device."""
    rank = Rank(folder)
    wanted = serve(rank, rank.unreplayed(), own_stream=False)
    encode, forward = rank.model.encode, rank.model.forward

    def slow_encode(input_ids: Tensor, batch: EncoderBatch) -> Tensor:
        torch.cuda._sleep(10_000_000)
        return encode(input_ids, batch)

    def slow_forward(input_ids: Tensor, batch: AttentionBatch, capture_layers: SequenceOf[int] = ()) -> Tensor:
        torch.cuda._sleep(2_000_000)
        return forward(input_ids, batch, capture_layers)

    for name, slow in (("encode", slow_encode), ("forward", slow_forward)):
        setattr(rank.model, name, slow)
        assert serve(rank, rank.unreplayed()) == wanted
        delattr(rank.model, name)


STEPS = [
    [(0, 0, 130), (1, 0, 64), (2, 0, 3)],  # fresh prompts
    [(0, 130, 1), (2, 3, 1), (1, 64, 77), (3, 0, 200)],  # single tokens beside a cached and a fresh prompt
    [(0, 131, 1), (1, 141, 1), (2, 4, 1), (3, 200, 1)],  # single tokens alone
    [(3, 201, 150), (1, 142, 2)],  # a long chunk on a cached context
    [(4, 0, 1)],
]


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_bf16_is_as_far_from_fp32_as_plain_layers_are(family: str, tmp_path: Path) -> None:
    folder = write_checkpoint(family, tmp_path, calm=True)
    ranks = Rank(folder), Rank(folder, plain=True), Rank(folder, dtype="float32", plain=True)
    inputs = sources(3)
    ours, rounded, exact = (read_inputs(rank, inputs) for rank in ranks)
    assert error(ours, exact) < 1.3 * error(rounded, exact) + 0.002
    assert error(rounded, exact) < 0.03
    torch.manual_seed(0)
    tokens = torch.randint(3, VOCAB_SIZE, (5, 400), device=CUDA)
    logits: list[list[Tensor]] = []
    for rows in STEPS:
        batch = batch_of(rows, SOURCES)
        ids = torch.cat([tokens[number, cached : cached + new] for number, cached, new in rows])
        logits.append([rank.model.logits(rank.model.forward(ids, batch)) for rank in ranks])
    ours, rounded, exact = (torch.cat(parts) for parts in zip(*logits, strict=True))
    print(f"ours {error(ours, exact):.4f}, plain bf16 {error(rounded, exact):.4f} from fp32")
    assert error(ours, exact) < 1.3 * error(rounded, exact) + 0.002
    assert error(rounded, exact) < 0.03
