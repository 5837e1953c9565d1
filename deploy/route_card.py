"""What happened to one request, as a card for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from deploy.openai_schema import RouteReport, WorkerRoute


def render(route: RouteReport, *, ttft_ms: float, itl_ms: float | None) -> Panel:
    """`ttft_ms` and `itl_ms` as the client saw them. Fits 80 columns."""
    rows = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    rows.add_column(style="bold", no_wrap=True)
    rows.add_column(overflow="fold")
    rows.add_row("plan", _plan(route))
    if route.encoder_tokens:
        rows.add_row("encode", _encoded(route))
    if route.prefill is not None:
        rows.add_row("prefill", _worker(route.prefill))
    rows.add_row("decode", _worker(route.decode))
    rows.add_row("prompt", f"{_count(route.prompt_tokens, 'token')}, {route.prefix_hit_tokens} of them a prefix hit")
    if route.fetched_blocks:
        rows.add_row("fetched", _fetched(route))
    rows.add_row("computed", _computed(route))
    rows.add_row("moved", _moved(route))
    rows.add_row("first token", f"{ttft_ms:.0f} ms after the request")
    if itl_ms is not None:
        rows.add_row("then", f"a token every {itl_ms:.1f} ms")
    picture = Text(_picture(route), style="cyan", no_wrap=True)
    return Panel(Group(picture, Text(), rows), title="route", title_align="left", border_style="dim", padding=(1, 2))


def render_all(routes: Sequence[RouteReport]) -> Table:
    """Many routes, added up by the workers that they took."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("prefill", "decode"):
        table.add_column(heading)
    for heading in ("lines", "prompt", "hit", "blocks", "bytes"):
        table.add_column(heading, justify="right")
    table.add_column("over")
    pairs: dict[tuple[str, str, str], list[RouteReport]] = {}
    for route in routes:
        prefill = "itself" if route.prefill is None else f"{route.prefill.name} ({route.prefill.pid})"
        pairs.setdefault((prefill, f"{route.decode.name} ({route.decode.pid})", route.transport), []).append(route)
    for (prefill, decode, transport), taken in sorted(pairs.items()):
        table.add_row(
            prefill,
            decode,
            str(len(taken)),
            str(sum(route.prompt_tokens for route in taken)),
            str(sum(route.prefix_hit_tokens for route in taken)),
            str(sum(route.blocks for route in taken)),
            size(sum(route.bytes for route in taken)),
            transport,
        )
    return table


def size(num_bytes: int) -> str:
    """With decimal units, as transfer rates have them."""
    for unit, divisor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= divisor:
            return f"{num_bytes / divisor:.1f} {unit}"
    return f"{num_bytes} bytes"


def _picture(route: RouteReport) -> str:
    if route.prefill is None:
        return f"HTTP ──▶ ingress ──▶ {route.decode.name}"
    blocks = _count(route.blocks, "block")
    return f"HTTP ──▶ ingress ──▶ {route.decode.name} ◀── {blocks} over {route.transport} ── {route.prefill.name}"


def _plan(route: RouteReport) -> str:
    if route.prefill is None and route.encoded_by not in (None, route.decode.name):
        return f"disaggregated: {route.encoded_by} the prompt, {route.decode.name} the answer"
    if route.plan == "aggregated" or route.prefill is None:
        return f"aggregated: {route.decode.name} did it all"
    return f"disaggregated: {route.prefill.name} the prompt, {route.decode.name} the answer"


def _worker(worker: WorkerRoute) -> str:
    return f"{worker.name}, pid {worker.pid}, incarnation {worker.incarnation[:12]}"


def _computed(route: RouteReport) -> str:
    where = "" if route.prefill is None else f" on {route.prefill.name}, each offered as soon as it was done"
    extra = ""
    if route.recomputed_tokens:
        extra += f"; {_count(route.recomputed_tokens, 'token')} again on {route.decode.name}"
    if route.preemptions:
        extra += f"; preempted {_count(route.preemptions, 'time')}"
    if route.attempts > 1:
        extra += f"; attempt {route.attempts}"
    return f"in {_count(route.chunks, 'chunk')}{where}{extra}"


def _encoded(route: RouteReport) -> str:
    tokens = _count(route.encoder_tokens, "token")
    if route.encoded_by is None:
        return f"{tokens}, found in the cache of {route.decode.name}"
    blocks = _count(route.encoded_blocks, "block")
    moved = f", {blocks}, {size(route.encoded_bytes)} in {route.encode_ms:.1f} ms" if route.encoded_blocks else ""
    return f"{tokens} read by {route.encoded_by}{moved}"


def _fetched(route: RouteReport) -> str:
    """Before the rest was computed."""
    blocks = _count(route.fetched_blocks, "block")
    return f"{blocks}, {size(route.fetched_bytes)} from the cache of {route.fetched_from} in {route.fetch_ms:.1f} ms"


def _moved(route: RouteReport) -> str:
    if not route.blocks:
        return "nothing"
    rate = f" in {route.transfer_ms:.1f} ms, {route.gb_per_s:.2f} GB/s" if route.transfer_ms > 0 else ""
    return f"{_count(route.blocks, 'block')}, {size(route.bytes)} over {route.transport}{rate}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
