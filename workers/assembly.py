"""From settings to the parts of a worker, wired up and not yet running."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import torch

from cluster.config import KvConfig, ModelConfig, PoolConfig, Role, SchedulerConfig, SluiceConfig, TransferConfig
from cluster.engine_config import EngineConfig
from cluster.errors import ConfigError
from cluster.hashing import chain_root
from cluster.membership import Member, MemberState, Rank
from cluster.words_config import WordsConfig
from kvtransfer.connector import Done, Executor, ReadLimits, Sink, Source
from kvtransfer.layout import KvGeometry, compatibility_hash
from kvtransfer.ledger import Ledger
from kvtransfer.pool import KvPool
from kvtransfer.transports import open_transport
from workers.attention.environment import Environment, choose_device
from workers.bound_model import bind_model
from workers.engine.block_manager import BlockManager, GroupCapacity
from workers.engine.constraint import ConstraintCompiler
from workers.engine.engine import Engine
from workers.engine.grammar import TOKENIZER_FILE, GrammarCompiler
from workers.engine.model_runner import ModelRunner
from workers.engine.overlap import OverlappedEngine
from workers.engine.scheduler import Scheduler, SchedulerLimits
from workers.models import loader
from workers.models.encoder_decoder import CROSS, EncoderDecoderModel
from workers.models.model import EncoderSpec
from workers.speculative.ngram import NgramProposer


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """Who a worker is, and the sections of the config that are its business."""

    name: str
    incarnation: str
    pool: str
    resources: PoolConfig
    model: ModelConfig
    engine: EngineConfig
    kv: KvConfig
    scheduler: SchedulerConfig
    transfer: TransferConfig
    words: WordsConfig
    secret: bytes

    @classmethod
    def of(
        cls, config: SluiceConfig, pool: str, name: str, secret: bytes, incarnation: str | None = None
    ) -> WorkerSettings:
        """A new incarnation, if it is given none."""
        return cls(
            name=name,
            incarnation=incarnation or uuid4().hex,
            pool=pool,
            resources=config.pools[pool],
            model=config.model,
            engine=config.engine,
            kv=config.kv,
            scheduler=config.scheduler,
            transfer=config.transfer,
            words=config.words,
            secret=secret,
        )

    @property
    def roles(self) -> tuple[Role, ...]:
        return self.resources.roles

    def member(self, address: str, metrics_address: str, compatibility: bytes, pid: int) -> Member:
        return Member(
            name=self.name,
            pool=self.pool,
            incarnation=self.incarnation,
            address=address,
            metrics_address=metrics_address,
            roles=self.roles,
            ranks=(Rank(rank=0),),
            compatibility_hash=compatibility,
            pid=pid,
            state=MemberState.READY,
        )


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """The engine thread owns all of it but the executors, which have threads of their own."""

    compatibility_hash: bytes
    block_size: int
    block_bytes: int  # of one block of every group, as a sink reads it
    blocks: BlockManager
    scheduler: Scheduler
    engine: Engine
    ledger: Ledger
    source: Source
    sink: Sink
    executors: list[Executor]
    pool: KvPool  # kept alive for as long as a peer may read it
    next_id: Callable[[], int]
    constraints: ConstraintCompiler | None = None  # None: no grammars
    encoder: EncoderSpec | None = None  # None: the model has none


def assemble(settings: WorkerSettings, on_done: Callable[[Done], None]) -> Assembly:
    """Loads the model, allocates the KV pool, registers it. Raises CheckpointError and ConfigError."""
    torch.set_num_threads(settings.resources.threads)
    model_config, kv, engine = settings.model, settings.kv, settings.engine
    device = choose_device(engine.device, num_gpus=settings.resources.gpus, strict=engine.strict).device
    loaded = loader.load(
        Path(model_config.path),
        dtype=model_config.dtype,
        load_format=model_config.load_format,
        dummy_seed=model_config.dummy_seed,
        device=device,
        environment=Environment.probe(device, disabled=engine.disabled, strict=engine.strict),
    )
    model, spec = loaded.model, loaded.model.spec
    encoder = model if isinstance(model, EncoderDecoderModel) else None
    moves_states = kv.encoder_output == "hidden_states"
    if encoder is None and moves_states:
        raise ConfigError("kv.encoder_output", "hidden_states, but the model has no encoder; remove it")
    groups = model.kv_groups(kv.block_size) if encoder is None else encoder.kv_groups(kv.block_size, kv.encoder_output)
    geometry = KvGeometry(groups, rope_convention=spec.rope_convention)
    compatibility = compatibility_hash(loaded.weights_identity, loaded.config_json, spec.dtype, geometry)
    max_model_len = min(model_config.max_model_len or spec.max_position_embeddings, spec.max_position_embeddings)
    block_bytes = sum(region.block_bytes() for group in groups for region in group.travelling)
    limits = SchedulerLimits(
        max_batched_tokens=settings.scheduler.max_batched_tokens,
        max_sequences=settings.scheduler.max_sequences,
        max_model_len=max_model_len,
        prefill_reserve=kv.prefill_reserve,
        chunk_tokens=settings.scheduler.chunk_tokens,
        vocab_size=spec.vocab_size,
        max_encoder_tokens=0 if encoder is None else settings.scheduler.max_encoder_tokens,
        max_source_tokens=None if spec.encoder is None else spec.encoder.max_source_tokens,
    )
    bound = bind_model(
        model,
        geometry,
        limits,
        device=device,
        engine=engine,
        kv=kv,
        pool=settings.pool,
        resources=settings.resources,
    )
    pool = bound.pool
    fixed = [encoder is not None and group.name == CROSS for group in groups]
    capacities = [
        GroupCapacity(group.name, count - 1, group.block_size, is_fixed, is_projected=is_fixed and moves_states)
        for group, count, is_fixed in zip(groups, pool.num_blocks, fixed, strict=True)
    ]
    eos = frozenset(spec.eos_token_ids)
    blocks = BlockManager(capacities, enable_prefix_cache=kv.prefix_cache)
    proposer = None if engine.speculation is None else NgramProposer(engine.draft_tokens, engine.ngram_tokens)
    scheduler = Scheduler(blocks, limits, chain_root(compatibility), eos_token_ids=eos, proposer=proposer)
    constraints = GrammarCompiler(Path(model_config.path) / TOKENIZER_FILE, spec.vocab_size, eos)
    runner = ModelRunner(
        bound.steps,
        bound.caches,
        pool.generations,
        [group.block_size for group in groups],
        device=device,
        eos_token_ids=eos,
        constraints=constraints,
        encoder=encoder,
        find_largest=bound.find_largest,
    )
    is_overlapped = engine.overlaps(on_gpu=device.type == "cuda")
    transfer = settings.transfer
    ledger = Ledger(blocks, lease_s=transfer.lease_s, late_read_s=transfer.late_read_s)
    transport = open_transport(transfer.transport, f"{settings.name}-{settings.incarnation}-0", device)
    read_limits = ReadLimits(transfer.late_read_s, transfer.stuck_read_s)
    return Assembly(
        compatibility_hash=compatibility,
        block_size=kv.block_size,
        block_bytes=block_bytes,
        blocks=blocks,
        scheduler=scheduler,
        engine=(OverlappedEngine if is_overlapped else Engine)(scheduler, runner),
        ledger=ledger,
        source=Source(ledger),
        sink=Sink(ledger),
        executors=[Executor(pool, transport, read_limits, on_done)],
        pool=pool,
        next_id=itertools.count(1).__next__,
        constraints=constraints,
        encoder=spec.encoder,
    )
