"""One YAML file, checked once, frozen. A part receives only its own section.

Every key is a field below; its docstring gives meaning and unit. An unknown key, a wrong type or two keys
that contradict each other end in a ConfigError that names the dotted path. Reading files and overrides is
`cluster.config_file`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from cluster.engine_config import EngineConfig
from cluster.section import Count, Fraction, Port, Positive, Seconds, Section, demand
from cluster.traces_config import TracesConfig
from cluster.words_config import WordsConfig

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Role(StrEnum):
    """What a worker accepts: the stage of a request that it runs."""

    ENCODE = "encode"
    PREFILL = "prefill"
    DECODE = "decode"


class ModelConfig(Section):
    path: str
    """Directory of a checkpoint in Hugging Face format."""
    served_name: str | None = None
    """Name in `/v1/models` and in requests; none: the directory's name."""
    dtype: Dtype = "auto"
    """Of weights and activations; auto follows the checkpoint."""
    load_format: Literal["auto", "dummy"] = "auto"
    """dummy: random weights of the right shapes from `dummy_seed`, no weight file is read."""
    dummy_seed: Count = 0
    """Equal seeds give equal weights on every worker."""
    max_model_len: Positive | None = None
    """Longest sequence, prompt and output, in tokens; none: what the checkpoint says."""


EncoderOutput: TypeAlias = Literal["cross_kv", "hidden_states"]


class KvConfig(Section):
    block_size: Positive = 64
    """Tokens per block; equal on all workers that exchange blocks."""
    num_blocks: Positive | None = None
    """Blocks per group of one worker, the null block not counted; none: from the memory below."""
    memory_bytes: Positive | None = None
    """Bytes of KV per worker; used when `num_blocks` is none."""
    memory_fraction: Annotated[float, Field(gt=0, le=0.95)] | None = None
    """Share of the device's free memory per worker; used when the two above are none. On a GPU, of what the model and
    its largest step leave free. None: 0.1 of a host's, 0.9 of a GPU's."""
    prefix_cache: bool = True
    """Keep the blocks of finished sequences for later prompts that begin alike."""
    prefill_reserve: Fraction = 0.1
    """Share of a pool that reservations waiting for a pull may not hold."""
    cross_kv_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the memory for what decoders read of encoder outputs; none: so that both groups hold as many sequences
    of full length. Models without an encoder have no such group."""
    encoder_output: EncoderOutput = "cross_kv"
    """What encode workers hand over: the keys and values of all decoder layers, or the hidden states of which each
    worker that runs decoders makes them: fewer bytes, more work there. Models with an encoder."""


class SchedulerConfig(Section):
    max_batched_tokens: Positive = 2048
    """Tokens computed in one step, over all sequences."""
    max_sequences: Positive = 64
    """Sequences in one step."""
    chunk_tokens: Positive = 512
    """Prompt tokens of one sequence in one step; a ticket follows each chunk."""
    max_encoder_tokens: Positive = 2048
    """Encoder input read in one step, over all sequences; an input is read in one piece. Models with an encoder."""
    max_waiting: Positive = 256
    """Requests a worker queues; the next one is answered BUSY."""
    max_pull_wait_s: Seconds = 10.0
    """A reservation that has waited this long for its source is released and queued again."""
    handover_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 10.0
    """A worker that leaves, or gives up its role, lets streams go on for this long; then others take them over."""


class PoolConfig(Section):
    workers: Count = 1
    """Workers in the pool."""
    min_workers: Positive = 1
    """The fewest that autoscaling leaves."""
    max_workers: Positive | None = None
    """The most that autoscaling starts; none: the pool is not scaled."""
    roles: tuple[Role, ...] = ()
    """What its workers accept; empty: the stage that the pool is named after."""
    cpus: Annotated[float, Field(ge=0)] = 1.0
    """CPU cores that a worker reserves in Ray (a scheduling figure, not a cap)."""
    gpus: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """GPUs per worker: whole ones, or a part of one that workers share."""
    threads: Positive = 1
    """Threads for the tensor arithmetic of a worker on CPU."""
    num_blocks: Positive | None = None
    """Overrides `kv.num_blocks` for this pool."""


class RouterConfig(Section):
    policy: Literal["kv_aware", "least_loaded", "round_robin"] = "kv_aware"
    """How a worker is chosen among those that fit: by what is cached where, what waits there and what moving blocks
    costs; by what waits there; in turn."""
    prefill_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.0
    """kv_aware: what computing a block weighs, where waiting for one weighs 1: it delays those that come later, too."""
    decode_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """kv_aware: blocks of prefill work that one more request on a decode worker weighs."""
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """kv_aware: 0 takes the cheapest way; above it dearer ones too, e-fold rarer with each `temperature` blocks."""
    affinity_header: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")] | None = None
    """HTTP header whose value names a session; requests of one session go to one worker. None: no sessions."""
    affinity_blocks: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 32.0
    """kv_aware: a session leaves its worker when another one costs so many blocks less."""
    local_prefill: Literal["never", "fallback", "conditional", "always"] = "fallback"
    """May a decode worker compute a prompt itself: never; only when every source is gone; also when little of it is
    left to compute or every source has too much to do; always. Counted."""
    local_max_tokens: Count = 128
    """local_prefill = conditional: so many tokens that the decode worker has not cached are little."""
    saturated_tokens: Positive = 16384
    """local_prefill = conditional: a source with so many queued prompt tokens has too much to do."""
    spare: bool = True
    """Name a second source in the plan, for when the first one dies."""
    max_attempts: Positive = 3
    """Workers that may be tried for one request, the first included."""
    worker_wait_s: Seconds = 15.0
    """How long a request waits for a worker when none is there; then it is answered 503."""
    kept_routes: Count = 256
    """Requests of which each replica can say how they were routed: the last ones."""


class TransferConfig(Section):
    transport: Literal["auto", "nixl", "ipc"] = "auto"
    """auto: between the GPUs of one host by a kernel that reads memory opened by CUDA IPC, where that is measured to be
    faster than NIXL, and everything else by NIXL, over whatever UCX finds; nixl: everything; ipc: as auto without
    measuring, and a worker that cannot does not start."""
    late_read_s: Seconds = 5.0
    """T: a read that took longer is thrown away; abandoned blocks stay in quarantine for 2 T."""
    stuck_read_s: Seconds = 15.0
    """A read that has not completed after this long is given up and its blocks are quarantined."""
    lease_s: Seconds = 10.0
    """Life of a lease on the source's blocks; heartbeats of the session renew it."""
    fetch_peers: Annotated[int, Field(ge=0)] = 16
    """Workers beside its sources that a worker is paired with, to fetch prefixes from their caches; 0: none."""
    ucx_tls: str = "auto"
    """UCX_TLS for NIXL; auto leaves the choice to UCX. Two simulated hosts need "tcp,self"."""


class HttpConfig(Section):
    host: str = "127.0.0.1"
    """Address of the public endpoint."""
    port: Port = 8000
    """Port of the public endpoint; 0: any free one."""
    replicas: Positive = 1
    """Ingress replicas."""
    max_ongoing_requests: Positive = 1024
    """Requests Serve lets into one replica; above `limits.max_requests` and `limits.max_queued` together, so that ours
    is the limit that answers."""
    request_timeout_s: Seconds = 300.0
    """Deadline of a request that names none, and the longest that a request may name."""
    api_keys_file: str | None = None
    """File on every node of ingress replicas with a line NAME KEY or NAME sha256:HEXDIGITS per client, its limits after
    it (docs/api.md); none: no key is asked for."""
    api_keys_env: str | None = None
    """Environment variable of the ingress replicas that holds the same lines, instead of the file."""
    drain_s: Seconds = 300.0
    """How long a stopping replica lets open requests end; not less than `request_timeout_s`."""


class LimitsConfig(Section):
    max_requests: Positive = 512
    """Requests that run, over all ingress replicas; the next ones wait."""
    max_queued: Count = 256
    """Requests that wait, over all ingress replicas; the next one is answered 429."""
    max_ttft_s: Seconds | None = None
    """A request whose first token is expected later is answered 429 at once; none: its own deadline counts."""
    max_prompt_tokens: Positive | None = None
    """Longest prompt; none: as the model allows."""
    max_samples: Positive = 32
    """Samples of one prompt that a request may ask for, and sequences of one request that run at once."""
    max_body_bytes: Positive = 8 << 20
    """Longest HTTP request body."""
    max_encoder_output_bytes: Annotated[int, Field(ge=1, le=48 << 20)] = 16 << 20
    """Of the hidden states, as float32, that a request may ask for with `return_encoder_output`."""


class ControllerConfig(Section):
    ingress_lease_s: Seconds = 60.0
    """With no ingress for this long, the controller drains and removes everything."""
    start_timeout_s: Seconds = 300.0
    """A worker that is not ready after this long is replaced."""
    drain_timeout_s: Seconds = 300.0
    """A worker that is still busy this long after it was told to drain is stopped."""
    check_s: Seconds = 0.5
    """Time between two looks at the workers."""


class AutoscalingConfig(Section):
    enabled: bool = False
    """Scale the pools that name `max_workers`; `workers` is then what they begin with."""
    ttft_s: Seconds = 1.0
    """Prompts that wait should be computed within this."""
    inter_token_s: Seconds = 0.1
    """Between two tokens of a stream no more than this should pass."""
    utilization: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Share of its time that a worker should compute prompts, and of its places and blocks that streams should fill."""
    up_after_s: Seconds = 3.0
    """A pool that is too small for this long grows."""
    down_after_s: Seconds = 120.0
    """A pool that is too large for this long shrinks."""
    switch_roles: bool = False
    """In a scaled pool with the roles prefill and decode each worker has one of them, as the load asks; they change it
    without a restart. Otherwise each has both."""


class LogConfig(Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe level that is written."""
    format: Literal["human", "json"] = "human"
    """One line per event, for people or for machines."""


def _default_pools() -> dict[str, PoolConfig]:
    return {role.value: PoolConfig(roles=(role,)) for role in (Role.PREFILL, Role.DECODE)}


class SluiceConfig(Section):
    name: Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$")] = "sluice"
    """Of the app: its controller, actors and placement groups are named after it."""
    model: ModelConfig
    engine: EngineConfig = EngineConfig()
    kv: KvConfig = KvConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    pools: Annotated[dict[str, PoolConfig], Field(default_factory=_default_pools)]
    """By name; a pool named encode, prefill or decode has that role unless it names others."""
    router: RouterConfig = RouterConfig()
    transfer: TransferConfig = TransferConfig()
    words: WordsConfig = WordsConfig()
    http: HttpConfig = HttpConfig()
    limits: LimitsConfig = LimitsConfig()
    controller: ControllerConfig = ControllerConfig()
    autoscaling: AutoscalingConfig = AutoscalingConfig()
    log: LogConfig = LogConfig()
    traces: TracesConfig = TracesConfig()

    @model_validator(mode="before")
    @classmethod
    def _name_roles(cls, data: object) -> object:
        """Fills in the roles of pools named after a stage and the GPUs of workers that compute on one, and drops pools
        that an override set to null."""
        if not isinstance(data, Mapping) or not isinstance(data.get("pools"), Mapping):
            return data
        pools: dict[object, object] = {}
        engine = data.get("engine")
        on_gpu = isinstance(engine, Mapping) and engine.get("device") == "cuda"
        for name, pool in data["pools"].items():
            if pool is None:
                continue
            pools[name] = pool
            if isinstance(pool, Mapping):
                roles = {"roles": [name]} if not pool.get("roles") and name in set(Role) else {}
                gpus = {"gpus": 1} if on_gpu and "gpus" not in pool else {}
                pools[name] = {**pool, **roles, **gpus}
        return {**data, "pools": pools}

    @model_validator(mode="after")
    def _agree(self) -> SluiceConfig:
        """What two keys must agree on. Paths are absolute, so errors need no location of their own."""
        kv, scheduler, transfer, words = self.kv, self.scheduler, self.transfer, self.words
        demand(
            kv.num_blocks is None or kv.memory_bytes is None,
            "kv.memory_bytes",
            "kv.num_blocks is set too; remove one of the two",
        )
        demand(
            scheduler.chunk_tokens <= scheduler.max_batched_tokens,
            "scheduler.chunk_tokens",
            f"{scheduler.chunk_tokens} is over scheduler.max_batched_tokens = {scheduler.max_batched_tokens}; lower it",
        )
        demand(
            scheduler.max_sequences <= scheduler.max_batched_tokens,
            "scheduler.max_sequences",
            f"{scheduler.max_sequences} is over scheduler.max_batched_tokens = {scheduler.max_batched_tokens}: "
            "every sequence needs a token of the step; lower it",
        )
        demand(
            transfer.stuck_read_s >= transfer.late_read_s,
            "transfer.stuck_read_s",
            f"{transfer.stuck_read_s} is under transfer.late_read_s = {transfer.late_read_s}; raise it",
        )
        demand(
            transfer.lease_s > 2 * words.heartbeat_s,
            "transfer.lease_s",
            f"{transfer.lease_s} leaves no two heartbeats ({words.heartbeat_s} s) to renew a lease; raise it",
        )
        demand(
            self.http.max_ongoing_requests > self.limits.max_requests + self.limits.max_queued,
            "http.max_ongoing_requests",
            f"{self.http.max_ongoing_requests} is not over limits.max_requests = {self.limits.max_requests} and "
            f"limits.max_queued = {self.limits.max_queued} together, so Serve would queue silently what we answer with "
            "429; raise it",
        )
        demand(
            self.http.api_keys_file is None or self.http.api_keys_env is None,
            "http.api_keys_env",
            "http.api_keys_file is set too; remove one of the two",
        )
        demand(
            self.http.drain_s >= self.http.request_timeout_s,
            "http.drain_s",
            f"{self.http.drain_s} is under http.request_timeout_s = {self.http.request_timeout_s}, "
            "so a redeploy would cut streams; raise it",
        )
        demand(
            not self.engine.overlap or self.engine.speculation is None,
            "engine.overlap",
            f"true, but engine.speculation = {self.engine.speculation} must know the tokens of a step before the next "
            "one is planned; remove one of the two",
        )
        self._check_pools()
        return self

    def _check_pools(self) -> None:
        known = "pools with roles: " + (", ".join(name for name, pool in self.pools.items() if pool.roles) or "none")
        for name, pool in self.pools.items():
            demand(name.isidentifier(), f"pools.{name}", "a pool's name is letters, digits and _; rename it")
            demand(bool(pool.roles), f"pools.{name}.roles", f"name the roles, some of {', '.join(Role)}; {known}")
            demand(
                len(set(pool.roles)) == len(pool.roles),
                f"pools.{name}.roles",
                f"{', '.join(pool.roles)} names a role twice",
            )
            demand(
                pool.gpus <= 1 or pool.gpus.is_integer(),
                f"pools.{name}.gpus",
                f"{pool.gpus:g} is neither a number of GPUs nor a part of one; give {int(pool.gpus)} or under 1",
            )
            demand(
                not pool.gpus or self.engine.device != "cpu",
                f"pools.{name}.gpus",
                f"{pool.gpus:g}, but engine.device=cpu uses none; remove it, or set engine.device=auto",
            )
            demand(
                pool.gpus > 0 or self.engine.device != "cuda",
                f"pools.{name}.gpus",
                "0, but engine.device=cuda needs a GPU or a part of one; remove it, or set engine.device=auto",
            )
            most = pool.workers if pool.max_workers is None else pool.max_workers
            demand(
                pool.max_workers is None or pool.min_workers <= pool.workers <= most,
                f"pools.{name}.workers",
                f"{pool.workers} is not between min_workers = {pool.min_workers} and max_workers = {most}",
            )
        scaled = any(pool.max_workers is not None for pool in self.pools.values())
        demand(
            scaled or not self.autoscaling.enabled,
            "autoscaling.enabled",
            "no pool may be scaled; set pools.NAME.max_workers of one",
        )
        staffed = {role for pool in self.pools.values() if pool.workers for role in pool.roles}
        demand(Role.DECODE in staffed, "pools", "no pool has a worker with the role decode; add one")
        demand(
            Role.PREFILL in staffed or self.router.local_prefill == "always",
            "pools",
            "no pool has a worker with the role prefill; add one, or set router.local_prefill=always",
        )

    @property
    def served_name(self) -> str:
        return self.model.served_name or self.model.path.rstrip("/").rpartition("/")[2] or self.model.path

    def in_ray(self, pool: str) -> SluiceConfig:
        """As the actors of a pool have it: Ray shows those that asked for no GPU all there are, and they use none."""
        if self.engine.device != "auto" or self.pools[pool].gpus:
            return self
        return self.model_copy(update={"engine": self.engine.model_copy(update={"device": "cpu"})})
