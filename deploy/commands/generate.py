"""Answers the requests of a file on this machine, without a server: one JSON object per line in, one per line out.

A line has "prompt_token_ids", "prompt" (text) or "messages", and the fields of /v1/completions with their defaults:
max_tokens, min_tokens, temperature, top_p, top_k, seed, stop, stop_token_ids, ignore_eos. Answers stand in the order
of the lines; a line that cannot be answered becomes {"error": ...}, alone. Token ids need no tokenizer.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.config import Role, SluiceConfig
from cluster.errors import SluiceError
from deploy import offline, route_card
from deploy.api_service import ApiService
from deploy.batch import Batch, Summary, needs_tokenizer, read
from deploy.commands.options import add_config, add_model, config_of
from deploy.offline import max_open
from deploy.silence import logged
from deploy.steps import Steps

HELP = "answer the requests of a JSON-lines file, without a server"

INTERRUPTED = 130  # exit status
_LONG_S = 86_400.0  # a file has no deadline, unless the config names one
_KV_BYTES = 512 << 20  # per worker: more takes seconds to allocate
_PATIENCE_S = 120.0  # for the successor of a worker that died


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--input", metavar="IN.jsonl", type=Path, required=True, help="the requests, one per line")
    parser.add_argument("--output", metavar="OUT.jsonl", type=Path, required=True, help="where the answers go")
    parser.add_argument(
        "--cluster", action="store_true", help="the pools of the config: prefill and decode in different processes"
    )
    parser.add_argument(
        "--aggregated", action="store_true", help="each worker computes its prompts itself (default without --cluster)"
    )
    parser.add_argument("--explain", action="store_true", help="add its route to each answer, and show a summary")
    add_config(parser)


def run(options: argparse.Namespace) -> int:
    config = configured(options)
    texts = _read_input(options.input)
    if options.output.exists() and options.output.samefile(options.input):
        raise SluiceError(f"--output {options.output} is the input; name another file")
    directory = Path(tempfile.mkdtemp(prefix="sluice-generate-"))
    log = directory / "log"
    try:
        with logged(log, screen=2) as console:
            return _generate(config, texts, options, directory, console)
    finally:
        if not log.exists():
            shutil.rmtree(directory)


def configured(options: argparse.Namespace) -> SluiceConfig:
    """The config with what a file of requests wants where the config says nothing. Raises ConfigError."""
    config = config_of(options)
    router, http, kv, pools = config.router, config.http, config.kv, config.pools
    if options.aggregated or not options.cluster:
        num_workers = sum(pool.workers for pool in pools.values()) if options.cluster else 1
        decode = next(pool for pool in pools.values() if Role.DECODE in pool.roles)
        mixed = decode.model_copy(update={"workers": num_workers, "roles": (Role.PREFILL, Role.DECODE)})
        pools = {"mixed": mixed}
        router = router.model_copy(update={"local_prefill": "always"})
    elif "local_prefill" not in router.model_fields_set:
        router = router.model_copy(update={"local_prefill": "never"})
    if "worker_wait_s" not in router.model_fields_set:
        router = router.model_copy(update={"worker_wait_s": _PATIENCE_S})
    if not {"request_timeout_s", "drain_s"} & http.model_fields_set:
        http = http.model_copy(update={"request_timeout_s": _LONG_S, "drain_s": _LONG_S})
    if not {"num_blocks", "memory_bytes", "memory_fraction"} & kv.model_fields_set:
        kv = kv.model_copy(update={"memory_bytes": _KV_BYTES})
    return config.model_copy(update={"router": router, "http": http, "kv": kv, "pools": pools})


def _read_input(path: Path) -> list[str]:
    """Its lines, empty ones left out."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise SluiceError(f"--input {path} cannot be read: {error.strerror}; name another file") from None
    except UnicodeDecodeError as error:
        raise SluiceError(f"--input {path} is no UTF-8 ({error.reason} at byte {error.start}); convert it") from None
    return [line for line in lines if line.strip()]


def _generate(
    config: SluiceConfig, texts: list[str], options: argparse.Namespace, directory: Path, console: Console
) -> int:
    lines = [read(text, config.served_name) for text in texts]
    with _open_output(options.output) as output, Steps(console) as steps:

        async def work(service: ApiService) -> None:
            steps.done()
            batch = Batch(service, max_open=max_open(config), explain=options.explain)
            started_at = time.monotonic()
            with _progress(console) as progress:
                bar = progress.add_task("answering", total=len(lines))
                await batch.run(lines, output, lambda: progress.advance(bar))
            _show(batch.summary, time.monotonic() - started_at, options, console)

        async def main() -> None:
            task = asyncio.current_task()
            assert task is not None
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, task.cancel)
            await offline.run(config, directory, work, steps.begin, with_tokenizer=needs_tokenizer(texts))

        try:
            asyncio.run(main())
        except asyncio.CancelledError:
            console.print(f"stopped; {options.output} holds the answers up to here")
            return INTERRUPTED
    return 0


def _open_output(path: Path) -> TextIO:
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise SluiceError(f"--output {path} cannot be written: {error.strerror}; name another file") from None


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("  {task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not console.is_terminal,
    )


def _show(summary: Summary, elapsed_s: float, options: argparse.Namespace, console: Console) -> None:
    """What was done, in a line; with --explain who did it, too."""
    num_answers = summary.num_lines - summary.num_errors
    errors = f", {summary.num_errors} lines with errors" if summary.num_errors else ""
    rate = summary.num_tokens / elapsed_s if elapsed_s > 0 else 0.0
    console.print(f"  [green]✓[/] {num_answers} answers{errors}; {summary.num_tokens} tokens, {rate:.0f} a second")
    if options.explain and summary.routes:
        console.print(route_card.render_all(summary.routes))
