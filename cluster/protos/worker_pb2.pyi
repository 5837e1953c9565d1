from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PeerKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PEER_KIND_UNSPECIFIED: _ClassVar[PeerKind]
    INGRESS: _ClassVar[PeerKind]
    WORKER: _ClassVar[PeerKind]
    TOOL: _ClassVar[PeerKind]

class Stage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STAGE_UNSPECIFIED: _ClassVar[Stage]
    ENCODE: _ClassVar[Stage]
    PREFILL: _ClassVar[Stage]
    DECODE: _ClassVar[Stage]

class ErrorCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ERROR_UNSPECIFIED: _ClassVar[ErrorCode]
    INVALID: _ClassVar[ErrorCode]
    UNAUTHENTICATED: _ClassVar[ErrorCode]
    TOO_LONG: _ClassVar[ErrorCode]
    BUSY: _ClassVar[ErrorCode]
    NO_WORKER: _ClassVar[ErrorCode]
    DEADLINE: _ClassVar[ErrorCode]
    CANCELLED: _ClassVar[ErrorCode]
    PEER_LOST: _ClassVar[ErrorCode]
    INTERNAL: _ClassVar[ErrorCode]
    INCOMPATIBLE: _ClassVar[ErrorCode]
    STALE: _ClassVar[ErrorCode]
    DRAINING: _ClassVar[ErrorCode]
    OVERFLOW: _ClassVar[ErrorCode]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_UNSPECIFIED: _ClassVar[FinishReason]
    STOP: _ClassVar[FinishReason]
    LENGTH: _ClassVar[FinishReason]
    ERROR: _ClassVar[FinishReason]

class EarlyStopping(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STOP_UNLIKELY: _ClassVar[EarlyStopping]
    STOP_AT_ONCE: _ClassVar[EarlyStopping]
    STOP_IMPOSSIBLE: _ClassVar[EarlyStopping]

class GrammarKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GRAMMAR_UNSPECIFIED: _ClassVar[GrammarKind]
    JSON_SCHEMA: _ClassVar[GrammarKind]
    REGEX: _ClassVar[GrammarKind]
    LARK: _ClassVar[GrammarKind]

class Pooling(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    POOL_NONE: _ClassVar[Pooling]
    POOL_LAST: _ClassVar[Pooling]
    POOL_MEAN: _ClassVar[Pooling]
    POOL_STATES: _ClassVar[Pooling]

class StageKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STAGE_KIND_UNSPECIFIED: _ClassVar[StageKind]
    ENCODING: _ClassVar[StageKind]
    PREFILLING: _ClassVar[StageKind]
    TRANSFERRING: _ClassVar[StageKind]
    DECODING: _ClassVar[StageKind]
PEER_KIND_UNSPECIFIED: PeerKind
INGRESS: PeerKind
WORKER: PeerKind
TOOL: PeerKind
STAGE_UNSPECIFIED: Stage
ENCODE: Stage
PREFILL: Stage
DECODE: Stage
ERROR_UNSPECIFIED: ErrorCode
INVALID: ErrorCode
UNAUTHENTICATED: ErrorCode
TOO_LONG: ErrorCode
BUSY: ErrorCode
NO_WORKER: ErrorCode
DEADLINE: ErrorCode
CANCELLED: ErrorCode
PEER_LOST: ErrorCode
INTERNAL: ErrorCode
INCOMPATIBLE: ErrorCode
STALE: ErrorCode
DRAINING: ErrorCode
OVERFLOW: ErrorCode
FINISH_UNSPECIFIED: FinishReason
STOP: FinishReason
LENGTH: FinishReason
ERROR: FinishReason
STOP_UNLIKELY: EarlyStopping
STOP_AT_ONCE: EarlyStopping
STOP_IMPOSSIBLE: EarlyStopping
GRAMMAR_UNSPECIFIED: GrammarKind
JSON_SCHEMA: GrammarKind
REGEX: GrammarKind
LARK: GrammarKind
POOL_NONE: Pooling
POOL_LAST: Pooling
POOL_MEAN: Pooling
POOL_STATES: Pooling
STAGE_KIND_UNSPECIFIED: StageKind
ENCODING: StageKind
PREFILLING: StageKind
TRANSFERRING: StageKind
DECODING: StageKind

class RankInfo(_message.Message):
    __slots__ = ("rank", "shard", "tp_rank", "tp_size")
    RANK_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    TP_RANK_FIELD_NUMBER: _ClassVar[int]
    TP_SIZE_FIELD_NUMBER: _ClassVar[int]
    rank: int
    shard: int
    tp_rank: int
    tp_size: int
    def __init__(self, rank: _Optional[int] = ..., shard: _Optional[int] = ..., tp_rank: _Optional[int] = ..., tp_size: _Optional[int] = ...) -> None: ...

class Identity(_message.Message):
    __slots__ = ("kind", "name", "incarnation", "compatibility_hash", "roles", "ranks")
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    COMPATIBILITY_HASH_FIELD_NUMBER: _ClassVar[int]
    ROLES_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    kind: PeerKind
    name: str
    incarnation: str
    compatibility_hash: bytes
    roles: _containers.RepeatedScalarFieldContainer[Stage]
    ranks: _containers.RepeatedCompositeFieldContainer[RankInfo]
    def __init__(self, kind: _Optional[_Union[PeerKind, str]] = ..., name: _Optional[str] = ..., incarnation: _Optional[str] = ..., compatibility_hash: _Optional[bytes] = ..., roles: _Optional[_Iterable[_Union[Stage, str]]] = ..., ranks: _Optional[_Iterable[_Union[RankInfo, _Mapping]]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("identity", "protocol_min", "protocol_max", "epoch", "nonce")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_MIN_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_MAX_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    identity: Identity
    protocol_min: int
    protocol_max: int
    epoch: int
    nonce: bytes
    def __init__(self, identity: _Optional[_Union[Identity, _Mapping]] = ..., protocol_min: _Optional[int] = ..., protocol_max: _Optional[int] = ..., epoch: _Optional[int] = ..., nonce: _Optional[bytes] = ...) -> None: ...

class Challenge(_message.Message):
    __slots__ = ("identity", "protocol", "nonce", "proof")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    identity: Identity
    protocol: int
    nonce: bytes
    proof: bytes
    def __init__(self, identity: _Optional[_Union[Identity, _Mapping]] = ..., protocol: _Optional[int] = ..., nonce: _Optional[bytes] = ..., proof: _Optional[bytes] = ...) -> None: ...

class Proof(_message.Message):
    __slots__ = ("proof",)
    PROOF_FIELD_NUMBER: _ClassVar[int]
    proof: bytes
    def __init__(self, proof: _Optional[bytes] = ...) -> None: ...

class Ready(_message.Message):
    __slots__ = ("epoch", "bulk_token")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BULK_TOKEN_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    bulk_token: bytes
    def __init__(self, epoch: _Optional[int] = ..., bulk_token: _Optional[bytes] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: ErrorCode
    message: str
    def __init__(self, code: _Optional[_Union[ErrorCode, str]] = ..., message: _Optional[str] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("sequence", "step_age_ms", "has_work")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    STEP_AGE_MS_FIELD_NUMBER: _ClassVar[int]
    HAS_WORK_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    step_age_ms: int
    has_work: bool
    def __init__(self, sequence: _Optional[int] = ..., step_age_ms: _Optional[int] = ..., has_work: _Optional[bool] = ...) -> None: ...

class Unsupported(_message.Message):
    __slots__ = ("field_number",)
    FIELD_NUMBER_FIELD_NUMBER: _ClassVar[int]
    field_number: int
    def __init__(self, field_number: _Optional[int] = ...) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("key", "index", "last", "payload")
    KEY_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    key: RequestKey
    index: int
    last: bool
    payload: bytes
    def __init__(self, key: _Optional[_Union[RequestKey, _Mapping]] = ..., index: _Optional[int] = ..., last: _Optional[bool] = ..., payload: _Optional[bytes] = ...) -> None: ...

class RequestKey(_message.Message):
    __slots__ = ("request_id", "attempt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "seed", "stop_token_ids", "ignore_eos", "min_p", "sample", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias_ids", "logit_bias_values", "bad_words", "num_logprobs", "num_prompt_logprobs", "grammar", "pooling", "no_repeat_ngram_size", "beams")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_VALUES_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_FIELD_NUMBER: _ClassVar[int]
    NUM_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    NO_REPEAT_NGRAM_SIZE_FIELD_NUMBER: _ClassVar[int]
    BEAMS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    min_p: float
    sample: int
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias_ids: _containers.RepeatedScalarFieldContainer[int]
    logit_bias_values: _containers.RepeatedScalarFieldContainer[float]
    bad_words: _containers.RepeatedCompositeFieldContainer[BadWord]
    num_logprobs: int
    num_prompt_logprobs: int
    grammar: Grammar
    pooling: Pooling
    no_repeat_ngram_size: int
    beams: Beams
    def __init__(self, max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., seed: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., min_p: _Optional[float] = ..., sample: _Optional[int] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., logit_bias_ids: _Optional[_Iterable[int]] = ..., logit_bias_values: _Optional[_Iterable[float]] = ..., bad_words: _Optional[_Iterable[_Union[BadWord, _Mapping]]] = ..., num_logprobs: _Optional[int] = ..., num_prompt_logprobs: _Optional[int] = ..., grammar: _Optional[_Union[Grammar, _Mapping]] = ..., pooling: _Optional[_Union[Pooling, str]] = ..., no_repeat_ngram_size: _Optional[int] = ..., beams: _Optional[_Union[Beams, _Mapping]] = ...) -> None: ...

class Beams(_message.Message):
    __slots__ = ("num_beams", "num_returned", "length_penalty", "early_stopping")
    NUM_BEAMS_FIELD_NUMBER: _ClassVar[int]
    NUM_RETURNED_FIELD_NUMBER: _ClassVar[int]
    LENGTH_PENALTY_FIELD_NUMBER: _ClassVar[int]
    EARLY_STOPPING_FIELD_NUMBER: _ClassVar[int]
    num_beams: int
    num_returned: int
    length_penalty: float
    early_stopping: EarlyStopping
    def __init__(self, num_beams: _Optional[int] = ..., num_returned: _Optional[int] = ..., length_penalty: _Optional[float] = ..., early_stopping: _Optional[_Union[EarlyStopping, str]] = ...) -> None: ...

class Hypothesis(_message.Message):
    __slots__ = ("token_ids", "score", "finish")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    score: float
    finish: FinishReason
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., score: _Optional[float] = ..., finish: _Optional[_Union[FinishReason, str]] = ...) -> None: ...

class BadWord(_message.Message):
    __slots__ = ("token_ids",)
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Grammar(_message.Message):
    __slots__ = ("kind", "text")
    KIND_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    kind: GrammarKind
    text: str
    def __init__(self, kind: _Optional[_Union[GrammarKind, str]] = ..., text: _Optional[str] = ...) -> None: ...

class TokenLogprobs(_message.Message):
    __slots__ = ("logprob", "top_ids", "top_logprobs")
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    logprob: float
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, logprob: _Optional[float] = ..., top_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class WorkerRef(_message.Message):
    __slots__ = ("name", "incarnation", "shard")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    name: str
    incarnation: str
    shard: int
    def __init__(self, name: _Optional[str] = ..., incarnation: _Optional[str] = ..., shard: _Optional[int] = ...) -> None: ...

class StagePlan(_message.Message):
    __slots__ = ("stage", "worker", "spare", "holding")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    SPARE_FIELD_NUMBER: _ClassVar[int]
    HOLDING_FIELD_NUMBER: _ClassVar[int]
    stage: Stage
    worker: WorkerRef
    spare: WorkerRef
    holding: Holding
    def __init__(self, stage: _Optional[_Union[Stage, str]] = ..., worker: _Optional[_Union[WorkerRef, _Mapping]] = ..., spare: _Optional[_Union[WorkerRef, _Mapping]] = ..., holding: _Optional[_Union[Holding, _Mapping]] = ...) -> None: ...

class Holding(_message.Message):
    __slots__ = ("holder", "num_blocks")
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    holder: WorkerRef
    num_blocks: int
    def __init__(self, holder: _Optional[_Union[WorkerRef, _Mapping]] = ..., num_blocks: _Optional[int] = ...) -> None: ...

class Fetched(_message.Message):
    __slots__ = ("holder", "blocks", "bytes", "seconds", "tokens")
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    holder: WorkerRef
    blocks: int
    bytes: int
    seconds: float
    tokens: int
    def __init__(self, holder: _Optional[_Union[WorkerRef, _Mapping]] = ..., blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., seconds: _Optional[float] = ..., tokens: _Optional[int] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("stages", "local_prefill_allowed")
    STAGES_FIELD_NUMBER: _ClassVar[int]
    LOCAL_PREFILL_ALLOWED_FIELD_NUMBER: _ClassVar[int]
    stages: _containers.RepeatedCompositeFieldContainer[StagePlan]
    local_prefill_allowed: bool
    def __init__(self, stages: _Optional[_Iterable[_Union[StagePlan, _Mapping]]] = ..., local_prefill_allowed: _Optional[bool] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("key", "plan", "prompt_token_ids", "emitted_token_ids", "sampling", "priority", "deadline_ms", "block_hashes", "shard", "leader_id", "chain_root", "encoder_token_ids", "traceparent")
    KEY_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    EMITTED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    LEADER_ID_FIELD_NUMBER: _ClassVar[int]
    CHAIN_ROOT_FIELD_NUMBER: _ClassVar[int]
    ENCODER_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    key: RequestKey
    plan: Plan
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    emitted_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: SamplingParams
    priority: int
    deadline_ms: int
    block_hashes: bytes
    shard: int
    leader_id: str
    chain_root: bytes
    encoder_token_ids: _containers.RepeatedScalarFieldContainer[int]
    traceparent: str
    def __init__(self, key: _Optional[_Union[RequestKey, _Mapping]] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., emitted_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., priority: _Optional[int] = ..., deadline_ms: _Optional[int] = ..., block_hashes: _Optional[bytes] = ..., shard: _Optional[int] = ..., leader_id: _Optional[str] = ..., chain_root: _Optional[bytes] = ..., encoder_token_ids: _Optional[_Iterable[int]] = ..., traceparent: _Optional[str] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("key", "reason")
    KEY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    key: RequestKey
    reason: str
    def __init__(self, key: _Optional[_Union[RequestKey, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: ErrorCode
    message: str
    def __init__(self, code: _Optional[_Union[ErrorCode, str]] = ..., message: _Optional[str] = ...) -> None: ...

class SequenceTokens(_message.Message):
    __slots__ = ("key", "sample", "first_token_index", "token_ids", "finish", "failure", "route", "logprobs", "prompt_logprobs", "first_prompt_logprob", "embedding", "stages", "hypotheses")
    KEY_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FIRST_PROMPT_LOGPROB_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    HYPOTHESES_FIELD_NUMBER: _ClassVar[int]
    key: RequestKey
    sample: int
    first_token_index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    finish: FinishReason
    failure: Failure
    route: Route
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    first_prompt_logprob: int
    embedding: bytes
    stages: _containers.RepeatedCompositeFieldContainer[StageReport]
    hypotheses: _containers.RepeatedCompositeFieldContainer[Hypothesis]
    def __init__(self, key: _Optional[_Union[RequestKey, _Mapping]] = ..., sample: _Optional[int] = ..., first_token_index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., finish: _Optional[_Union[FinishReason, str]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., route: _Optional[_Union[Route, _Mapping]] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ..., first_prompt_logprob: _Optional[int] = ..., embedding: _Optional[bytes] = ..., stages: _Optional[_Iterable[_Union[StageReport, _Mapping]]] = ..., hypotheses: _Optional[_Iterable[_Union[Hypothesis, _Mapping]]] = ...) -> None: ...

class StageReport(_message.Message):
    __slots__ = ("number", "kind", "worker", "began_s", "ended_s", "error", "tokens", "prefix_hit_tokens", "chunks", "blocks", "bytes", "read_s", "transport", "queue_s", "compute_s", "pid", "fetched")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    BEGAN_S_FIELD_NUMBER: _ClassVar[int]
    ENDED_S_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    READ_S_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    FETCHED_FIELD_NUMBER: _ClassVar[int]
    number: int
    kind: StageKind
    worker: WorkerRef
    began_s: float
    ended_s: float
    error: str
    tokens: int
    prefix_hit_tokens: int
    chunks: int
    blocks: int
    bytes: int
    read_s: float
    transport: str
    queue_s: float
    compute_s: float
    pid: int
    fetched: Fetched
    def __init__(self, number: _Optional[int] = ..., kind: _Optional[_Union[StageKind, str]] = ..., worker: _Optional[_Union[WorkerRef, _Mapping]] = ..., began_s: _Optional[float] = ..., ended_s: _Optional[float] = ..., error: _Optional[str] = ..., tokens: _Optional[int] = ..., prefix_hit_tokens: _Optional[int] = ..., chunks: _Optional[int] = ..., blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., read_s: _Optional[float] = ..., transport: _Optional[str] = ..., queue_s: _Optional[float] = ..., compute_s: _Optional[float] = ..., pid: _Optional[int] = ..., fetched: _Optional[_Union[Fetched, _Mapping]] = ...) -> None: ...

class StepTokens(_message.Message):
    __slots__ = ("step", "sequences")
    STEP_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    step: int
    sequences: _containers.RepeatedCompositeFieldContainer[SequenceTokens]
    def __init__(self, step: _Optional[int] = ..., sequences: _Optional[_Iterable[_Union[SequenceTokens, _Mapping]]] = ...) -> None: ...

class Route(_message.Message):
    __slots__ = ("decode", "decode_pid", "prefill", "prefill_pid", "transport", "prompt_tokens", "decode_prefix_hit_tokens", "prefill_prefix_hit_tokens", "chunks", "blocks", "bytes", "transfer_s", "local_prefill", "preemptions", "spare_used", "recomputed_tokens", "queue_s", "prefill_s", "fetched", "skipped_blocks", "encoded")
    DECODE_FIELD_NUMBER: _ClassVar[int]
    DECODE_PID_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    PREFILL_PID_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DECODE_PREFIX_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_PREFIX_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    LOCAL_PREFILL_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    SPARE_USED_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    FETCHED_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ENCODED_FIELD_NUMBER: _ClassVar[int]
    decode: WorkerRef
    decode_pid: int
    prefill: WorkerRef
    prefill_pid: int
    transport: str
    prompt_tokens: int
    decode_prefix_hit_tokens: int
    prefill_prefix_hit_tokens: int
    chunks: int
    blocks: int
    bytes: int
    transfer_s: float
    local_prefill: bool
    preemptions: int
    spare_used: int
    recomputed_tokens: int
    queue_s: float
    prefill_s: float
    fetched: Fetched
    skipped_blocks: int
    encoded: Encoded
    def __init__(self, decode: _Optional[_Union[WorkerRef, _Mapping]] = ..., decode_pid: _Optional[int] = ..., prefill: _Optional[_Union[WorkerRef, _Mapping]] = ..., prefill_pid: _Optional[int] = ..., transport: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., decode_prefix_hit_tokens: _Optional[int] = ..., prefill_prefix_hit_tokens: _Optional[int] = ..., chunks: _Optional[int] = ..., blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., transfer_s: _Optional[float] = ..., local_prefill: _Optional[bool] = ..., preemptions: _Optional[int] = ..., spare_used: _Optional[int] = ..., recomputed_tokens: _Optional[int] = ..., queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., fetched: _Optional[_Union[Fetched, _Mapping]] = ..., skipped_blocks: _Optional[int] = ..., encoded: _Optional[_Union[Encoded, _Mapping]] = ...) -> None: ...

class Encoded(_message.Message):
    __slots__ = ("encode", "tokens", "blocks", "bytes", "seconds", "lost")
    ENCODE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    encode: WorkerRef
    tokens: int
    blocks: int
    bytes: int
    seconds: float
    lost: int
    def __init__(self, encode: _Optional[_Union[WorkerRef, _Mapping]] = ..., tokens: _Optional[int] = ..., blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., seconds: _Optional[float] = ..., lost: _Optional[int] = ...) -> None: ...

class KvRequest(_message.Message):
    __slots__ = ("key", "shard", "token_ids", "num_prompt_tokens", "block_hashes", "first_block", "sampling", "priority", "deadline_ms", "ask", "holding", "chain_root", "encoder_token_ids", "encoders")
    KEY_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    ASK_FIELD_NUMBER: _ClassVar[int]
    HOLDING_FIELD_NUMBER: _ClassVar[int]
    CHAIN_ROOT_FIELD_NUMBER: _ClassVar[int]
    ENCODER_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ENCODERS_FIELD_NUMBER: _ClassVar[int]
    key: RequestKey
    shard: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_prompt_tokens: int
    block_hashes: bytes
    first_block: int
    sampling: SamplingParams
    priority: int
    deadline_ms: int
    ask: int
    holding: Holding
    chain_root: bytes
    encoder_token_ids: _containers.RepeatedScalarFieldContainer[int]
    encoders: _containers.RepeatedCompositeFieldContainer[WorkerRef]
    def __init__(self, key: _Optional[_Union[RequestKey, _Mapping]] = ..., shard: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., num_prompt_tokens: _Optional[int] = ..., block_hashes: _Optional[bytes] = ..., first_block: _Optional[int] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., priority: _Optional[int] = ..., deadline_ms: _Optional[int] = ..., ask: _Optional[int] = ..., holding: _Optional[_Union[Holding, _Mapping]] = ..., chain_root: _Optional[bytes] = ..., encoder_token_ids: _Optional[_Iterable[int]] = ..., encoders: _Optional[_Iterable[_Union[WorkerRef, _Mapping]]] = ...) -> None: ...

class EncodeRequest(_message.Message):
    __slots__ = ("key", "shard", "token_ids", "chain_root", "priority", "deadline_ms", "pooling")
    KEY_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CHAIN_ROOT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    key: RequestKey
    shard: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    chain_root: bytes
    priority: int
    deadline_ms: int
    pooling: Pooling
    def __init__(self, key: _Optional[_Union[RequestKey, _Mapping]] = ..., shard: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., chain_root: _Optional[bytes] = ..., priority: _Optional[int] = ..., deadline_ms: _Optional[int] = ..., pooling: _Optional[_Union[Pooling, str]] = ...) -> None: ...

class HeldRequest(_message.Message):
    __slots__ = ("key", "shard", "first_block", "block_hashes")
    KEY_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    key: RequestKey
    shard: int
    first_block: int
    block_hashes: bytes
    def __init__(self, key: _Optional[_Union[RequestKey, _Mapping]] = ..., shard: _Optional[int] = ..., first_block: _Optional[int] = ..., block_hashes: _Optional[bytes] = ...) -> None: ...

class BlockRun(_message.Message):
    __slots__ = ("group", "first_index", "block_ids", "generations")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    group: int
    first_index: int
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    generations: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, group: _Optional[int] = ..., first_index: _Optional[int] = ..., block_ids: _Optional[_Iterable[int]] = ..., generations: _Optional[_Iterable[int]] = ...) -> None: ...

class Handoff(_message.Message):
    __slots__ = ("token_ids", "logprobs", "embedding")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    embedding: bytes
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ..., embedding: _Optional[bytes] = ...) -> None: ...

class Ticket(_message.Message):
    __slots__ = ("key", "chunk", "runs", "num_tokens", "last", "handoff", "prefix_hit_tokens", "pid", "queue_s", "compute_s", "ask", "prompt_logprobs", "first_prompt_logprob", "fetched")
    KEY_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    ASK_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FIRST_PROMPT_LOGPROB_FIELD_NUMBER: _ClassVar[int]
    FETCHED_FIELD_NUMBER: _ClassVar[int]
    key: RequestKey
    chunk: int
    runs: _containers.RepeatedCompositeFieldContainer[BlockRun]
    num_tokens: int
    last: bool
    handoff: Handoff
    prefix_hit_tokens: int
    pid: int
    queue_s: float
    compute_s: float
    ask: int
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    first_prompt_logprob: int
    fetched: Fetched
    def __init__(self, key: _Optional[_Union[RequestKey, _Mapping]] = ..., chunk: _Optional[int] = ..., runs: _Optional[_Iterable[_Union[BlockRun, _Mapping]]] = ..., num_tokens: _Optional[int] = ..., last: _Optional[bool] = ..., handoff: _Optional[_Union[Handoff, _Mapping]] = ..., prefix_hit_tokens: _Optional[int] = ..., pid: _Optional[int] = ..., queue_s: _Optional[float] = ..., compute_s: _Optional[float] = ..., ask: _Optional[int] = ..., prompt_logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ..., first_prompt_logprob: _Optional[int] = ..., fetched: _Optional[_Union[Fetched, _Mapping]] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("key", "ask")
    KEY_FIELD_NUMBER: _ClassVar[int]
    ASK_FIELD_NUMBER: _ClassVar[int]
    key: RequestKey
    ask: int
    def __init__(self, key: _Optional[_Union[RequestKey, _Mapping]] = ..., ask: _Optional[int] = ...) -> None: ...

class KvFailed(_message.Message):
    __slots__ = ("key", "failure", "ask")
    KEY_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    ASK_FIELD_NUMBER: _ClassVar[int]
    key: RequestKey
    failure: Failure
    ask: int
    def __init__(self, key: _Optional[_Union[RequestKey, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., ask: _Optional[int] = ...) -> None: ...

class TransportQuery(_message.Message):
    __slots__ = ("transports",)
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    transports: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, transports: _Optional[_Iterable[str]] = ...) -> None: ...

class RegionOffer(_message.Message):
    __slots__ = ("group", "name", "address", "num_blocks", "block_bytes", "device")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    group: int
    name: str
    address: int
    num_blocks: int
    block_bytes: int
    device: int
    def __init__(self, group: _Optional[int] = ..., name: _Optional[str] = ..., address: _Optional[int] = ..., num_blocks: _Optional[int] = ..., block_bytes: _Optional[int] = ..., device: _Optional[int] = ...) -> None: ...

class RankOffer(_message.Message):
    __slots__ = ("rank", "shard", "tp_rank", "tp_size", "agent", "metadata", "regions", "generations", "ipc")
    RANK_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    TP_RANK_FIELD_NUMBER: _ClassVar[int]
    TP_SIZE_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    REGIONS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    IPC_FIELD_NUMBER: _ClassVar[int]
    rank: int
    shard: int
    tp_rank: int
    tp_size: int
    agent: str
    metadata: bytes
    regions: _containers.RepeatedCompositeFieldContainer[RegionOffer]
    generations: _containers.RepeatedCompositeFieldContainer[RegionOffer]
    ipc: IpcOffer
    def __init__(self, rank: _Optional[int] = ..., shard: _Optional[int] = ..., tp_rank: _Optional[int] = ..., tp_size: _Optional[int] = ..., agent: _Optional[str] = ..., metadata: _Optional[bytes] = ..., regions: _Optional[_Iterable[_Union[RegionOffer, _Mapping]]] = ..., generations: _Optional[_Iterable[_Union[RegionOffer, _Mapping]]] = ..., ipc: _Optional[_Union[IpcOffer, _Mapping]] = ...) -> None: ...

class IpcOffer(_message.Message):
    __slots__ = ("host", "spans")
    HOST_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    host: bytes
    spans: _containers.RepeatedCompositeFieldContainer[IpcSpan]
    def __init__(self, host: _Optional[bytes] = ..., spans: _Optional[_Iterable[_Union[IpcSpan, _Mapping]]] = ...) -> None: ...

class IpcSpan(_message.Message):
    __slots__ = ("address", "num_bytes", "handle")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    address: int
    num_bytes: int
    handle: bytes
    def __init__(self, address: _Optional[int] = ..., num_bytes: _Optional[int] = ..., handle: _Optional[bytes] = ...) -> None: ...

class TransportOffer(_message.Message):
    __slots__ = ("transport", "ranks", "late_read_ms", "failure")
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    LATE_READ_MS_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    transport: str
    ranks: _containers.RepeatedCompositeFieldContainer[RankOffer]
    late_read_ms: int
    failure: Failure
    def __init__(self, transport: _Optional[str] = ..., ranks: _Optional[_Iterable[_Union[RankOffer, _Mapping]]] = ..., late_read_ms: _Optional[int] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ...) -> None: ...

class GroupLoad(_message.Message):
    __slots__ = ("name", "num_blocks", "free", "filling", "ready", "cached", "quarantined")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FREE_FIELD_NUMBER: _ClassVar[int]
    FILLING_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    name: str
    num_blocks: int
    free: int
    filling: int
    ready: int
    cached: int
    quarantined: int
    def __init__(self, name: _Optional[str] = ..., num_blocks: _Optional[int] = ..., free: _Optional[int] = ..., filling: _Optional[int] = ..., ready: _Optional[int] = ..., cached: _Optional[int] = ..., quarantined: _Optional[int] = ...) -> None: ...

class LoadReport(_message.Message):
    __slots__ = ("shard", "num_waiting", "num_running", "num_pulling", "queued_prefill_tokens", "groups", "num_leases", "draining", "num_steps", "pairs", "last_event_id", "block_bytes", "prefill_tokens_per_s", "queued_encoder_tokens")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_PULLING_FIELD_NUMBER: _ClassVar[int]
    QUEUED_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    NUM_LEASES_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    PAIRS_FIELD_NUMBER: _ClassVar[int]
    LAST_EVENT_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    QUEUED_ENCODER_TOKENS_FIELD_NUMBER: _ClassVar[int]
    shard: int
    num_waiting: int
    num_running: int
    num_pulling: int
    queued_prefill_tokens: int
    groups: _containers.RepeatedCompositeFieldContainer[GroupLoad]
    num_leases: int
    draining: bool
    num_steps: int
    pairs: _containers.RepeatedCompositeFieldContainer[PairReport]
    last_event_id: int
    block_bytes: int
    prefill_tokens_per_s: float
    queued_encoder_tokens: int
    def __init__(self, shard: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_running: _Optional[int] = ..., num_pulling: _Optional[int] = ..., queued_prefill_tokens: _Optional[int] = ..., groups: _Optional[_Iterable[_Union[GroupLoad, _Mapping]]] = ..., num_leases: _Optional[int] = ..., draining: _Optional[bool] = ..., num_steps: _Optional[int] = ..., pairs: _Optional[_Iterable[_Union[PairReport, _Mapping]]] = ..., last_event_id: _Optional[int] = ..., block_bytes: _Optional[int] = ..., prefill_tokens_per_s: _Optional[float] = ..., queued_encoder_tokens: _Optional[int] = ...) -> None: ...

class PairReport(_message.Message):
    __slots__ = ("source_incarnation", "warm", "transport", "bytes_per_s")
    SOURCE_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    WARM_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    source_incarnation: str
    warm: bool
    transport: str
    bytes_per_s: float
    def __init__(self, source_incarnation: _Optional[str] = ..., warm: _Optional[bool] = ..., transport: _Optional[str] = ..., bytes_per_s: _Optional[float] = ...) -> None: ...

class BlockEvents(_message.Message):
    __slots__ = ("shard", "id", "cleared", "removed", "stored", "dump")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    CLEARED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    DUMP_FIELD_NUMBER: _ClassVar[int]
    shard: int
    id: int
    cleared: bool
    removed: bytes
    stored: bytes
    dump: bool
    def __init__(self, shard: _Optional[int] = ..., id: _Optional[int] = ..., cleared: _Optional[bool] = ..., removed: _Optional[bytes] = ..., stored: _Optional[bytes] = ..., dump: _Optional[bool] = ...) -> None: ...

class States(_message.Message):
    __slots__ = ("key", "dtype", "shape", "data")
    KEY_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    key: RequestKey
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, key: _Optional[_Union[RequestKey, _Mapping]] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class BlockQuery(_message.Message):
    __slots__ = ("shard", "last_id")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    LAST_ID_FIELD_NUMBER: _ClassVar[int]
    shard: int
    last_id: int
    def __init__(self, shard: _Optional[int] = ..., last_id: _Optional[int] = ...) -> None: ...

class AdminRequest(_message.Message):
    __slots__ = ("id", "clear_cache", "load")
    ID_FIELD_NUMBER: _ClassVar[int]
    CLEAR_CACHE_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    id: int
    clear_cache: bool
    load: bool
    def __init__(self, id: _Optional[int] = ..., clear_cache: _Optional[bool] = ..., load: _Optional[bool] = ...) -> None: ...

class AdminResponse(_message.Message):
    __slots__ = ("id", "load", "counters")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    id: int
    load: LoadReport
    counters: _containers.ScalarMap[str, float]
    def __init__(self, id: _Optional[int] = ..., load: _Optional[_Union[LoadReport, _Mapping]] = ..., counters: _Optional[_Mapping[str, float]] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("hello", "challenge", "proof", "ready", "refused", "heartbeat", "unsupported", "goodbye", "part", "submit", "cancel", "step_tokens", "kv_request", "ticket", "release", "kv_failed", "held_request", "encode_request", "transport_query", "transport_offer", "load_report", "admin_request", "admin_response", "block_query")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    UNSUPPORTED_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    STEP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_REQUEST_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    KV_FAILED_FIELD_NUMBER: _ClassVar[int]
    HELD_REQUEST_FIELD_NUMBER: _ClassVar[int]
    ENCODE_REQUEST_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_QUERY_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_OFFER_FIELD_NUMBER: _ClassVar[int]
    LOAD_REPORT_FIELD_NUMBER: _ClassVar[int]
    ADMIN_REQUEST_FIELD_NUMBER: _ClassVar[int]
    ADMIN_RESPONSE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_QUERY_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    challenge: Challenge
    proof: Proof
    ready: Ready
    refused: Refused
    heartbeat: Heartbeat
    unsupported: Unsupported
    goodbye: Goodbye
    part: Part
    submit: Submit
    cancel: Cancel
    step_tokens: StepTokens
    kv_request: KvRequest
    ticket: Ticket
    release: Release
    kv_failed: KvFailed
    held_request: HeldRequest
    encode_request: EncodeRequest
    transport_query: TransportQuery
    transport_offer: TransportOffer
    load_report: LoadReport
    admin_request: AdminRequest
    admin_response: AdminResponse
    block_query: BlockQuery
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., challenge: _Optional[_Union[Challenge, _Mapping]] = ..., proof: _Optional[_Union[Proof, _Mapping]] = ..., ready: _Optional[_Union[Ready, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., unsupported: _Optional[_Union[Unsupported, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ..., part: _Optional[_Union[Part, _Mapping]] = ..., submit: _Optional[_Union[Submit, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., step_tokens: _Optional[_Union[StepTokens, _Mapping]] = ..., kv_request: _Optional[_Union[KvRequest, _Mapping]] = ..., ticket: _Optional[_Union[Ticket, _Mapping]] = ..., release: _Optional[_Union[Release, _Mapping]] = ..., kv_failed: _Optional[_Union[KvFailed, _Mapping]] = ..., held_request: _Optional[_Union[HeldRequest, _Mapping]] = ..., encode_request: _Optional[_Union[EncodeRequest, _Mapping]] = ..., transport_query: _Optional[_Union[TransportQuery, _Mapping]] = ..., transport_offer: _Optional[_Union[TransportOffer, _Mapping]] = ..., load_report: _Optional[_Union[LoadReport, _Mapping]] = ..., admin_request: _Optional[_Union[AdminRequest, _Mapping]] = ..., admin_response: _Optional[_Union[AdminResponse, _Mapping]] = ..., block_query: _Optional[_Union[BlockQuery, _Mapping]] = ...) -> None: ...

class BulkFrame(_message.Message):
    __slots__ = ("incarnation", "epoch", "token", "message_id", "topic", "payload", "last")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    epoch: int
    token: bytes
    message_id: int
    topic: str
    payload: bytes
    last: bool
    def __init__(self, incarnation: _Optional[str] = ..., epoch: _Optional[int] = ..., token: _Optional[bytes] = ..., message_id: _Optional[int] = ..., topic: _Optional[str] = ..., payload: _Optional[bytes] = ..., last: _Optional[bool] = ...) -> None: ...
