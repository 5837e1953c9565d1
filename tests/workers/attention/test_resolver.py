"""The choice of a backend, with the reason for every one that was not chosen."""

import re
from dataclasses import replace

import pytest
import torch

from cluster.errors import ConfigError
from workers.attention.environment import Environment
from workers.attention.interface import AttentionProblem
from workers.attention.mla_interface import MlaProblem
from workers.attention.resolver import Choice, build, build_mla, resolve

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
        (replace(PROBLEM, kind="mla"), CPU, "reference: computes gqa and encoder_decoder, not mla"),
        (replace(PROBLEM, num_kv_heads=3), CPU, "4 query heads are no multiple of 3 K/V heads"),
        (PROBLEM, Environment("cuda", strict=True), "no fast backend .* heads of 64 or 128 features, not 16"),
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
        (MLA, Environment("cuda", strict=True), "no fast backend .* latent, rotated, unrotated"),
    ],
)
def test_no_latent_backend_says_why(problem: MlaProblem, environment: Environment, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        resolve(problem, environment)


LIBRARIES = (("flashinfer", "0.7.2"), ("triton", "3.6.0"))
H200 = Environment("cuda", (9, 0), "NVIDIA H200", 132, LIBRARIES)
B200 = Environment("cuda", (10, 0), "NVIDIA B200", 148, LIBRARIES)
LLAMA = replace(PROBLEM, head_dim=128, dtype=torch.bfloat16)
DEEPSEEK = MlaProblem(
    num_heads=128,
    latent_size=512,
    rope_size=64,
    nope_size=128,
    value_size=128,
    block_size=64,
    dtype=torch.bfloat16,
    scale=0.1,
)

T5 = replace(LLAMA, kind="encoder_decoder", num_kv_heads=4, head_dim=64, scale=1.0)
SPARSE = replace(DEEPSEEK, index_topk=2048, index_heads=64, index_head_dim=128)


def test_hopper_gets_its_own_backend() -> None:
    assert resolve(LLAMA, H200) == Choice("hopper", ())
    assert resolve(T5, H200) == Choice("hopper", (), reads_spans=True) and resolve(T5, H200).replays
    assert str(resolve(DEEPSEEK, H200)) == ("attention: hopper; not trtllm-gen: runs on SM100 and SM103, not on SM90")


@pytest.mark.parametrize(
    ("problem", "environment", "reason"),
    [
        (LLAMA, replace(H200, disabled=frozenset({"flashinfer"})), "flashinfer is switched off"),
        (LLAMA, replace(H200, libraries=LIBRARIES[:1]), "triton is not installed"),
        (LLAMA, B200, "runs on SM90, not on SM100"),
        (replace(LLAMA, dtype=torch.float32), H200, "computes bfloat16 and float16, not float32"),
        (replace(T5, dtype=torch.float32), H200, "computes bfloat16 and float16, not float32"),
        (replace(LLAMA, head_dim=96), H200, "heads of 64 or 128 features, not 96"),
        (replace(LLAMA, block_size=48), H200, "blocks of 48 tokens are no multiple of 64"),
        (replace(SPARSE, index_head_dim=64), H200, "index heads of 128 features, not 64"),
        (replace(SPARSE, block_size=128), H200, "index keys lie in blocks of 64 tokens, not 128"),
        (replace(DEEPSEEK, value_size=256), H200, "of 512, 64, 128, 128, not 512, 64, 128, 256"),
    ],
)
def test_what_hopper_lacks_falls_to_the_reference_or_is_an_error(
    problem: AttentionProblem | MlaProblem, environment: Environment, reason: str
) -> None:
    choice = resolve(problem, environment)
    assert choice.chosen == "reference"
    assert reason in dict(choice.rejected)["hopper"]
    with pytest.raises(ConfigError, match=reason):
        resolve(problem, replace(environment, strict=True))


TOOLS = (("deep_gemm", "0.1.4"), ("flashinfer_topk", "0.7.2"))
_UNBUILT = "is not built, which flashinfer.jit.topk.gen_topk_module().build_and_load() does in half an hour"


def test_an_indexer_has_two_forms_of_decode_steps() -> None:
    choice = resolve(SPARSE, replace(H200, libraries=(*LIBRARIES, *TOOLS), strict=True))
    assert (choice.chosen, choice.dense_context, choice.least_graph_step) == ("hopper", 2048, 8)
    assert dict(choice.rejected).keys() == {"trtllm-gen"}
    whole = resolve(DEEPSEEK, H200)
    assert (whole.dense_context, whole.least_graph_step) == (None, 1)


@pytest.mark.parametrize(
    ("problem", "libraries", "tool", "reason"),
    [
        (SPARSE, TOOLS[1:], "deep_gemm", "deep_gemm is not installed"),
        (replace(SPARSE, index_heads=16), TOOLS, "deep_gemm", "scores 32 or 64 index heads, not 16"),
        (SPARSE, TOOLS[:1], "flashinfer_topk", _UNBUILT),
        (replace(SPARSE, index_topk=4096), TOOLS, "flashinfer_topk", "chooses at most 2048 rows, not 4096"),
    ],
)
def test_an_indexer_does_without_what_is_missing(
    problem: MlaProblem, libraries: tuple[tuple[str, str], ...], tool: str, reason: str
) -> None:
    environment = replace(H200, libraries=(*LIBRARIES, *libraries))
    choice = resolve(problem, environment)
    assert choice.chosen == "hopper" and dict(choice.rejected)[tool] == reason
    with pytest.raises(ConfigError, match=re.escape(f"{tool}: {reason}")):
        resolve(problem, replace(environment, strict=True))
    off = resolve(problem, replace(environment, disabled=frozenset({tool})))
    assert tool in dict(off.rejected) and off.chosen == "hopper"


def test_a_window_is_refused_everywhere() -> None:
    with pytest.raises(ConfigError, match="not a window of 64"):
        resolve(replace(DEEPSEEK, sliding_window=64), H200)


@pytest.mark.parametrize(
    ("problem", "environment", "reason"),
    [
        (DEEPSEEK, B200, "fits, but was never measured"),
        (replace(DEEPSEEK, latent_size=256), replace(B200, capability=(10, 3)), "fits, but was never measured"),
        (DEEPSEEK, replace(B200, disabled=frozenset({"flashinfer"})), "flashinfer is switched off"),
        (DEEPSEEK, H200, "runs on SM100 and SM103, not on SM90"),
        (replace(DEEPSEEK, rope_size=32), B200, "of (576, 512) or (320, 256), not (544, 512)"),
        (replace(DEEPSEEK, block_size=128), B200, "blocks of 32 or 64 tokens, not 128"),
        (replace(DEEPSEEK, index_topk=2048), B200, "not the index_topk best"),
        (replace(DEEPSEEK, dtype=torch.float32), B200, "computes bfloat16, not float32"),
    ],
)
def test_the_rules_of_trtllm_gen(problem: MlaProblem, environment: Environment, reason: str) -> None:
    assert reason in dict(resolve(problem, environment).rejected)["trtllm-gen"]
