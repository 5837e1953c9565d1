"""Looks at the machine and the installation; says what would be used, why, and how fast blocks really move."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from rich.console import Console
from rich.table import Table

from cluster.config import SluiceConfig, TransferConfig
from cluster.engine_config import EngineConfig
from cluster.errors import ConfigError, SluiceError
from deploy import preflight
from deploy.commands.options import add_config, add_model, config_of

if TYPE_CHECKING:
    import torch

    from workers.attention.interface import AttentionProblem
    from workers.attention.mla_interface import MlaProblem

HELP = "check this machine: versions, what is chosen and why, real transfer rate between two processes"

_PACKAGES = ("torch", "ray", "nixl", "grpcio", "protobuf", "transformers", "tokenizers", "fastapi", "safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add_model(parser)
    parser.add_argument("--no-transfer", action="store_true", help="skip the measurement, which takes some seconds")


def run(options: argparse.Namespace) -> int:
    """1 if something would keep sluice from running here."""
    console = Console()
    table = Table(box=None, show_header=False, padding=(0, 2))
    _show_machine(table)
    _show_versions(table)
    problems = [
        f"{problem.reason}: {problem.remedy}" for problem in preflight.problems(preflight.probe(), installed=True)
    ]
    config = _config(options, table, problems)
    transfer = TransferConfig() if config is None else config.transfer
    device = _show_choices(table, config, problems)
    if device is not None:
        _show_transport(table, transfer, device, problems)
    if not options.no_transfer:
        _show_rate(table, transfer, "cpu", "cpu", problems)
        for source, sink in _gpu_pairs(device):
            _show_rate(table, transfer, source, sink, problems)
    console.print(table)
    for problem in problems:
        console.print(f"[red]problem[/red]  {problem}", highlight=False)
    console.print("ready to serve" if not problems else f"{len(problems)} problem(s)")
    return 1 if problems else 0


def _show_machine(table: Table) -> None:
    machine = preflight.probe()
    gpus = sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*"))
    table.add_row("machine", f"{machine.system} {machine.architecture}, {os.cpu_count()} cores, {_cpu_name()}")
    table.add_row("memory", f"{psutil.virtual_memory().available / 1e9:.1f} GB free of {_gb(machine.memory_bytes)}")
    table.add_row("disk, /dev/shm", f"{_gb(machine.disk_bytes)} and {_gb(machine.shm_bytes)} free")
    table.add_row("GPUs", ", ".join(gpus) or "none: everything runs on the CPU")


def _show_versions(table: Table) -> None:
    found = {"Python": ".".join(map(str, preflight.probe().python))}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    table.add_row("versions", ", ".join(f"{name} {number}" for name, number in found.items()))


def _show_choices(table: Table, config: SluiceConfig | None, problems: list[str]) -> torch.device | None:
    """What this machine computes with, and why: for the config's model, else for shapes that are often served. The
    device; None: there is none to the config's liking."""
    import torch

    from workers.attention.environment import Environment, choose_device
    from workers.attention.resolver import resolve
    from workers.kernels.fp8 import BLOCK
    from workers.layers.gemm_resolver import GemmProblem, resolve_gemm

    engine = EngineConfig()
    num_gpus = 0.0
    if config is not None:
        pool, resources = max(config.pools.items(), key=lambda item: item[1].gpus)
        engine, num_gpus = config.in_ray(pool).engine, resources.gpus
    try:
        choice = choose_device(engine.device, num_gpus=num_gpus, strict=engine.strict)
    except ConfigError as error:
        problems.append(str(error))
        return None
    environment = Environment.probe(choice.device, disabled=engine.disabled, strict=engine.strict)
    reason = choice.reason if config is None or engine == config.engine else "no pool has gpus"
    table.add_row("computes on", f"{choice.device}: {reason}")
    table.add_row("environment", str(environment))
    is_overlapped = engine.overlaps(on_gpu=choice.device.type == "cuda")
    table.add_row("steps", "the next one prepared while one runs" if is_overlapped else "one after the other")
    for name, problem in _problems(config, problems):
        try:
            chosen = resolve(problem, environment)
        except ConfigError as error:
            if config is not None:
                problems.append(str(error))
            table.add_row(name, str(error))
        else:
            kinds = "steps" if chosen.reads_spans else "decode steps"
            graphs = f"; {kinds} as CUDA graphs" if chosen.replays and engine.cuda_graphs else ""
            table.add_row(name, f"{chosen}{graphs}")
    blocks = resolve_gemm(GemmProblem((BLOCK, BLOCK), torch.bfloat16), replace(environment, strict=False))
    table.add_row("matrices in fp8", str(blocks))
    return choice.device


def _problems(config: SluiceConfig | None, problems: list[str]) -> Iterator[tuple[str, AttentionProblem | MlaProblem]]:
    import torch

    from workers.attention.interface import AttentionProblem
    from workers.attention.mla_interface import MlaProblem
    from workers.models.loader import outline

    if config is None:
        bf16 = torch.bfloat16
        yield (
            "Llama 8B",
            AttentionProblem(
                kind="gqa", num_heads=32, num_kv_heads=8, head_dim=128, block_size=64, dtype=bf16, scale=128**-0.5
            ),
        )
        yield (
            "DeepSeek V3",
            MlaProblem(
                num_heads=128,
                latent_size=512,
                rope_size=64,
                nope_size=128,
                value_size=128,
                block_size=64,
                dtype=bf16,
                scale=192**-0.5,
            ),
        )
        return
    model = config.model
    try:
        outlined = outline(model.path, dtype=model.dtype, load_format=model.load_format)
    except SluiceError as error:
        problems.append(str(error))
        return
    yield outlined.spec.architecture, outlined.attention_problem(config.kv.block_size)


def _show_transport(table: Table, config: TransferConfig, device: torch.device, problems: list[str]) -> None:
    from kvtransfer.transports import choose_transport

    try:
        table.add_row("transport", str(choose_transport(config.transport, device)))
    except ConfigError as error:
        problems.append(str(error))
    infiniband = Path("/sys/class/infiniband")
    rdma = infiniband.is_dir() and any(infiniband.iterdir())
    table.add_row("nixl over UCX", "RDMA found" if rdma else "no RDMA: shared memory, CMA or TCP")


def _gpu_pairs(device: torch.device | None) -> list[tuple[str, str]]:
    """The first GPU with each other one, or with itself, where workers would compute on GPUs."""
    if device is None or device.type != "cuda":
        return []
    import torch

    others = range(1, torch.cuda.device_count()) or range(1)
    return [(f"cuda:{other}", "cuda:0") for other in others]


def _config(options: argparse.Namespace, table: Table, problems: list[str]) -> SluiceConfig | None:
    """If one is named: a doctor looks at a machine without a model too."""
    if options.config is None and options.model is None and not options.overrides:
        return None
    try:
        config = config_of(options)
    except ConfigError as error:
        problems.append(str(error))
        return None
    table.add_row("config", f"{config.name}: {', '.join(f'{n} × {p.workers}' for n, p in config.pools.items())}")
    return config


def _show_rate(table: Table, config: TransferConfig, source: str, sink: str, problems: list[str]) -> None:
    from deploy.transfer_probe import measure

    between = "between two processes" if source == sink == "cpu" else f"from {source} to {sink}"
    try:
        rate = measure(config, source, sink)
    except SluiceError as error:
        problems.append(f"no blocks move {between}: {error}; try --set transfer.ucx_tls=tcp,self")
        return
    others = "".join(f"; {way}: {other / 1e9:.2f} GB/s" for way, other in rate.others.items())
    share = rate.bytes_per_s / rate.memcpy_bytes_per_s
    table.add_row(
        "measured",
        f"{rate.transport}: {rate.bytes_per_s / 1e9:.2f} GB/s for {rate.num_bytes / 1e6:.0f} MB {between}, "
        f"{share:.0%} of a copy inside one ({rate.memcpy_bytes_per_s / 1e9:.1f} GB/s){others}",
    )


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


def _gb(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e9:.1f} GB"
