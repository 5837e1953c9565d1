"""Typed reading of config.json, with errors that name the file, the key and the value."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NoReturn

from cluster.errors import CheckpointError

# What config.json may say without a consequence for what is computed, whatever the family.
_UNUSED = frozenset(
    """
    architectures auto_map dtype model_type name_or_path torch_dtype transformers_version _commit_hash _name_or_path
    attn_implementation _attn_implementation _attn_implementation_autoset _experts_implementation
    bos_token_id decoder_start_token_id eos_token_id forced_bos_token_id forced_eos_token_id pad_token_id sep_token_id
    bad_words_ids diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty length_penalty max_length max_new_tokens min_length no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences prefix remove_invalid_values repetition_penalty
    begin_suppress_tokens suppress_tokens temperature tokenizer_class top_k top_p typical_p
    attention_dropout aux_loss_alpha embd_pdrop ep_size hidden_dropout initializer_range output_router_logits
    pretraining_tp resid_pdrop router_aux_loss_coef seq_aux
    chunk_size_feed_forward finetuning_task is_decoder gradient_checkpointing id2label label2id output_attentions
    output_hidden_states output_scores problem_type return_dict return_dict_in_generate task_specific_params
    tf_legacy_loss torchscript use_bfloat16 use_cache
    """.split()
)


class ConfigFields:
    """The keys of one JSON object. A key that is absent or null takes the default; without a default it is an error.

    Every key that is read, or named as unused, is remembered: `close` refuses the others.
    """

    def __init__(self, path: Path, content: Mapping[str, object], prefix: str = "") -> None:
        self.path = path
        self._content = content
        self._prefix = prefix
        self._known: set[str] = set()

    def _get(self, key: str) -> object:
        self._known.add(key)
        return self._content.get(key)

    def has(self, key: str) -> bool:
        return self._content.get(key) is not None

    def close(self, unused: Collection[str] = (), *, has_encoder: bool = False) -> None:
        """Raises CheckpointError for a key that nobody read: it may change what the model computes.

        `unused`: keys of this family that change nothing.
        """
        if not self._prefix:
            what = "the model has an encoder of its own" if has_encoder else "the model is a decoder alone"
            self.expect("is_encoder_decoder", has_encoder, what)
            for key in ("add_cross_attention", "tie_encoder_decoder"):
                self.expect(key, False, what)
        known = self._known | set(unused) | (set() if self._prefix else _UNUSED)
        for key in sorted(self._content.keys() - known):
            if self._content[key] is not None:
                self.refuse(key, "no such setting is computed for this architecture; remove it if it changes nothing")

    def expect(self, key: str, value: str | float | None, why: str) -> None:
        """Raises CheckpointError when the key is there with another value than the one that is computed."""
        self._known.add(key)
        if self._content.get(key) is not None and self._content[key] != value:
            self.refuse(key, f"only {json.dumps(value)} is computed: {why}")

    def refuse(self, key: str, remedy: str) -> NoReturn:
        """Raises CheckpointError about the value of `key`."""
        raise CheckpointError(f"{self.path}: {self._prefix}{key} = {self._content.get(key)!r}; {remedy}")

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        value = self._get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            self.refuse(key, f"must be an integer >= {minimum}")
        return value

    def optional_integer(self, key: str) -> int | None:
        """None when absent."""
        return None if self._get(key) is None else self.integer(key)

    def number(self, key: str, default: float | None = None, *, minimum: float | None = None) -> float:
        """Above 0, or at least `minimum`."""
        value = self._get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(key, "must be a number")
        if value <= 0 if minimum is None else value < minimum:
            self.refuse(key, "must be a number > 0" if minimum is None else f"must be a number >= {minimum:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(key, "must be true or false")
        return value

    def text(self, key: str, default: str) -> str:
        value = self._get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            self.refuse(key, "must be a string")
        return value

    def texts(self, key: str) -> tuple[str, ...] | None:
        """A list of strings, None when absent."""
        value = self._get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.refuse(key, "must be a list of strings")
        return tuple(value)

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of integers >= 0, empty when absent."""
        value = self._get(key)
        if value is None:
            return ()
        if not isinstance(value, list):
            self.refuse(key, "must be a list of integers >= 0")
        numbers: list[int] = []
        for item in value:
            if isinstance(item, bool) or not isinstance(item, int) or item < 0:
                self.refuse(key, "must be a list of integers >= 0")
            numbers.append(item)
        return tuple(numbers)

    def section(self, key: str) -> ConfigFields | None:
        """The object under `key`, None when absent."""
        value = self._get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.refuse(key, "must be an object")
        return ConfigFields(self.path, value, f"{self._prefix}{key}.")

    def token_ids(self, key: str) -> tuple[int, ...] | None:
        """One id or a list of ids, None when absent."""
        value = self._get(key)
        if value is None:
            return None
        if isinstance(value, list):
            return self.integers(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            self.refuse(key, "must be a token id or a list of them")
        return (value,)
