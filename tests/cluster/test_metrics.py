import re
from pathlib import Path

from cluster.metrics import DropReason, Metrics, Outcome, PullOutcome

# The public surface: dashboards and alerts name these.
FROZEN = """
sluice_cluster_needed_workers gauge pool,stage
sluice_cluster_resizes counter pool,direction
sluice_cluster_restarts counter pool
sluice_cluster_wanted_workers gauge pool
sluice_cluster_workers gauge pool,state
sluice_engine_accepted_draft_tokens counter
sluice_engine_batch_sequences histogram
sluice_engine_computed_tokens counter
sluice_engine_draft_tokens counter
sluice_engine_drafted_rows counter
sluice_engine_encoder_tokens counter
sluice_engine_failures counter stage,reason
sluice_engine_handovers counter
sluice_engine_local_prefills counter reason
sluice_engine_preemptions counter
sluice_engine_prefix_hit_tokens counter stage
sluice_engine_prefix_lookup_tokens counter stage
sluice_engine_pulling_sequences gauge
sluice_engine_queue_seconds histogram stage
sluice_engine_running_sequences gauge
sluice_engine_sampled_tokens counter
sluice_engine_step_seconds histogram
sluice_engine_waiting_sequences gauge
sluice_ingress_end_to_end_seconds histogram
sluice_ingress_failures counter reason
sluice_ingress_generated_tokens counter
sluice_ingress_inter_token_seconds histogram
sluice_ingress_local_plans counter reason
sluice_ingress_open_requests gauge
sluice_ingress_prompt_tokens counter
sluice_ingress_queue_seconds histogram
sluice_ingress_queued_requests gauge
sluice_ingress_rejections counter limit
sluice_ingress_replays counter
sluice_ingress_requests counter outcome
sluice_ingress_ttft_seconds histogram
sluice_kv_blocks gauge group,state
sluice_kv_expired_leases counter
sluice_kv_leased_blocks gauge
sluice_kv_leases gauge
sluice_kv_quarantines counter side
sluice_router_event_gaps counter
sluice_router_event_lag_batches gauge peer
sluice_router_event_stream_alive gauge peer
sluice_router_expected_hit_tokens counter stage
sluice_router_found_hit_tokens counter stage
sluice_router_indexed_blocks gauge
sluice_transfer_bytes counter transport,peer
sluice_transfer_encoder_outputs counter outcome
sluice_transfer_fetched_tokens counter
sluice_transfer_fetches counter outcome
sluice_transfer_lent_blocks counter
sluice_transfer_pulled_blocks counter
sluice_transfer_pulls counter outcome
sluice_transfer_read_seconds histogram transport,peer
sluice_transfer_spares_used counter
sluice_transfer_warm_rate_bytes_per_second gauge transport,peer
sluice_words_broken_sessions counter reason
sluice_words_dropped_frames counter reason
sluice_words_overflows counter
sluice_words_sessions gauge peer_kind
"""


def declared(metrics: Metrics) -> list[str]:
    rows = []
    for metric in vars(metrics).values():
        if metric is not metrics.registry:
            rows.append(f"{metric._name} {metric._type} {','.join(metric._labelnames)}".strip())
    return sorted(rows)


def test_names_and_labels_are_frozen() -> None:
    assert declared(Metrics()) == FROZEN.strip().splitlines()


def test_names_follow_the_pattern() -> None:
    for row in declared(Metrics()):
        assert re.match(r"sluice_(ingress|router|engine|kv|transfer|words|cluster)_[a-z_]+ ", row), row


def test_each_metric_is_moved_by_somebody() -> None:
    root = Path(__file__).parents[2]
    rooms = ("cluster", "router", "workers", "deploy")
    sources = [path.read_text() for room in rooms for path in (root / room).rglob("*.py") if path.stem != "metrics"]
    moved = set(re.findall(r"\bmetrics\.(\w+)", "".join(source.replace("_metrics", "metrics") for source in sources)))
    moved |= {name.removeprefix("set_") for name in moved}
    names = {name for name, metric in vars(Metrics()).items() if hasattr(metric, "_labelnames")}
    assert len(names) == len(FROZEN.strip().splitlines())
    assert names - moved == set()


def test_two_processes_worth_of_metrics_share_nothing() -> None:
    first, second = Metrics(), Metrics()
    first.requests.labels(Outcome.OK).inc()
    assert first.value("sluice_ingress_requests_total", {"outcome": "ok"}) == 1
    assert second.value("sluice_ingress_requests_total", {"outcome": "ok"}) == 0


def test_render() -> None:
    metrics = Metrics()
    metrics.set_blocks("self", {"free": 7, "quarantined": 1})
    metrics.pulls.labels(PullOutcome.STALE).inc(2)
    metrics.dropped_frames.labels(DropReason.OLD_ATTEMPT).inc()
    metrics.ttft.observe(0.2)
    text = metrics.render().decode()
    assert 'sluice_kv_blocks{group="self",state="free"} 7.0\n' in text
    assert 'sluice_transfer_pulls_total{outcome="stale"} 2.0\n' in text
    assert 'sluice_words_dropped_frames_total{reason="old_attempt"} 1.0\n' in text
    assert "sluice_ingress_ttft_seconds_count 1.0\n" in text


def test_closed_sets_start_at_zero() -> None:
    text = Metrics().render().decode()
    for outcome in Outcome:
        assert f'sluice_ingress_requests_total{{outcome="{outcome}"}} 0.0\n' in text
    for outcome in PullOutcome:
        assert f'sluice_transfer_pulls_total{{outcome="{outcome}"}} 0.0\n' in text
    for reason in DropReason:
        assert f'sluice_words_dropped_frames_total{{reason="{reason}"}} 0.0\n' in text
