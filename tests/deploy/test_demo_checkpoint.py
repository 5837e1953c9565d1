"""The demo's checkpoint is one that transformers reads, too, and says the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.models.auto.tokenization_auto import AutoTokenizer

from cluster.errors import SluiceError
from deploy import demo_checkpoint
from deploy.chat_template import ChatPrompt
from deploy.commands.demo import PROMPT, SYSTEM
from deploy.openai_chat import ChatMessage
from deploy.tokenizer import Tokenizer
from tests.support.paged_model import PagedModel, Text
from workers.models.loader import load


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    assert demo_checkpoint.ensure(cache)
    return cache


def test_it_is_written_once(cache: Path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in demo_checkpoint.place(cache).iterdir()}
    assert not demo_checkpoint.ensure(cache)
    assert {file.name: file.stat().st_mtime_ns for file in demo_checkpoint.place(cache).iterdir()} == before
    assert [file.name for file in cache.iterdir()] == [demo_checkpoint.place(cache).name]
    assert 1_000_000 < demo_checkpoint.size_bytes(cache) < 10_000_000


def test_the_same_every_time(cache: Path, tmp_path: Path) -> None:
    demo_checkpoint.write(tmp_path)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (demo_checkpoint.place(cache) / name).read_bytes(), name
    first, second = (load_file(folder / "model.safetensors") for folder in (tmp_path, demo_checkpoint.place(cache)))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_transformers_reads_it_and_says_the_same(cache: Path) -> None:
    path = demo_checkpoint.place(cache)
    loaded: Any = AutoModelForCausalLM.from_pretrained(str(path), output_loading_info=True)
    reference, report = loaded
    assert not any(report.values()), report
    tokenizer = AutoTokenizer.from_pretrained(str(path))
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": PROMPT}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    ours = Tokenizer.load(path)
    chat = ChatPrompt(messages=[ChatMessage.model_validate(each) for each in messages])
    assert ours is not None and ours._encode_chat(chat) == prompt
    assert tokenizer.decode(prompt).count("<|end|>") == 2
    config = json.loads((path / "config.json").read_text())
    assert config["index_topk"] < len(prompt) < 128  # sparse attention, and a few chunks

    with torch.inference_mode():
        logits = reference(torch.tensor([prompt])).logits[0, -1]
    model = PagedModel(load(path).model, block_size=16)
    assert model.generate([Text(list(prompt))], 1) == [[int(logits.argmax())]]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SluiceError, match="name another place with --cache"):
        demo_checkpoint.ensure(tmp_path / "file" / "cache")
