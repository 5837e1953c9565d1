"""Shows one chat completion travel: a prompt computed by one process, answered by another.

Starts a Ray cluster of its own with a prefill worker, a decode worker and the HTTP front door, sends one streaming
request, prints the tokens as they come and the route that they took, and stops everything it started. The model is
made here: DeepSeek-V3.2 in miniature with random weights. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from cluster.config import SluiceConfig
from cluster.config_file import load
from cluster.errors import SluiceError
from deploy import demo_checkpoint, preflight, route_card
from deploy.commands.options import add_config
from deploy.event_client import events
from deploy.local_app import LocalApp
from deploy.openai_schema import RouteReport
from deploy.signals import StopSignals
from deploy.silence import logged
from deploy.steps import Steps

HELP = "watch one chat completion travel through a cluster of its own, from nothing to nothing"

RECIPE = Path(__file__).parents[1] / "configs" / "demo.yaml"
MODEL = "sluice-demo"
SYSTEM = "You are a small model with random weights. Whatever you say is noise, and that is fine."
PROMPT = (
    "A long prompt is computed in one process, and another process answers it. How do the keys and values of the "
    "attention layers travel from the first to the second, and what happens when one of the two is killed on the "
    "way? Please explain it step by step, and name the parts."
)
_ANSWER_S = 60.0


@dataclass(slots=True)
class Answer:
    """What came over HTTP, and when, as the client saw it. Seconds of the monotonic clock."""

    asked_at: float
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    first_at: float = 0.0
    last_at: float = 0.0
    route: RouteReport | None = None

    @property
    def ttft_ms(self) -> float:
        return 1e3 * (self.first_at - self.asked_at)

    @property
    def itl_ms(self) -> float | None:
        if len(self.token_ids) < 2:
            return None
        return 1e3 * (self.last_at - self.first_at) / (len(self.token_ids) - 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write what the route card says to a file, too")
    parser.add_argument("--prompt", default=PROMPT, help="what to ask (default: a question of some 100 tokens)")
    parser.add_argument("--max-tokens", type=int, default=48, metavar="N", help="length of the answer (default: 48)")
    parser.add_argument(
        "--cache", metavar="DIR", type=Path, default=Path(preflight.ROOT) / ".cache", help="where the model is kept"
    )


def run(options: argparse.Namespace) -> int:
    config = _config(options, demo_checkpoint.place(options.cache))
    if options.json:
        _write(options.json, {})  # what cannot be written should fail now
    with logged(options.cache / f"demo-{os.getpid()}.log") as console:
        return _demo(config, options, console)


def _demo(config: SluiceConfig, options: argparse.Namespace, console: Console) -> int:
    console.print("[bold]sluice demo[/]: one process computes a prompt, another one answers it\n")
    signals = StopSignals()
    signals.take()
    app: LocalApp | None = None
    try:
        with Steps(console) as steps:
            steps.begin("the model")
            is_new = demo_checkpoint.ensure(options.cache)
            size = route_card.size(demo_checkpoint.size_bytes(options.cache))
            steps.done(f"DeepSeek-V3.2 in miniature, {size}, made {'now' if is_new else 'before'}")
            app = LocalApp(config, steps.begin, show_logs=True)
            url = app.start()
            signals.take()  # Ray has put its own in their place
        answer = _ask(url, options, console)
        _show(answer, console)
        if options.json:
            _write(options.json, _tree(answer))
    except KeyboardInterrupt:
        console.print("\nstopping")
        return 0
    finally:
        if app is not None:
            signals.ignore()
            with Steps(console) as steps:
                steps.begin("stopping all that was started")
                app.kill()
    return 0


def _config(options: argparse.Namespace, model: Path) -> SluiceConfig:
    fixed = {"model.path": str(model), "model.served_name": MODEL}
    return load(options.config or RECIPE, options.overrides, fixed)


def _ask(url: str, options: argparse.Namespace, console: Console) -> Answer:
    """Prints the text as it comes."""
    console.print(f"\n[bold]POST {url}/v1/chat/completions[/]")
    console.print(Padding(Text(options.prompt, style="dim"), (0, 2)))
    console.print("\n[bold]The answer[/], one token at a time:")
    body = {
        "model": MODEL,
        "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": options.prompt}],
        "max_tokens": options.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
        "return_route": True,
    }
    answer = Answer(time.monotonic())
    column = 0
    for event in events(f"{url}/v1/chat/completions", body, timeout_s=_ANSWER_S):
        now = time.monotonic()
        for choice in event["choices"]:
            new_ids = choice.get("token_ids") or []
            if new_ids:
                answer.first_at = answer.first_at or now
                answer.last_at = now
            answer.token_ids += new_ids
            text = choice["delta"].get("content") or ""
            answer.text += text
            column = _type(_printable(text), column, console)
        if event.get("usage"):
            answer.route = RouteReport.model_validate(event["usage"]["sluice"])
    console.print("\n")
    return answer


def _type(text: str, column: int, console: Console) -> int:
    """Prints `text` behind what stands there, inside a margin; the column afterwards."""
    for character in text:
        if column == 0 or column >= console.width - 2:
            console.file.write("\n  " if column else "  ")
            column = 2
        console.file.write(character)
        column += 2 if unicodedata.east_asian_width(character) in "WF" else 1
    console.file.flush()
    return column


def _printable(text: str) -> str:
    """Noise holds control characters, which a terminal would obey."""
    return "".join(character if character.isprintable() else "·" for character in text)


def _show(answer: Answer, console: Console) -> None:
    assert answer.route is not None, "return_route was asked for"
    console.print(route_card.render(answer.route, ttft_ms=answer.ttft_ms, itl_ms=answer.itl_ms))
    console.print("The weights are random, so the text is noise; the way it took is real.")
    console.print("Blocks this small show latency; `python -m deploy doctor` measures the rate.\n")


def _tree(answer: Answer) -> dict[str, object]:
    assert answer.route is not None
    return answer.route.model_dump(mode="json") | {
        "ttft_ms": answer.ttft_ms,
        "itl_ms": answer.itl_ms,
        "text": answer.text,
        "token_ids": answer.token_ids,
    }


def _write(path: Path, tree: dict[str, object]) -> None:
    try:
        path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise SluiceError(f"--json {path} cannot be written: {error.strerror}; name another file") from None
