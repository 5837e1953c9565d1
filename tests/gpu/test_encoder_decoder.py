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
from tests.support.unreplayed import UnreplayedModel
from workers.attention.environment import Environment
from workers.attention.interface import AttentionBatch, EncoderBatch, FixedGroupMetadata, GroupMetadata
from workers.attention.kv_views import kv_cache
from workers.attention.packed import Blocks, Spans, TorchKernels
from workers.engine.block_manager import BlockManager, GroupCapacity
from workers.engine.cuda_graph import GraphedModel, StaticInputs
from workers.engine.encoder_stream import EncoderStream
from workers.engine.model_runner import ModelRunner, StepModel
from workers.engine.overlap import OverlappedEngine
from workers.engine.scheduler import Scheduler, SchedulerLimits
from workers.engine.sequence import EncoderInput, Sequence
from workers.kernels.tactics import DecodeTactic, decode_tactic
from workers.models.encoder_decoder import EncoderDecoderModel
from workers.models.loader import load

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
BLOCK, NUM_BLOCKS, VOCAB_SIZE = 64, 80, 1000
SIZES = (1, 2, 4, 8)
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
        graphed = GraphedModel(self.model, SIZES, WIDTHS[0], CUDA, max_fixed_blocks=WIDTHS[1:])
        graphed.capture()
        return graphed

    def unreplayed(self) -> UnreplayedModel:
        return UnreplayedModel(self.model, StaticInputs(SIZES[-1], WIDTHS[0], CUDA, WIDTHS[1:]), SIZES)


FAMILIES = ["t5", "t5-gated", "bart"]


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_checkpoint(request.param, tmp_path)


def error(out: Tensor, want: Tensor) -> float:
    """Relative, in the norm; NaN is infinitely wrong."""
    return torch.nan_to_num((out.float() - want.float()).norm() / want.float().norm(), nan=float("inf")).item()


@pytest.mark.parametrize("tactic", [None, DecodeTactic(1, 32, 4, 2), DecodeTactic(16, 64, 8, 3)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_single_queries_with_a_bias(tactic: DecodeTactic | None, *, with_bias: bool) -> None:
    """One row, the ends of blocks, a long one, rows that pad a step, and NaN behind the tokens."""
    from workers.kernels.paged_decode import paged_decode

    heads, dim, layers, layer, scale = 5, 64, 3, 2, 1.0 if with_bias else 0.125
    for lens in ([1], [1, 64, 65, 2, 700, 4097]):
        torch.manual_seed(0)
        pages = (0.5 * torch.randn(100, layers, 2, heads, BLOCK, dim, device=CUDA)).bfloat16()
        table = torch.zeros(len(lens) + 2, 66, dtype=torch.int64, device=CUDA)
        at = 1
        for row, length in enumerate(lens):
            count = -(-length // BLOCK)
            table[row, :count] = torch.arange(at, at + count, device=CUDA)
            at += count
            if length % BLOCK:
                pages[at - 1, :, :, :, length % BLOCK :] = float("nan")
        last = torch.tensor([*lens, 1, 1], device=CUDA) - 1
        bias = torch.randn(heads, 5000, device=CUDA).bfloat16() if with_bias else None
        q = torch.randn(len(last), heads, dim, device=CUDA).bfloat16()
        own = tactic or decode_tactic(len(last) * heads)
        out = paged_decode(q, pages, table, last, layer, scale, own, bias).view_as(q)
        wide = None if bias is None else bias.float()
        blocks = Blocks(pages.float(), table)
        want = TorchKernels().attend_singles(q.float(), blocks, last, layer, scale, wide).view_as(out)
        for row in range(len(last)):
            assert error(out[row], want[row]) < 6e-3, (lens, row)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("lens", [[1], [5, 64, 1, 65, 130], [700, 3, 512]])
def test_packed_attention(lens: list[int], *, with_bias: bool) -> None:
    """Rows of a packed product, and a bias that is wider than the longest needs."""
    from workers.kernels.packed_attention import packed_attention

    torch.manual_seed(0)
    heads, dim, scale = 5, 64, 1.0 if with_bias else 0.125
    q, k, v = (0.5 * torch.randn(sum(lens), 3, heads, dim, device=CUDA)).bfloat16().unbind(1)
    bias = torch.randn(heads, 2 * max(lens) + 7, device=CUDA).bfloat16() if with_bias else None
    spans = Spans.of([sum(lens[:i]) for i in range(len(lens))], lens, lens, CUDA)
    out, want = torch.full((2, *q.shape), float("nan"), device=CUDA)
    own = out.bfloat16()
    packed_attention(q, k, v, *spans, scale, bias, own)
    TorchKernels().attend(q.float(), k.float(), v.float(), spans, scale, None if bias is None else bias.float(), want)
    assert all(error(a, b) < 6e-3 for a, b in zip(own.split(lens), want.split(lens), strict=True))


@pytest.mark.parametrize(("causal", "with_bias"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(
    ("queries", "keys"), [([1], [1]), ([2, 64, 65, 1, 7], [2, 64, 130, 200, 300]), ([400, 70], [400, 1000])]
)
def test_paged_attention(queries: list[int], keys: list[int], *, causal: bool, with_bias: bool) -> None:
    """Beside rows that are others', in the last blocks of a pool of more than 2^32 elements, NaN behind the tokens."""
    from workers.kernels.head_pages import write_heads
    from workers.kernels.packed_attention import paged_attention

    torch.manual_seed(0)
    heads, dim, layers, layer, scale = 5, 64, 40, 37, 1.0 if with_bias else 0.125
    num_blocks = 2**32 // (layers * 2 * heads * BLOCK * dim) + 64
    pages = torch.empty(num_blocks, layers, 2, heads, BLOCK, dim, dtype=torch.bfloat16, device=CUDA)
    pages[-40:] = float("nan")
    assert pages.numel() > 2**32
    table = torch.zeros(len(keys), 17, dtype=torch.int64, device=CUDA)
    last = num_blocks - 1
    for row, count in enumerate(keys):
        held = -(-count // BLOCK)
        table[row, :held] = torch.arange(last, last - held, -1, device=CUDA)
        last -= held
        k, v = (0.5 * torch.randn(count, 3, heads, dim, device=CUDA)).bfloat16().unbind(1)[1:]
        mapping = slots(table[row].cpu(), 0, count).to(CUDA)
        write_heads(k, v, pages, mapping, layer)
        at, offsets = mapping // BLOCK, mapping % BLOCK
        assert torch.equal(pages[at, layer, 0, :, offsets], k) and torch.equal(pages[at, layer, 1, :, offsets], v)
    assert pages[-40:, [layer - 1, layer + 1]].isnan().all()
    starts = [3 + sum(queries[:i]) for i in range(len(queries))]
    spans = Spans.of(starts, queries, keys, CUDA)
    q = torch.randn(3 + sum(queries), heads, dim, device=CUDA).bfloat16()
    bias = torch.randn(heads, 1100, device=CUDA).bfloat16() if with_bias else None
    out, want = torch.full((2, *q.shape), 7.0, device=CUDA)
    own = out.bfloat16()
    paged_attention(q, pages, table, layer, *spans, scale, bias, own, causal=causal)
    clean = Blocks(pages[-40:, layer : layer + 1].float().nan_to_num(), (table - num_blocks + 40).clamp_(min=0))
    wide = None if bias is None else bias.float()
    TorchKernels().attend_blocks(q.float(), clean, 0, spans, scale, wide, want, causal=causal)
    assert (own[:3] == 7).all()
    for start, count in zip(starts, queries, strict=True):
        assert error(own[start : start + count], want[start : start + count]) < 6e-3


@pytest.mark.parametrize(("rows", "size"), [(1, 64), (37, 1000), (5, 4096)])
def test_layer_norm_of_a_sum(rows: int, size: int) -> None:
    from workers.layers.norm import LayerNorm

    torch.manual_seed(0)
    plain, fused = (LayerNorm(size, 1e-5, dtype=torch.bfloat16).to(CUDA) for _ in range(2))
    for norm in (plain, fused):
        norm.weight.data = torch.arange(size, device=CUDA).bfloat16() / size
        norm.bias.data = torch.linspace(-1, 1, size, device=CUDA).bfloat16()
    fused.fuse()
    x, delta = torch.randn(2, rows, size, device=CUDA).bfloat16() + 3
    (total, out), (wanted_total, want) = fused.of_sum(x, delta), plain.of_sum(x, delta)
    assert torch.equal(total, wanted_total) and error(out, want) < 3e-3


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
