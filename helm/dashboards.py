"""The dashboards: which figures are looked at together. Sums are over all processes of one app, `$app`."""

from __future__ import annotations

from typing import Final

from helm.expressions import APP, INGRESSES, WORKERS, gauge, increase, mean, quantile, quantiles, rate, under
from helm.panels import Dashboard, Panel, Query

_TOKENS: Final = "suffix: tok/s"


def _lines(title: str, description: str, unit: str, *queries: tuple[str, str]) -> Panel:
    return Panel(title, description, unit, tuple(Query(*query) for query in queries))


def _stack(title: str, description: str, unit: str, expr: str, legend: str) -> Panel:
    return Panel(title, description, unit, (Query(expr, legend),), "stack")


def _heat(title: str, description: str, histogram: str) -> Panel:
    return Panel(title, description, "s", (Query(rate(histogram + "_bucket", "le"), "{{le}}"),), "heatmap")


_OVERVIEW: Final = Dashboard(
    "overview",
    "Overview",
    "What clients see. Look here first.",
    (
        _stack(
            "Requests",
            "That ended, by outcome.",
            "reqps",
            rate("sluice_ingress_requests_total", "outcome"),
            "{{outcome}}",
        ),
        _lines(
            "Objectives",
            "Share of requests with their first token within 1 s, and of tokens that followed within 0.1 s.",
            "percentunit",
            (under("sluice_ingress_ttft_seconds", "1.0"), "first token ≤ 1 s"),
            (under("sluice_ingress_inter_token_seconds", "0.1"), "next token ≤ 0.1 s"),
        ),
        _lines(
            "Tokens",
            "Generated ones are the goodput where objectives are met.",
            _TOKENS,
            (rate("sluice_ingress_prompt_tokens_total"), "prompt"),
            (rate("sluice_ingress_generated_tokens_total"), "generated"),
        ),
        _heat("Time to first token", "Arrival to first token.", "sluice_ingress_ttft_seconds"),
        _heat("Between two tokens", "Of a stream.", "sluice_ingress_inter_token_seconds"),
        _heat("Whole answers", "Arrival to last token.", "sluice_ingress_end_to_end_seconds"),
        Panel("Time to first token", "Quantiles.", "s", quantiles("sluice_ingress_ttft_seconds")),
        Panel("Between two tokens", "Quantiles.", "s", quantiles("sluice_ingress_inter_token_seconds")),
        _lines(
            "Open requests",
            "Waiting ones are beyond limits.max_requests.",
            "short",
            (gauge("sluice_ingress_open_requests"), "open"),
            (gauge("sluice_ingress_queued_requests"), "of them waiting"),
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
            gauge("sluice_cluster_workers", "pool, state"),
            "{{pool}} {{state}}",
        ),
        _lines(
            "Wanted workers",
            "Of the pools that autoscaling sizes: what it asks for, and what the load needs.",
            "short",
            (gauge("sluice_cluster_wanted_workers", "pool"), "{{pool}} wanted"),
            (gauge("sluice_cluster_needed_workers", "pool, stage"), "{{pool}} needed for {{stage}}"),
        ),
        _lines(
            "Replaced",
            "Workers that died or hung.",
            "short",
            (increase("sluice_cluster_restarts_total", "pool"), "{{pool}}"),
        ),
        _stack(
            "Waiting",
            "Sequences not yet scheduled.",
            "short",
            gauge("sluice_engine_waiting_sequences", "name", WORKERS),
            "{{name}}",
        ),
        _stack(
            "Running",
            "Sequences being computed.",
            "short",
            gauge("sluice_engine_running_sequences", "name", WORKERS),
            "{{name}}",
        ),
        _lines(
            "Queue",
            "Acceptance to first step, p90.",
            "s",
            (quantile("0.90", "sluice_engine_queue_seconds", "stage"), "{{stage}}"),
        ),
        _lines(
            "Batch",
            "Sequences in a step, mean.",
            "short",
            (mean("sluice_engine_batch_sequences", "role", WORKERS), "{{role}}"),
        ),
        _lines(
            "Step",
            "One step of the engine, median and p99.",
            "s",
            (quantile("0.50", "sluice_engine_step_seconds", "role", WORKERS), "{{role}} p50"),
            (quantile("0.99", "sluice_engine_step_seconds", "role", WORKERS), "{{role}} p99"),
        ),
        _lines(
            "Tokens",
            "Computed in steps, and drawn.",
            _TOKENS,
            (rate("sluice_engine_computed_tokens_total", "role", WORKERS), "{{role}} computed"),
            (rate("sluice_engine_sampled_tokens_total", "role", WORKERS), "{{role}} drawn"),
        ),
        _lines(
            "Acceptance length",
            "Tokens that a sequence gets of a step that checks guesses for it: near 1, guessing costs more than it "
            "brings. Without engine.speculation nothing is guessed.",
            "short",
            (
                f"1 + {rate('sluice_engine_accepted_draft_tokens_total', 'role', WORKERS)}"
                f" / {rate('sluice_engine_drafted_rows_total', 'role', WORKERS)}",
                "{{role}}",
            ),
        ),
    ),
)

_KV: Final = Dashboard(
    "kv",
    "KV",
    "Blocks: what they hold, and what is found in them.",
    (
        _stack("Blocks", "By state, of all workers.", "short", gauge("sluice_kv_blocks", "state"), "{{state}}"),
        _lines("Free blocks", "By worker.", "short", (gauge("sluice_kv_blocks", "name", ', state="free"'), "{{name}}")),
        _lines(
            "Prefix hits",
            "Share of the prompt tokens that were looked for and found in the worker's own cache.",
            "percentunit",
            (
                f"{rate('sluice_engine_prefix_hit_tokens_total', 'stage')}"
                f" / {rate('sluice_engine_prefix_lookup_tokens_total', 'stage')}",
                "{{stage}}",
            ),
        ),
        _lines(
            "Preemptions",
            "Sequences put back because blocks ran out.",
            "short",
            (increase("sluice_engine_preemptions_total", "name", WORKERS), "{{name}}"),
        ),
        _lines(
            "Leases",
            "Requests whose blocks are kept for a sink, and those blocks.",
            "short",
            (gauge("sluice_kv_leases"), "leases"),
            (gauge("sluice_kv_leased_blocks"), "blocks"),
        ),
        _lines(
            "Expired leases",
            "That ran out without a release.",
            "short",
            (increase("sluice_kv_expired_leases_total", "name", WORKERS), "{{name}}"),
        ),
    ),
)

_TRANSFERS: Final = Dashboard(
    "transfers",
    "Transfers",
    "Blocks on their way from worker to worker.",
    (
        _stack("Bytes", "Read, by source.", "Bps", rate("sluice_transfer_bytes_total", "peer"), "{{peer}}"),
        _lines(
            "Rate of a pair",
            "Bytes read over the time that reads took; by sink, source and transport.",
            "Bps",
            (
                f"{rate('sluice_transfer_bytes_total', 'name, peer, transport')}"
                f" / {rate('sluice_transfer_read_seconds_sum', 'name, peer, transport')}",
                "{{name}} ← {{peer}} {{transport}}",
            ),
        ),
        _lines(
            "Rate when warmed",
            "A pair far below the others has fallen back to TCP.",
            "Bps",
            (f"sluice_transfer_warm_rate_bytes_per_second{{{APP}}}", "{{name}} ← {{peer}}"),
        ),
        _stack("Reads", "By outcome.", "ops", rate("sluice_transfer_pulls_total", "outcome"), "{{outcome}}"),
        Panel("Time of a read", "Quantiles.", "s", quantiles("sluice_transfer_read_seconds")),
        _lines(
            "Waiting for KV",
            "Sequences whose blocks are on their way.",
            "short",
            (gauge("sluice_engine_pulling_sequences", "name", WORKERS), "{{name}}"),
        ),
        _stack(
            "Fetches",
            "Prefixes fetched rather than computed, by outcome.",
            "ops",
            rate("sluice_transfer_fetches_total", "outcome"),
            "{{outcome}}",
        ),
        _lines(
            "Fetched tokens",
            "That need not be computed.",
            _TOKENS,
            (rate("sluice_transfer_fetched_tokens_total"), "tokens"),
        ),
        _lines(
            "Quarantine",
            "Blocks that a read may still touch, and those that came there, by side.",
            "short",
            (gauge("sluice_kv_blocks", where=', state="quarantined"'), "blocks"),
            (increase("sluice_kv_quarantines_total", "side"), "{{side}} came"),
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
            (rate("sluice_router_expected_hit_tokens_total", "stage"), "{{stage}} expected"),
            (rate("sluice_router_found_hit_tokens_total", "stage"), "{{stage}} found"),
        ),
        _lines(
            "Event lag",
            "Batches of block events not heard yet, the worst replica.",
            "short",
            (f"max by (peer) (sluice_router_event_lag_batches{{{APP}}})", "{{peer}}"),
        ),
        _lines(
            "Event streams",
            "1: all block events of the worker are known everywhere.",
            "short",
            (f"min by (peer) (sluice_router_event_stream_alive{{{APP}}})", "{{peer}}"),
        ),
        _lines(
            "Event gaps",
            "Events that were missing and asked for again.",
            "short",
            (increase("sluice_router_event_gaps_total", "name", INGRESSES), "{{name}}"),
        ),
        _lines(
            "Index",
            "Blocks, once for each holder.",
            "short",
            (gauge("sluice_router_indexed_blocks", "name", INGRESSES), "{{name}}"),
        ),
        _stack(
            "Local prompts",
            "Planned for the decode worker itself, by reason.",
            "reqps",
            rate("sluice_ingress_local_plans_total", "reason"),
            "{{reason}}",
        ),
        _lines(
            "Choices",
            "Requests that each worker was given and began: how even they are.",
            "reqps",
            (rate("sluice_engine_queue_seconds_count", "name, stage"), "{{name}} {{stage}}"),
        ),
        _lines(
            "Turn",
            "Arrival to turn, p50 and p99.",
            "s",
            *[(quantile(share, "sluice_ingress_queue_seconds"), f"p{share[2:]}") for share in ("0.50", "0.99")],
        ),
        _stack(
            "Refused",
            "Requests answered 429, by limit.",
            "reqps",
            rate("sluice_ingress_rejections_total", "limit"),
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
            rate("sluice_ingress_failures_total", "reason"),
            "{{reason}}",
        ),
        _lines(
            "Went on elsewhere",
            "Streams replayed elsewhere, requests sent to their spare source, or handed over by a leaving worker.",
            "reqps",
            (rate("sluice_ingress_replays_total"), "replayed"),
            (rate("sluice_transfer_spares_used_total"), "spare source"),
            (rate("sluice_engine_handovers_total"), "handed over"),
        ),
        _stack(
            "In engines",
            "Requests that a worker refused or ended early.",
            "reqps",
            rate("sluice_engine_failures_total", "stage, reason"),
            "{{stage}} {{reason}}",
        ),
        _stack(
            "Sessions that broke",
            "By reason.",
            "short",
            increase("sluice_words_broken_sessions_total", "reason"),
            "{{reason}}",
        ),
        _lines(
            "Open sessions",
            "By kind of peer.",
            "short",
            (gauge("sluice_words_sessions", "peer_kind"), "{{peer_kind}}"),
        ),
        _stack(
            "Dropped frames",
            "By reason.",
            "short",
            increase("sluice_words_dropped_frames_total", "reason"),
            "{{reason}}",
        ),
        _lines(
            "Overflows",
            "Requests ended because their reader was too slow.",
            "short",
            (increase("sluice_words_overflows_total"), "requests"),
        ),
        _lines(
            "Reads that failed",
            "By outcome.",
            "short",
            (increase("sluice_transfer_pulls_total", "outcome", ', outcome!="ok"'), "{{outcome}}"),
        ),
        _stack(
            "Computed by decode",
            "Prompts that a decode worker computed itself, by reason.",
            "reqps",
            rate("sluice_engine_local_prefills_total", "reason"),
            "{{reason}}",
        ),
    ),
)

DASHBOARDS: Final = (_OVERVIEW, _POOLS, _KV, _TRANSFERS, _ROUTER, _FAILURES)
