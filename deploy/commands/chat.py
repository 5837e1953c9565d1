"""Talks with a model in the terminal: answers come as they are made, with what each one took.

Starts one prefill and one decode worker on this machine (or the pools of --config), or talks to a running cluster
(--url). /reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an answer. Each question is sent with
all that was said before, so what it shares with the one before is a prefix hit. Questions may also be piped in, one
per line: the answers go to standard output, the figures to standard error. An API key for --url is taken from the
environment variable OPENAI_API_KEY.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from rich.console import Console
from rich.text import Text

from cluster.config import SluiceConfig
from cluster.errors import CheckpointError, InvalidRequest, SluiceError
from deploy.commands.options import add_config, add_model, config_of
from deploy.conversation import Conversation, Turn, served_model
from deploy.local_front import LocalFront
from deploy.offline import for_one_job
from deploy.served_model import ServedModel
from deploy.signals import Stop, StopSignals
from deploy.silence import silence
from deploy.steps import Steps
from deploy.tokenizer import TOKENIZER_FILES

HELP = "talk with a model in the terminal, on a cluster of its own or a running one"

INTERRUPTED = 130  # exit status
_BLOCK_SIZE = 16  # tokens: a prefix hit is made of whole blocks, and questions are short
_COMMANDS = "/reset forgets what was said, /quit ends, Ctrl-C stops an answer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--url", metavar="URL", help="talk to this cluster, as `serve` prints it, and start none; --model is its name"
    )
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before everything else")
    parser.add_argument("--max-tokens", metavar="N", type=int, help="longest answer (default: all that the model has)")
    parser.add_argument("--temperature", metavar="T", type=float, default=1.0, help="0: greedy (default: 1)")
    add_config(parser)


def run(options: argparse.Namespace) -> int:
    signals = StopSignals()
    signals.take()
    try:
        if options.url is not None:
            return _talk_to(options)
        return _talk_to_own(options, signals)
    except KeyboardInterrupt:
        return INTERRUPTED


def _talk_to(options: argparse.Namespace) -> int:
    given = {"--config": options.config, "--set": options.overrides, "--load-format": options.load_format}
    if idle := [name for name, value in given.items() if value]:
        raise SluiceError(f"{' and '.join(idle)} cannot change the cluster behind --url; remove one of the two")
    url, key = options.url.rstrip("/").removesuffix("/v1"), os.environ.get("OPENAI_API_KEY") or None
    name = served_model(url, key)
    if options.model not in (None, name) and Path(options.model).name != name:
        raise SluiceError(f"--url {url} serves {name}, not {options.model}; remove --model")
    return _Dialogue(_conversation(url, name, options, key), Console(stderr=True, highlight=False)).run()


def _talk_to_own(options: argparse.Namespace, signals: StopSignals) -> int:
    config = _configured(options)
    ServedModel.read(config)
    folder = Path(config.model.path)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}); copy the model's there")
    directory = Path(tempfile.mkdtemp(prefix="sluice-chat-"))
    log = directory / "log"
    front: LocalFront | None = None
    try:
        with silence(log, screen=2) as console, Steps(console) as steps:
            front = LocalFront(config, directory, steps.begin)
            url = front.start()
        console = Console(stderr=True, highlight=False)
        conversation = _conversation(url, config.served_name, options, None)
        return _Dialogue(conversation, console, front.check).run()
    except SluiceError as error:
        if not (log.is_file() and log.stat().st_size):
            raise
        kept = Path(tempfile.mkstemp(prefix="sluice-chat-", suffix=".log")[1])
        shutil.copyfile(log, kept)
        raise SluiceError(f"{error}\nWhat was said meanwhile: {kept}") from error
    finally:
        signals.ignore()
        if front is not None:
            front.stop()
        shutil.rmtree(directory)


def _configured(options: argparse.Namespace) -> SluiceConfig:
    """With small blocks, and quiet, where the config says nothing."""
    config = for_one_job(config_of(options))
    kv, log = config.kv, config.log
    if "block_size" not in kv.model_fields_set:
        kv = kv.model_copy(update={"block_size": _BLOCK_SIZE})
    if "level" not in log.model_fields_set:
        log = log.model_copy(update={"level": "error"})
    return config.model_copy(update={"kv": kv, "log": log})


def _conversation(url: str, model: str, options: argparse.Namespace, key: str | None) -> Conversation:
    asked = {"temperature": options.temperature, "max_tokens": options.max_tokens}
    settings = {name: value for name, value in asked.items() if value is not None}
    return Conversation(url, model, system=options.system, settings=settings, api_key=key)


class _Dialogue:
    """Questions from standard input, answers to standard output, the rest to `console`."""

    def __init__(self, conversation: Conversation, console: Console, check: Callable[[], None] | None = None) -> None:
        """`check` raises what ended the cluster for good, once a question has failed."""
        self._conversation = conversation
        self._console = console
        self._check = check
        self._is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
        for stream in (sys.stdin, sys.stdout):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(encoding="utf-8", errors="replace")

    def run(self) -> int:
        if self._is_interactive:
            import readline  # noqa: F401 — input() edits lines with it

            self._say(_COMMANDS)
        while (question := self._question()) is not None:
            match question.strip():
                case "" | "/help":
                    self._say(_COMMANDS)
                case "/quit":
                    return 0
                case "/reset":
                    self._conversation.reset()
                    self._say("forgotten")
                case text if text.startswith("/") and text[1:].isalpha():
                    self._say(f"there is no {text}; {_COMMANDS}")
                case text:
                    self._answer(text)
        return 0

    def _question(self) -> str | None:
        """None: there are no more."""
        if not self._is_interactive:
            return sys.stdin.readline() or None
        while True:
            try:
                return input("\nyou> ")
            except EOFError:
                print()
                return None
            except Stop as stop:
                _unless_interrupted(stop)
                self._say("\nCtrl-D or /quit ends")

    def _answer(self, question: str) -> None:
        try:
            with closing(self._conversation.ask(question)) as pieces:
                for piece in pieces:
                    sys.stdout.write(_printable(piece) if self._is_interactive else piece)
                    sys.stdout.flush()
        except Stop as stop:
            if not self._is_interactive:
                raise
            _unless_interrupted(stop)
        except SluiceError as error:
            if self._check is not None:
                self._check()
            if not self._is_interactive:
                raise
            hint = "; /reset begins anew" if isinstance(error, InvalidRequest) else ""
            self._say(f"\nerror: {error}{hint}")
            return
        print(flush=True)
        self._say(_told(self._conversation.turn))

    def _say(self, text: str) -> None:
        self._console.print(Text(text, style="dim"), soft_wrap=True)


def _unless_interrupted(stop: Stop) -> None:
    """SIGTERM ends the program, Ctrl-C what is under way."""
    if stop.args != ("SIGINT",):
        raise stop


def _told(turn: Turn) -> str:
    parts = [f"{turn.num_tokens} tokens" if turn.finish else f"stopped after {turn.num_tokens} tokens"]
    if turn.finish == "length":
        parts[0] += ", cut there"
    if turn.ttft_s is not None:
        parts.append(f"the first after {1e3 * turn.ttft_s:.0f} ms")
    if turn.tokens_per_s is not None:
        parts.append(f"{turn.tokens_per_s:.1f} tok/s")
    if turn.num_prompt_tokens is not None:
        parts.append(f"prompt of {turn.num_prompt_tokens}, {turn.num_hit_tokens} of them a prefix hit")
    return "  " + " · ".join(parts)


def _printable(text: str) -> str:
    """What a terminal would obey is not shown to it."""
    return "".join(c if c.isprintable() or c in "\n\t" else "·" for c in text)
