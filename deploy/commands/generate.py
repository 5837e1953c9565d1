"""Answers the requests of a file on this machine, without a server: one JSON object per line in, one per line out.

A line has "prompt_token_ids", "prompt" (text) or "messages", and any field of /v1/completions or
/v1/chat/completions with its default: max_tokens, temperature, top_p, seed, stop, ... A line without a seed gets one
from its text and place, so that the same file gives the same answers again. Answers stand in the order of the lines;
a line that cannot be answered becomes {"error": ...}, alone. Token ids need no tokenizer.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from cluster.config import Role, SluiceConfig
from cluster.errors import SluiceError
from deploy import offline, route_card
from deploy.answer_file import STANDARD, AnswerFile, fingerprints
from deploy.api_service import ApiService
from deploy.batch import Batch
from deploy.batch_progress import BatchProgress
from deploy.commands.options import add_config, add_model, config_of
from deploy.offline import for_one_job, max_open
from deploy.served_model import ServedModel
from deploy.silence import logged
from deploy.steps import Steps

HELP = "answer the requests of a JSON-lines file, without a server"

INTERRUPTED = 130  # exit status
_LONG_S = 86_400.0  # a file has no deadline, unless the config names one
_PATIENCE_S = 120.0  # for the successor of a worker that died


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--input", metavar="IN.jsonl", type=Path, required=True, help="the requests, one per line; -: standard input"
    )
    parser.add_argument(
        "--output",
        metavar="OUT.jsonl",
        type=Path,
        required=True,
        help="where the answers go; -: standard output. A file that is not empty is refused, unless with --resume",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the answers that OUT.jsonl holds already, after checking that they are those of IN.jsonl, and add "
        "the others",
    )
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
    ServedModel.read(config)  # a job that cannot begin leaves no file
    lines = _read_input(options.input)
    requests = fingerprints(config, lines)
    if options.resume:
        output = AnswerFile.resume(options.output, options.input, requests)
    else:
        output = AnswerFile.create(options.output, options.input)
    directory = Path(tempfile.mkdtemp(prefix="sluice-generate-"))
    log = directory / "log"
    try:
        with logged(log, screen=2) as console:
            if output.num_kept == len(lines):
                console.print(f"  [green]✓[/] all {len(lines)} answers are there")
                return 0
            return _generate(config, lines, requests, output, options, directory, console)
    finally:
        output.close()
        if not log.exists():
            shutil.rmtree(directory)


def configured(options: argparse.Namespace) -> SluiceConfig:
    """The config with what a file of requests wants where the config says nothing. Raises ConfigError."""
    config = for_one_job(config_of(options))
    router, http, pools = config.router, config.http, config.pools
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
    return config.model_copy(update={"router": router, "http": http, "pools": pools})


def _read_input(path: Path) -> list[bytes]:
    """Its lines, blank ones too, without their ends."""
    try:
        content = sys.stdin.buffer.read() if path == STANDARD else path.read_bytes()
    except OSError as error:
        raise SluiceError(f"--input {path} cannot be read: {error.strerror}; name another file") from None
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not lines[-1]:
        lines.pop()  # what follows the end of the last line
    return lines


def _generate(
    config: SluiceConfig,
    lines: list[bytes],
    requests: list[int],
    output: AnswerFile,
    options: argparse.Namespace,
    directory: Path,
    console: Console,
) -> int:
    with Steps(console) as steps:

        async def work(service: ApiService) -> None:
            steps.done()
            if output.num_kept:
                console.print(f"  {output.num_kept} of {len(lines)} answers are there")
            batch = Batch(service, max_open=max_open(config), explain=options.explain)
            with BatchProgress(console, batch, len(lines), output.num_kept) as progress:
                await batch.run(lines, requests, output, progress.line_done)
            _show(batch, progress, options, console)

        async def main() -> None:
            task = asyncio.current_task()
            assert task is not None
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, task.cancel)
            await offline.run(config, directory, work, steps.begin, with_tokenizer=True)

        try:
            asyncio.run(main())
        except asyncio.CancelledError:
            console.print(_how_to_go_on(output), soft_wrap=True)
            return INTERRUPTED
    return 0


def _how_to_go_on(output: AnswerFile) -> str:
    if output.path == STANDARD:
        return f"stopped after {output.num_written} answers"
    num_answers = output.num_kept + output.num_written
    return f"stopped; {output.path} holds {num_answers} answers: the same command with --resume goes on from there"


def _show(batch: Batch, progress: BatchProgress, options: argparse.Namespace, console: Console) -> None:
    """What was done, in a line; with --explain who did it, too."""
    summary = batch.summary
    num_answers = summary.num_lines - summary.num_errors
    errors = f", {summary.num_errors} lines with errors" if summary.num_errors else ""
    rate = f"{progress.tokens_per_s:.0f} a second"
    console.print(f"  [green]✓[/] {num_answers} answers{errors}; {summary.num_tokens} tokens, {rate}")
    if options.explain and summary.routes:
        console.print(route_card.render_all(summary.routes))
