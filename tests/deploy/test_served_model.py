"""What the front door reads of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.config_file import parse
from cluster.errors import CheckpointError
from deploy.served_model import ServedModel


def read(directory: Path, **model: object) -> ServedModel:
    return ServedModel.read(parse({"model": {"path": str(directory), **model}}))


def write(directory: Path, name: str = "config.json", **values: object) -> None:
    (directory / name).write_text(json.dumps(values))


def test_limits_come_from_the_checkpoint_and_the_config(tmp_path: Path) -> None:
    write(tmp_path, vocab_size=99, max_position_embeddings=512, eos_token_id=2)
    model = read(tmp_path)
    assert (model.name, model.max_model_len, model.vocab_size) == (tmp_path.name, 512, 99)
    assert model.eos_token_ids == {2} and model.created > 0
    assert read(tmp_path, max_model_len=100, served_name="x").max_model_len == 100
    assert read(tmp_path, max_model_len=1000).max_model_len == 512
    write(tmp_path, "generation_config.json", eos_token_id=[3, 4])
    assert read(tmp_path).eos_token_ids == {3, 4}


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json: No such file .* name the directory"):
        read(tmp_path)
    write(tmp_path, vocab_size=99)
    with pytest.raises(CheckpointError, match="'max_position_embeddings' is missing"):
        read(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="no JSON"):
        read(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="wrong type"):
        read(tmp_path)
