"""The choice of a backend, with the reason for every one that was not chosen."""

from dataclasses import replace

import pytest
import torch

from cluster.errors import ConfigError
from workers.attention.interface import AttentionProblem
from workers.attention.mla_interface import MlaProblem
from workers.attention.resolver import Choice, Environment, build, build_mla, resolve

CPU = Environment.probe(torch.device("cpu"))
PROBLEM = AttentionProblem(
    kind="gqa", num_heads=4, num_kv_heads=2, head_dim=16, block_size=64, dtype=torch.float32, scale=0.25
)


def test_cpu_gets_the_reference() -> None:
    choice = resolve(PROBLEM, CPU)
    assert choice == Choice("reference", ())
    assert build(choice, PROBLEM).name == "reference"


def test_an_unknown_wish_is_passed_over_with_its_reason() -> None:
    choice = resolve(PROBLEM, CPU, ("flash", "reference"))
    assert choice.chosen == "reference"
    assert str(choice) == "attention: reference; not flash: no such backend, known are reference"


@pytest.mark.parametrize(
    ("problem", "environment", "reason"),
    [
        (replace(PROBLEM, kind="mla"), CPU, "reference: computes gqa, not mla"),
        (replace(PROBLEM, num_kv_heads=3), CPU, "4 query heads are no multiple of 3 K/V heads"),
        (PROBLEM, Environment("cuda"), "runs on cpu, not on cuda"),
    ],
)
def test_no_backend_says_why(problem: AttentionProblem, environment: Environment, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        resolve(problem, environment)


MLA = MlaProblem(num_heads=4, latent_size=32, rope_size=16, block_size=64, dtype=torch.float32, scale=0.25)


def test_latent_attention_has_its_own_backends() -> None:
    choice = resolve(MLA, CPU, ("reference",))
    assert choice == Choice("reference", ())
    assert build_mla(choice, MLA).name == "reference"


@pytest.mark.parametrize(
    ("problem", "environment", "reason"),
    [
        (replace(MLA, sliding_window=64), CPU, "every token sees its whole context, not a window of 64"),
        (MLA, Environment("cuda"), "runs on cpu, not on cuda"),
    ],
)
def test_no_latent_backend_says_why(problem: MlaProblem, environment: Environment, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        resolve(problem, environment)
