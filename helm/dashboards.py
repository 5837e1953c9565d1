"""The dashboards: which figures are looked at together. Sums are over all processes of one app, `$app`."""

from __future__ import annotations

from typing import Final

from helm.panels import Dashboard, Panel, Query

_APP: Final = 'app="$app"'
_RANGE: Final = "$__rate_interval"
_TOKENS: Final = "suffix: tok/s"


def _rate(metric: str, by: str = "", where: str = "") -> str:
    """Per second, summed over processes, `by` labels."""
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate({metric}{{{_APP}{where}}}[{_RANGE}]))"


def _increase(metric: str, by: str = "", where: str = "") -> str:
    """For what is rare: how many in the time that a rate is taken over, summed over processes, `by` labels."""
    return _rate(metric, by, where).replace("(rate(", "(increase(", 1)


def _gauge(metric: str, by: str = "", where: str = "") -> str:
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} ({metric}{{{_APP}{where}}})"


def _quantile(share: str, histogram: str, by: str = "") -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, {_rate(histogram + '_bucket', labels)})"


def _mean(histogram: str, by: str) -> str:
    """Where buckets are too wide for a quantile."""
    return f"{_rate(histogram + '_sum', by)} / {_rate(histogram + '_count', by)}"


def _quantiles(histogram: str) -> tuple[Query, ...]:
    return tuple(Query(_quantile(share, histogram), f"p{share[2:]}") for share in ("0.50", "0.90", "0.99"))


def _under(histogram: str, limit: str) -> str:
    """Share of observations up to `limit`, a bucket's bound."""
    where = f', le="{limit}"'
    return f"{_rate(histogram + '_bucket', where=where)} / {_rate(histogram + '_count')}"


def _lines(title: str, description: str, unit: str, *queries: tuple[str, str]) -> Panel:
    return Panel(title, description, unit, tuple(Query(*query) for query in queries))


def _stack(title: str, description: str, unit: str, expr: str, legend: str) -> Panel:
    return Panel(title, description, unit, (Query(expr, legend),), "stack")


def _heat(title: str, description: str, histogram: str) -> Panel:
    return Panel(title, description, "s", (Query(_rate(histogram + "_bucket", "le"), "{{le}}"),), "heatmap")


_OVERVIEW: Final = Dashboard(
    "overview",
    "Overview",
    "What clients see. Look here first.",
    (
        _stack(
            "Requests",
            "That ended, by outcome.",
            "reqps",
            _rate("sluice_ingress_requests_total", "outcome"),
            "{{outcome}}",
        ),
        _lines(
            "Objectives",
            "Share of requests with their first token within 1 s, and of tokens that followed within 0.1 s.",
            "percentunit",
            (_under("sluice_ingress_ttft_seconds", "1.0"), "first token ≤ 1 s"),
            (_under("sluice_ingress_inter_token_seconds", "0.1"), "next token ≤ 0.1 s"),
        ),
        _lines(
            "Tokens",
            "Generated ones are the goodput where objectives are met.",
            _TOKENS,
            (_rate("sluice_ingress_prompt_tokens_total"), "prompt"),
            (_rate("sluice_ingress_generated_tokens_total"), "generated"),
        ),
        _heat("Time to first token", "Arrival to first token.", "sluice_ingress_ttft_seconds"),
        _heat("Between two tokens", "Of a stream.", "sluice_ingress_inter_token_seconds"),
        _heat("Whole answers", "Arrival to last token.", "sluice_ingress_end_to_end_seconds"),
        Panel("Time to first token", "Quantiles.", "s", _quantiles("sluice_ingress_ttft_seconds")),
        Panel("Between two tokens", "Quantiles.", "s", _quantiles("sluice_ingress_inter_token_seconds")),
        _lines(
            "Open requests",
            "Waiting ones are beyond limits.max_requests.",
            "short",
            (_gauge("sluice_ingress_open_requests"), "open"),
            (_gauge("sluice_ingress_queued_requests"), "of them waiting"),
        ),
    ),
)

_POOLS: Final = Dashboard(
    "pools",
    "Pools",
    "Workers: how many, how busy, how fast.",
    (
        _stack(
            "Workers",
            "By pool and state.",
            "short",
            _gauge("sluice_cluster_workers", "pool, state"),
            "{{pool}} {{state}}",
        ),
        _lines(
            "Wanted workers",
            "Of the pools that autoscaling sizes: what it asks for, and what the load needs.",
            "short",
            (_gauge("sluice_cluster_wanted_workers", "pool"), "{{pool}} wanted"),
            (_gauge("sluice_cluster_needed_workers", "pool, stage"), "{{pool}} needed for {{stage}}"),
        ),
        _lines(
            "Replaced",
            "Workers that died or hung.",
            "short",
            (_increase("sluice_cluster_restarts_total", "pool"), "{{pool}}"),
        ),
        _stack(
            "Waiting",
            "Sequences not yet scheduled.",
            "short",
            _gauge("sluice_engine_waiting_sequences", "name"),
            "{{name}}",
        ),
        _stack(
            "Running",
            "Sequences being computed.",
            "short",
            _gauge("sluice_engine_running_sequences", "name"),
            "{{name}}",
        ),
        _lines(
            "Queue",
            "Acceptance to first step, p90.",
            "s",
            (_quantile("0.90", "sluice_engine_queue_seconds", "stage"), "{{stage}}"),
        ),
        _lines(
            "Batch",
            "Sequences in a step, mean.",
            "short",
            (_mean("sluice_engine_batch_sequences", "role"), "{{role}}"),
        ),
        _lines(
            "Step",
            "One step of the engine, median and p99.",
            "s",
            (_quantile("0.50", "sluice_engine_step_seconds", "role"), "{{role}} p50"),
            (_quantile("0.99", "sluice_engine_step_seconds", "role"), "{{role}} p99"),
        ),
        _lines(
            "Tokens",
            "Computed in steps, and drawn.",
            _TOKENS,
            (_rate("sluice_engine_computed_tokens_total", "role"), "{{role}} computed"),
            (_rate("sluice_engine_sampled_tokens_total", "role"), "{{role}} drawn"),
        ),
    ),
)

_KV: Final = Dashboard(
    "kv",
    "KV",
    "Blocks: what they hold, and what is found in them.",
    (
        _stack("Blocks", "By state, of all workers.", "short", _gauge("sluice_kv_blocks", "state"), "{{state}}"),
        _lines(
            "Free blocks", "By worker.", "short", (_gauge("sluice_kv_blocks", "name", ', state="free"'), "{{name}}")
        ),
        _lines(
            "Prefix hits",
            "Share of the prompt tokens that were looked for and found in the worker's own cache.",
            "percentunit",
            (
                f"{_rate('sluice_engine_prefix_hit_tokens_total', 'stage')}"
                f" / {_rate('sluice_engine_prefix_lookup_tokens_total', 'stage')}",
                "{{stage}}",
            ),
        ),
        _lines(
            "Preemptions",
            "Sequences put back because blocks ran out.",
            "short",
            (_increase("sluice_engine_preemptions_total", "name"), "{{name}}"),
        ),
        _lines(
            "Leases",
            "Requests whose blocks are kept for a sink, and those blocks.",
            "short",
            (_gauge("sluice_kv_leases"), "leases"),
            (_gauge("sluice_kv_leased_blocks"), "blocks"),
        ),
        _lines(
            "Expired leases",
            "That ran out without a release.",
            "short",
            (_increase("sluice_kv_expired_leases_total", "name"), "{{name}}"),
        ),
    ),
)

_TRANSFERS: Final = Dashboard(
    "transfers",
    "Transfers",
    "Blocks on their way from worker to worker.",
    (
        _stack("Bytes", "Read, by source.", "Bps", _rate("sluice_transfer_bytes_total", "peer"), "{{peer}}"),
        _lines(
            "Rate of a pair",
            "Bytes read over the time that reads took; by sink, source and transport.",
            "Bps",
            (
                f"{_rate('sluice_transfer_bytes_total', 'name, peer, transport')}"
                f" / {_rate('sluice_transfer_read_seconds_sum', 'name, peer, transport')}",
                "{{name}} ← {{peer}} {{transport}}",
            ),
        ),
        _lines(
            "Rate when warmed",
            "A pair far below the others has fallen back to TCP.",
            "Bps",
            (f"sluice_transfer_warm_rate_bytes_per_second{{{_APP}}}", "{{name}} ← {{peer}}"),
        ),
        _stack("Reads", "By outcome.", "ops", _rate("sluice_transfer_pulls_total", "outcome"), "{{outcome}}"),
        Panel("Time of a read", "Quantiles.", "s", _quantiles("sluice_transfer_read_seconds")),
        _lines(
            "Waiting for KV",
            "Sequences whose blocks are on their way.",
            "short",
            (_gauge("sluice_engine_pulling_sequences", "name"), "{{name}}"),
        ),
        _stack(
            "Fetches",
            "Prefixes fetched rather than computed, by outcome.",
            "ops",
            _rate("sluice_transfer_fetches_total", "outcome"),
            "{{outcome}}",
        ),
        _lines(
            "Fetched tokens",
            "That need not be computed.",
            _TOKENS,
            (_rate("sluice_transfer_fetched_tokens_total"), "tokens"),
        ),
        _lines(
            "Quarantine",
            "Blocks that a read may still touch, and those that came there, by side.",
            "short",
            (_gauge("sluice_kv_blocks", where=', state="quarantined"'), "blocks"),
            (_increase("sluice_kv_quarantines_total", "side"), "{{side}} came"),
        ),
    ),
)

_ROUTER: Final = Dashboard(
    "router",
    "Router",
    "What routers believe, and whether it is so.",
    (
        _lines(
            "Hits",
            "Tokens expected in a cache and tokens found there, of the same requests.",
            _TOKENS,
            (_rate("sluice_router_expected_hit_tokens_total", "stage"), "{{stage}} expected"),
            (_rate("sluice_router_found_hit_tokens_total", "stage"), "{{stage}} found"),
        ),
        _lines(
            "Event lag",
            "Batches of block events not heard yet, the worst replica.",
            "short",
            (f"max by (peer) (sluice_router_event_lag_batches{{{_APP}}})", "{{peer}}"),
        ),
        _lines(
            "Event streams",
            "1: all block events of the worker are known everywhere.",
            "short",
            (f"min by (peer) (sluice_router_event_stream_alive{{{_APP}}})", "{{peer}}"),
        ),
        _lines(
            "Event gaps",
            "Events that were missing and asked for again.",
            "short",
            (_increase("sluice_router_event_gaps_total", "name"), "{{name}}"),
        ),
        _lines(
            "Index",
            "Blocks, once for each holder.",
            "short",
            (_gauge("sluice_router_indexed_blocks", "name"), "{{name}}"),
        ),
        _stack(
            "Local prompts",
            "Planned for the decode worker itself, by reason.",
            "reqps",
            _rate("sluice_ingress_local_plans_total", "reason"),
            "{{reason}}",
        ),
        _lines(
            "Choices",
            "Requests that each worker was given and began: how even they are.",
            "reqps",
            (_rate("sluice_engine_queue_seconds_count", "name, stage"), "{{name}} {{stage}}"),
        ),
        _lines(
            "Turn",
            "Arrival to turn, p50 and p99.",
            "s",
            *[(_quantile(share, "sluice_ingress_queue_seconds"), f"p{share[2:]}") for share in ("0.50", "0.99")],
        ),
        _stack(
            "Refused",
            "Requests answered 429, by limit.",
            "reqps",
            _rate("sluice_ingress_rejections_total", "limit"),
            "{{limit}}",
        ),
    ),
)

_FAILURES: Final = Dashboard(
    "failures",
    "Failures",
    "What went wrong, whether or not a client saw it.",
    (
        _stack(
            "Failures",
            "Of requests and attempts, by reason.",
            "reqps",
            _rate("sluice_ingress_failures_total", "reason"),
            "{{reason}}",
        ),
        _lines(
            "Went on elsewhere",
            "Streams replayed elsewhere, requests sent to their spare source, or handed over by a leaving worker.",
            "reqps",
            (_rate("sluice_ingress_replays_total"), "replayed"),
            (_rate("sluice_transfer_spares_used_total"), "spare source"),
            (_rate("sluice_engine_handovers_total"), "handed over"),
        ),
        _stack(
            "In engines",
            "Requests that a worker refused or ended early.",
            "reqps",
            _rate("sluice_engine_failures_total", "stage, reason"),
            "{{stage}} {{reason}}",
        ),
        _stack(
            "Sessions that broke",
            "By reason.",
            "short",
            _increase("sluice_words_broken_sessions_total", "reason"),
            "{{reason}}",
        ),
        _lines(
            "Open sessions",
            "By kind of peer.",
            "short",
            (_gauge("sluice_words_sessions", "peer_kind"), "{{peer_kind}}"),
        ),
        _stack(
            "Dropped frames",
            "By reason.",
            "short",
            _increase("sluice_words_dropped_frames_total", "reason"),
            "{{reason}}",
        ),
        _lines(
            "Overflows",
            "Requests ended because their reader was too slow.",
            "short",
            (_increase("sluice_words_overflows_total"), "requests"),
        ),
        _lines(
            "Reads that failed",
            "By outcome.",
            "short",
            (_increase("sluice_transfer_pulls_total", "outcome", ', outcome!="ok"'), "{{outcome}}"),
        ),
        _stack(
            "Computed by decode",
            "Prompts that a decode worker computed itself, by reason.",
            "reqps",
            _rate("sluice_engine_local_prefills_total", "reason"),
            "{{reason}}",
        ),
    ),
)

DASHBOARDS: Final = (_OVERVIEW, _POOLS, _KV, _TRANSFERS, _ROUTER, _FAILURES)
