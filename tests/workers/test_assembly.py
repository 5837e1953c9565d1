"""From settings to the parts of a worker: what of a config does not fit a model."""

from __future__ import annotations

import pytest

from benchmarks.lone_engine import lone_engine
from cluster import config_file
from cluster.errors import ConfigError
from tests.support.checkpoints import checkpoint


def test_a_model_without_an_encoder_hands_over_no_hidden_states() -> None:
    settings = {"model.path": str(checkpoint("llama")), "kv.encoder_output": "hidden_states"}
    config = config_file.load(None, settings=settings)
    with pytest.raises(
        ConfigError, match=r"kv\.encoder_output: hidden_states, but the model has no encoder; remove it"
    ):
        lone_engine(config, "decode")
