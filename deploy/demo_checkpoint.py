"""The model of `demo`: DeepSeek-V3.2 in miniature, in Hugging Face format, with random weights and a real tokenizer.

Nothing is downloaded: the tokenizer learns from the sources of Python's standard library, and the weights are drawn
from a fixed seed so that every token depends on what stands before it. It says noise.
"""

from __future__ import annotations

import json
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from cluster.errors import SluiceError

VERSION = 1  # of what is written; raise it with every change below
VOCAB_SIZE = 4096
CORPUS_BYTES = 2_000_000

_END = "<|end|>"
_SPECIAL = (_END, "<|system|>", "<|user|>", "<|assistant|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('there is no role ' + message.role) }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

CONFIG: Mapping[str, object] = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "dtype": "float32",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 96,
    "intermediate_size": 256,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "index_n_heads": 16,
    "index_head_dim": 32,
    "index_topk": 64,  # a chat prompt is longer: its later tokens choose
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
}


def place(cache: Path) -> Path:
    """The checkpoint's directory. Each Python has its own: the tokenizer learns from its library."""
    return cache / f"deepseek-v32-miniature-{VERSION}-py{sys.version_info.major}{sys.version_info.minor}"


def ensure(cache: Path) -> bool:
    """Writes the checkpoint unless it is there; whether it did, which takes some seconds.

    Safe to call from two processes at once. Raises SluiceError when `cache` cannot be written.
    """
    directory = place(cache)
    if directory.is_dir():
        return False
    try:
        cache.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=cache))
    except OSError as error:
        raise SluiceError(f"{cache} cannot be written ({error.strerror}); name another place with --cache") from error
    try:
        write(draft)
        draft.rename(directory)  # complete or absent, for everybody
    except OSError as error:
        if not directory.is_dir():  # else another process was faster
            raise SluiceError(f"{directory} cannot be written ({error.strerror}); free some space") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return True


def size_bytes(cache: Path) -> int:
    return sum(path.stat().st_size for path in place(cache).iterdir())


def write(directory: Path) -> None:
    """Writes all files of the checkpoint into an existing directory."""
    _write_json(directory / "config.json", CONFIG)
    _write_json(directory / "generation_config.json", {"eos_token_id": 0})
    _write_tokenizer(directory)
    _write_weights(directory)


def _write_weights(directory: Path) -> None:
    from safetensors.torch import save_file
    from torch import nn

    from workers.models.loader import load

    model = load(directory, load_format="dummy").model
    assert isinstance(model, nn.Module)
    save_file(dict(model.state_dict()), directory / "model.safetensors", metadata={"format": "pt"})


def _write_tokenizer(directory: Path) -> None:
    """Byte-level BPE: every text can be said."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True) for token in _SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": _END,
        "model_max_length": CONFIG["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE,
    }
    _write_json(directory / "tokenizer_config.json", settings)


def _corpus() -> Iterator[str]:
    """Sources of the standard library, in the order of their names, up to CORPUS_BYTES."""
    num_bytes = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if num_bytes >= CORPUS_BYTES:
            return
        text = path.read_text("utf-8", "replace")
        num_bytes += len(text)
        yield text


def _write_json(path: Path, tree: Mapping[str, object]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n")
