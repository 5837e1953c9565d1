"""Measures which tactic is the fastest for each op of a model, on one GPU, and writes them down:

    python -m workers.autotune MODEL_FOLDER [--fp8] [--only OP] --output FILE [--jobs 12]

Only config.json is read. Each op (workers.tuning) is measured at the token counts of `tactic_table.BUCKETS`, products
of many rows at DENSE_BUCKETS and PROMPT_BUCKETS, as it runs in a step: in a CUDA graph, launch behind launch, with
inputs that are not in the L2, and those of prompts on a card that is hot. Never while serving: workers read the files
at its start. A tactic that does not compile or run here is left out; the rule's own, which runs where no file fits, is
always among the candidates.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from workers.kernels.fp8 import BLOCK
from workers.kernels.tactic_table import (
    BUCKETS,
    DENSE_BUCKETS,
    PROMPT_BUCKETS,
    DeviceSetting,
    Tactic,
    TacticTable,
    TunedFile,
    read,
)
from workers.kernels.tactics import DENSE_TOKENS, fp8_expert_tactics
from workers.layers.attention import GroupedQueryAttention
from workers.layers.mla import LatentAttention
from workers.layers.mlp import GatedMlp
from workers.layers.moe import SparseMlp
from workers.models.decoder import DecoderForCausalLM
from workers.models.loader import outline
from workers.tuning.dense import DenseProblem
from workers.tuning.experts import ExpertsProblem
from workers.tuning.latents import LatentDecodeProblem
from workers.tuning.problem import CUDA, Launched, Problem, log
from workers.tuning.skinny import SkinnyProblem

_MAX_SEQUENCES = 512  # of a step of single tokens
_ROWS = (*DENSE_BUCKETS, *PROMPT_BUCKETS)  # of products that steps of both kinds make


def problems(model: DecoderForCausalLM, *, in_fp8: bool) -> list[Problem]:
    """Of a model on any device, "meta" too; each once."""
    found: dict[str, Problem] = {}

    def add(problem: Problem) -> None:
        found.setdefault(problem.key, problem)

    def add_dense(outputs: int, inputs: int, sizes: Sequence[int] = _ROWS) -> None:
        for rows in sizes:
            add(DenseProblem(rows, outputs, inputs))

    def add_linear(outputs: int, inputs: int) -> None:
        add(SkinnyProblem(outputs, inputs, gated=False))
        add_dense(outputs, inputs)

    def add_mlp(mlp: GatedMlp, *, by_few: bool = True) -> None:
        """by_few: by steps of single tokens, too."""
        inner, hidden = mlp.gate_proj.weight.shape
        if in_fp8 and inner % BLOCK == 0:
            return
        add(SkinnyProblem(inner, hidden, gated=True))
        add(SkinnyProblem(hidden, inner, gated=False))
        sizes = _ROWS if by_few else PROMPT_BUCKETS
        add_dense(2 * inner, hidden, sizes)
        add_dense(hidden, inner, sizes)

    for layer in model.modules():
        if isinstance(layer, SparseMlp):
            expert = layer.experts[0]
            assert isinstance(expert, GatedMlp)
            inner, hidden = expert.gate_proj.weight.shape
            shared = 0 if layer.shared_experts is None else layer.shared_experts.gate_proj.weight.shape[0] // inner
            rule = layer.gate.rule
            for tokens in BUCKETS:
                apart = tokens >= DENSE_TOKENS
                per_token = rule.experts_per_token + (0 if apart else shared)
                if in_fp8 and fp8_expert_tactics(tokens * per_token, rule.num_experts + shared) is None:
                    continue
                slots = rule.num_experts + shared
                add(ExpertsProblem(tokens, per_token, rule.num_experts, slots, inner, hidden, in_fp8))
            if layer.shared_experts is not None:
                add_mlp(layer.shared_experts, by_few=False)
        elif isinstance(layer, GroupedQueryAttention) and not in_fp8:
            height = sum(part.weight.shape[0] for part in (layer.q_proj, layer.k_proj, layer.v_proj))
            add_linear(height, layer.q_proj.weight.shape[1])
            add_linear(*layer.o_proj.weight.shape)
        elif isinstance(layer, LatentAttention) and layer.indexer is None and not in_fp8:
            queries = layer.q_proj if layer.shape.query_latent_size is None else layer.q_a_proj
            height = queries.weight.shape[0] + layer.kv_a_proj_with_mqa.weight.shape[0]
            add_linear(height, queries.weight.shape[1])
            add_linear(*layer.o_proj.weight.shape)
            shape = layer.shape
            sizes = shape.num_heads, shape.latent_size, shape.rope_dim, shape.value_dim
            for sequences in (each for each in BUCKETS if each <= _MAX_SEQUENCES):
                add(LatentDecodeProblem(sequences, *sizes))
    sparse = {id(each) for layer in model.modules() if isinstance(layer, SparseMlp) for each in layer.modules()}
    for layer in model.modules():
        if isinstance(layer, GatedMlp) and id(layer) not in sparse:
            add_mlp(layer)
    head = model.config.decoder
    add(SkinnyProblem(head.vocab_size, head.hidden_size, gated=False))
    add_dense(head.vocab_size, head.hidden_size, DENSE_BUCKETS)  # of the rows that draw a token alone
    return list(found.values())


def _compile(problem: Problem, kernel: str, tactic: Launched) -> None:
    """In a process of its own: fills Triton's cache on disk."""
    try:
        problem.compile(kernel, tactic)
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 - left out when it is measured
        log.info("%s %s: %s", kernel, tactic, error)


def _kept(path: Path, setting: DeviceSetting) -> dict[str, Tactic]:
    """What a file of this setting says already. Raises ValueError for one of another."""
    if not path.exists():
        return {}
    content = read(path)
    if content.setting != setting:
        raise ValueError(f"{path} was measured elsewhere ({content.setting}); measure all ops, without --only")
    return dict(content.entries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder with a config.json")
    parser.add_argument("--fp8", action="store_true", help="for weights in fp8 blocks")
    parser.add_argument("--only", metavar="OP", help="measure this op, as keys begin; the rest of the file stays")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile")
    arguments = parser.parse_args()
    model = outline(arguments.model, load_format="dummy")
    assert isinstance(model, DecoderForCausalLM), "only decoders have kernels to tune"
    ops: dict[str, list[Problem]] = {}
    for problem in problems(model, in_fp8=arguments.fp8):
        ops.setdefault(problem.key.split("/")[0], []).append(problem)
    if arguments.only and arguments.only not in ops:
        parser.error(f"--only {arguments.only}: of this model there are {', '.join(ops)}")
    setting = DeviceSetting.of(CUDA)
    entries = _kept(arguments.output, setting) if arguments.only else {}
    found = [each for op, mine in ops.items() if arguments.only in (None, op) for each in mine]
    jobs = {(kernel, tactic): (each, kernel, tactic) for each in found for kernel, tactic in each.variants()}
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        list(pool.map(_compile, *zip(*jobs.values(), strict=True)))
    for problem in found:
        tactic, best, ruled = problem.tune()
        entries.pop(problem.key, None)
        if tactic is not None:
            entries[problem.key] = tactic
        sys.stdout.write(f"{problem.key:45s} {best:8.1f} us, by rule {ruled:8.1f}: {tactic or 'as by rule'}\n")
        sys.stdout.flush()
        torch.cuda.empty_cache()
    TunedFile(setting, entries).write(arguments.output)
    sys.stdout.write(f"{TacticTable.tuned(setting, arguments.output.parent).source}\n")


if __name__ == "__main__":
    main()
