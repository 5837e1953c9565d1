"""A checkpoint folder becomes a model: weights that are views of the mapped files, or random ones (dummy)."""

from __future__ import annotations

import json
import logging
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor, nn

from cluster.errors import CheckpointError
from cluster.hashing import HASH_BYTES
from cluster.log import Log
from workers.attention.environment import Environment
from workers.layers.block_fp8 import quantize_matrix
from workers.layers.gemm_resolver import DEEP_GEMM, GemmProblem, resolve_gemm
from workers.layers.linear import Embedding, Linear
from workers.models.checkpoint import Checkpoint, read_json
from workers.models.deepseek import DeepseekForCausalLM
from workers.models.encoder_decoder import FORCED_KEYS, EncoderDecoderModel, ForcedTokens
from workers.models.fields import ConfigFields
from workers.models.grouped_query import GqaForCausalLM
from workers.models.model import DTYPES, CausalModel, ModelSpec
from workers.models.quantization import SCALE_SUFFIX, STORED, BlockFp8, read_quantization
from workers.models.registry import find_model

_DERIVED = ("rotary_emb.inv_freq",)  # buffers that old checkpoints carry and everybody computes
_EMBEDDINGS = ("model.embed_tokens.weight", "shared.weight", "model.shared.weight")
CPU = torch.device("cpu")
_ABOUT_THE_FILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    model: CausalModel
    weights_identity: bytes  # 16 B: the stored weights, or the dummy seed
    ignored: tuple[str, ...]  # stored tensors that are not computed with, on purpose: drafts, rotary buffers
    config_json: str  # what config.json says about the model: one line, sorted, free of how the file came to be


def load(
    path: str | Path,
    *,
    dtype: str = "auto",
    load_format: str = "auto",
    dummy_seed: int = 0,
    log: Log | None = None,
    device: torch.device = CPU,
    environment: Environment | None = None,
) -> LoadedModel:
    """The model of a Hugging Face folder, on `device`. Says once in the log which stored tensors it leaves alone.

    `dtype` "auto" takes the checkpoint's. Where it equals the stored one nothing is copied: processes that load the
    same folder share its pages. Matrices in fp8 blocks stay so where `environment` says that they multiply so, see
    `workers.layers.gemm_resolver`; else, and without it, they are dequantised. `load_format` "dummy" needs config.json
    only; dummies are drawn on the device, and those of a GPU are not those of a CPU.
    Raises CheckpointError naming file, tensor or key, and the remedy; ConfigError where strict forbids dequantising.
    """
    folder = Path(path)
    config = read_json(folder / "config.json")
    model, checkpoint, quantization = _outline(folder, config, dtype, load_format)
    log = log or Log(logging.getLogger("sluice.models"))
    kept: Mapping[str, Linear] = {}
    if quantization is not None and environment is not None:
        choice = resolve_gemm(
            GemmProblem((quantization.rows, quantization.columns), model.spec.torch_dtype), environment
        )
        if environment.device_type != "cpu":
            log.info("matrices in fp8 blocks", model=str(folder), reason=str(choice))
        kept = _multiplied_in_fp8(model) if choice.chosen == DEEP_GEMM else {}
    if checkpoint is None:
        weights, ignored, identity = _dummy(model, dummy_seed, device), (), _dummy_identity(dummy_seed, device)
        scales = _quantize(weights, kept)
    else:
        weights, scales, ignored = _stored(model, checkpoint, model.spec, quantization, kept)
        if device != CPU:
            weights = {name: weight.to(device) for name, weight in weights.items()}
            scales = {name: each.to(device) for name, each in scales.items()}
        identity = checkpoint.identity()
    if ignored:
        log.info("tensors not computed with", model=str(folder), reason=f"drafts, derived or tied: {_some(ignored)}")
    model.load_state_dict(weights, assign=True)
    for name, each in scales.items():
        kept[name].scales = each
    stated = {key: value for key, value in config.items() if key not in _ABOUT_THE_FILE}
    return LoadedModel(model.eval(), identity, ignored, json.dumps(stated, sort_keys=True, separators=(",", ":")))


def outline(path: str | Path, *, dtype: str = "auto", load_format: str = "auto") -> CausalModel:
    """The model of a folder, its weights on torch's device "meta": nothing can be computed. Raises as `load`."""
    folder = Path(path)
    return _outline(folder, read_json(folder / "config.json"), dtype, load_format)[0]


def _outline(
    folder: Path, config: Mapping[str, object], dtype: str, load_format: str
) -> tuple[GqaForCausalLM | DeepseekForCausalLM | EncoderDecoderModel, Checkpoint | None, BlockFp8 | None]:
    config_path = folder / "config.json"
    fields = ConfigFields(config_path, config)
    architecture, model_class = find_model(config.get("architectures"), config_path)
    quantization = read_quantization(fields)
    if load_format not in ("auto", "dummy"):
        raise CheckpointError(f"load_format = {load_format!r}; use auto or dummy")
    checkpoint = Checkpoint(folder) if load_format == "auto" else None
    resolved = _resolve_dtype(fields, dtype, checkpoint)
    generation = _generation_config(folder)
    eos_token_ids = _first(generation, fields, "eos_token_id") or ()
    with torch.device("meta"):
        if issubclass(model_class, EncoderDecoderModel):
            forced = ForcedTokens(*(_single(_first(generation, fields, key), fields, key) for key in FORCED_KEYS))
            model = model_class.from_fields(
                fields, architecture=architecture, dtype=resolved, eos_token_ids=eos_token_ids, forced=forced
            )
        else:
            model = model_class.from_fields(
                fields, architecture=architecture, dtype=resolved, eos_token_ids=eos_token_ids
            )
    return model, checkpoint, quantization


def _resolve_dtype(fields: ConfigFields, wanted: str, checkpoint: Checkpoint | None) -> str:
    """What was asked for; for "auto" what config.json says, else how the embedding is stored."""
    if wanted == "auto":
        key = "dtype" if fields.has("dtype") else "torch_dtype"
        wanted = fields.text(key, _embedding_dtype(checkpoint))
        if wanted not in DTYPES:
            fields.refuse(key, f"set model.dtype to one of {', '.join(DTYPES)}")
    if wanted not in DTYPES:
        raise CheckpointError(f"dtype = {wanted!r}; use auto or one of {', '.join(DTYPES)}")
    return wanted


def _embedding_dtype(checkpoint: Checkpoint | None) -> str:
    tensors = {} if checkpoint is None else checkpoint.tensors
    stored = next((tensors[name] for name in _EMBEDDINGS if name in tensors), None)
    return "float32" if stored is None else str(stored.dtype).removeprefix("torch.")


def _generation_config(folder: Path) -> ConfigFields | None:
    path = folder / "generation_config.json"
    return ConfigFields(path, read_json(path)) if path.exists() else None


def _first(generation: ConfigFields | None, fields: ConfigFields, key: str) -> tuple[int, ...] | None:
    """generation_config.json knows chat models' extra end tokens and wins over config.json."""
    stated = None if generation is None else generation.token_ids(key)
    return stated if stated is not None else fields.token_ids(key)


def _single(token_ids: tuple[int, ...] | None, fields: ConfigFields, key: str) -> int | None:
    if token_ids is not None and len(token_ids) != 1:
        fields.refuse(key, f"one token id is computed, not {list(token_ids)}")
    return None if token_ids is None else token_ids[0]


def _multiplied_in_fp8(model: nn.Module) -> Mapping[str, Linear]:
    """By the name of their weight. Not the router, whose choices are computed in fp32, nor the head."""
    if isinstance(model, EncoderDecoderModel):
        return {}
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if type(module) is Linear and name != "lm_head" and module.dtype == torch.bfloat16
    }


def _quantize(weights: dict[str, Tensor], kept: Iterable[str]) -> dict[str, Tensor]:
    """Those that are kept become fp8 in place; returns their scales."""
    scales: dict[str, Tensor] = {}
    for name in kept:
        weights[name], scales[name] = quantize_matrix(weights[name])
    return scales


def _stored(
    model: nn.Module, checkpoint: Checkpoint, spec: ModelSpec, quantization: BlockFp8 | None, kept: Container[str]
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor], tuple[str, ...]]:
    """The parameters by name, the scales of those that are kept in fp8, and which tensors were left alone."""
    wanted = dict(model.named_parameters())
    stored = checkpoint.tensors
    left_out = {name: other for name, other in spec.stand_ins if name not in stored}
    absent = {name: wanted.pop(name) for name in left_out}
    missing = sorted(wanted.keys() - stored.keys())
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder}: {_some(missing)} missing; download it again, or correct config.json if it "
            "describes another model"
        )
    quantized = {name for name in wanted if quantization is not None and stored[name].dtype == STORED}
    extra = sorted(stored.keys() - wanted.keys() - {name + SCALE_SUFFIX for name in quantized})
    # A tied head may be stored although nobody reads it: the embedding is the same matrix.
    ignored = [
        name
        for name in extra
        if name == "lm_head.weight" or name.endswith(_DERIVED) or name.startswith(spec.dropped_prefixes)
    ]
    unknown = [name for name in extra if name not in set(ignored)]
    if unknown:
        raise CheckpointError(
            f"{checkpoint.file_of(unknown[0])}: {_some(unknown)} unknown to {type(model).__name__}; config.json "
            "describes another model, or one that is not computed here"
        )
    weights: dict[str, Tensor] = {}
    kept_scales: dict[str, Tensor] = {}
    for name, parameter in wanted.items():
        _expect_shape(checkpoint, name, tuple(parameter.shape))
        if quantization is not None and name in quantized:
            values, scales = _blocks(checkpoint, name, quantization)
            if name in kept:
                weights[name], kept_scales[name] = values, scales.float()
            else:
                weights[name] = quantization.dequantize(values, scales, parameter.dtype)
            continue
        _expect_plain(checkpoint, name)
        weights[name] = checkpoint.read(name).to(parameter.dtype)
    for name, parameter in absent.items():
        other = left_out[name]
        weights[name] = torch.zeros(parameter.shape, dtype=parameter.dtype) if other is None else weights[other]
    return weights, kept_scales, tuple(ignored)


def _blocks(checkpoint: Checkpoint, name: str, quantization: BlockFp8) -> tuple[Tensor, Tensor]:
    """Values [n, m] and the scales of their blocks."""
    scales = name + SCALE_SUFFIX
    if scales not in checkpoint.tensors:
        raise CheckpointError(
            f"{checkpoint.file_of(name)}: tensor {scales} missing, without which {name} means nothing; download it "
            "again"
        )
    values = checkpoint.read(name)
    if values.dim() != 2:
        raise CheckpointError(
            f"{checkpoint.file_of(name)}: tensor {name} is in fp8 and no matrix; use a checkpoint that leaves it in "
            f"{', '.join(DTYPES)}"
        )
    _expect_shape(checkpoint, scales, quantization.scale_shape(tuple(values.shape)))
    _expect_plain(checkpoint, scales)
    return values, checkpoint.read(scales)


def _expect_shape(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    if checkpoint.tensors[name].shape != shape:
        raise CheckpointError(
            f"{checkpoint.file_of(name)}: tensor {name} has shape {list(checkpoint.tensors[name].shape)}, config.json "
            f"asks for {list(shape)}; they belong to different models"
        )


def _expect_plain(checkpoint: Checkpoint, name: str) -> None:
    dtype = checkpoint.tensors[name].dtype
    if not dtype.is_floating_point or dtype.itemsize == 1:
        raise CheckpointError(
            f"{checkpoint.file_of(name)}: tensor {name} is stored as {dtype}; use a checkpoint in {', '.join(DTYPES)}, "
            "or in fp8 with a quantization_config in config.json"
        )


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    tail = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return f"{'tensors' if len(listed) > 1 else 'tensor'} {', '.join(listed[:3])}{tail}"


def _dummy(model: nn.Module, seed: int, device: torch.device) -> dict[str, Tensor]:
    """Weights that neither collapse to one repeated token nor explode: matrices with std 4 / sqrt(inputs), embeddings
    0.1, biases 0, norms 1. Each tensor depends on (seed, name, shape) alone."""
    weights: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        for suffix, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{suffix}" if prefix else suffix
            if isinstance(module, Linear | Embedding) and suffix == "weight":
                std = 0.1 if isinstance(module, Embedding) else 4 / parameter.shape[1] ** 0.5
                digest = blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
                generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
                drawn = torch.randn(parameter.shape, generator=generator, device=device)
                weights[name] = drawn.mul_(std).to(parameter.dtype)
            elif suffix.endswith("bias"):
                weights[name] = torch.zeros(parameter.shape, dtype=parameter.dtype, device=device)
            else:
                weights[name] = torch.ones(parameter.shape, dtype=parameter.dtype, device=device)
    return weights


def _dummy_identity(seed: int, device: torch.device) -> bytes:
    drawn_where = "" if device == CPU else f":{device.type}"
    return blake2b(f"{seed}{drawn_where}".encode(), digest_size=HASH_BYTES, person=b"sluice.dummy").digest()
