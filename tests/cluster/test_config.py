import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from cluster.config import PoolConfig, Role, SluiceConfig
from cluster.config_file import keys, load, parse
from cluster.engine_config import EngineConfig
from cluster.errors import ConfigError
from cluster.placement import place
from cluster.section import Section

CONFIGS = Path(__file__).parents[2] / "deploy" / "configs"
MODEL: dict[str, object] = {"model.path": "/models/tiny"}

# The public surface: a key that goes or changes its name breaks somebody's file.
KEYS = """
autoscaling.down_after_s autoscaling.enabled autoscaling.inter_token_s autoscaling.switch_roles autoscaling.ttft_s
autoscaling.up_after_s autoscaling.utilization
controller.check_s controller.drain_timeout_s controller.ingress_lease_s controller.start_timeout_s
engine.cuda_graphs engine.device engine.disabled engine.draft_tokens engine.ngram_tokens engine.overlap
engine.speculation engine.strict
http.api_keys_env http.api_keys_file http.drain_s http.host http.max_ongoing_requests http.port http.replicas
http.request_timeout_s
kv.block_size kv.cross_kv_fraction kv.encoder_output kv.memory_bytes kv.memory_fraction kv.num_blocks
kv.prefill_reserve kv.prefix_cache
limits.max_body_bytes limits.max_encoder_output_bytes limits.max_prompt_tokens limits.max_queued limits.max_requests
limits.max_samples limits.max_ttft_s
log.format log.level
model.dtype model.dummy_seed model.load_format model.max_model_len model.path model.served_name
name
pools.*.cpus pools.*.gpus pools.*.max_workers pools.*.min_workers pools.*.num_blocks pools.*.roles pools.*.threads
pools.*.workers
router.affinity_blocks router.affinity_header router.decode_weight router.kept_routes router.local_max_tokens
router.local_prefill router.max_attempts router.policy router.prefill_weight router.saturated_tokens router.spare
router.temperature router.worker_wait_s
scheduler.chunk_tokens scheduler.handover_s scheduler.max_batched_tokens scheduler.max_encoder_tokens
scheduler.max_pull_wait_s scheduler.max_sequences scheduler.max_waiting
traces.endpoint traces.sample_rate
transfer.fetch_peers transfer.late_read_s transfer.lease_s transfer.stuck_read_s transfer.transport transfer.ucx_tls
words.connect_timeout_s words.heartbeat_s words.heartbeat_timeout_s words.host words.outbox_max_bytes
words.outbox_max_request_bytes words.port_max words.port_min words.redial_max_s words.secret_env words.step_timeout_s
words.tls.ca_file words.tls.cert_file words.tls.key_file words.tls.server_name
"""


def sections() -> list[type[BaseModel]]:
    return [SluiceConfig, *Section.__subclasses__()]


def test_keys_are_frozen() -> None:
    assert keys() == KEYS.split()


def test_every_key_is_described() -> None:
    bare = [
        f"{section.__name__}.{name}"
        for section in sections()
        for name, field in section.model_fields.items()
        if field.description is None and not isinstance(field.default, BaseModel) and name != "model"
    ]
    assert bare == []


def test_defaults_are_one_worker_per_stage() -> None:
    config = load(None, settings=MODEL)
    assert {name: (pool.workers, pool.roles) for name, pool in config.pools.items()} == {
        "prefill": (1, (Role.PREFILL,)),
        "decode": (1, (Role.DECODE,)),
    }
    assert SluiceConfig.model_validate({"model": {"path": "/models/tiny"}}) == config
    assert config.served_name == "tiny"


@pytest.mark.parametrize("recipe", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_load_and_survive_json(recipe: Path) -> None:
    config = load(recipe, settings=MODEL)
    assert parse(config.model_dump(mode="json")) == config


def test_recipes_differ_in_roles() -> None:
    aggregated = load(CONFIGS / "cpu-aggregated.yaml", settings=MODEL)
    disaggregated = load(CONFIGS / "cpu-disaggregated.yaml", settings=MODEL)
    assert [pool.roles for pool in aggregated.pools.values()] == [(Role.PREFILL, Role.DECODE)]
    assert [pool.roles for pool in disaggregated.pools.values()] == [(Role.PREFILL,), (Role.DECODE,)]


def test_overrides_change_one_key_and_keep_the_others(tmp_path: Path) -> None:
    path = tmp_path / "sluice.yaml"
    path.write_text("model: {path: /a, dtype: float32}\npools: {decode: {threads: 2}, prefill: {}}\n")
    config = load(path, ["pools.decode.workers=3", "model.path=/b", "log.level=debug", "pools.extra.roles=[decode]"])
    assert (config.model.path, config.model.dtype, config.log.level) == ("/b", "float32", "debug")
    assert config.pools["decode"] == PoolConfig(workers=3, threads=2, roles=(Role.DECODE,))
    assert config.pools["extra"].roles == (Role.DECODE,)
    assert list(load(path, ["pools.prefill=null", "router.local_prefill=always"]).pools) == ["decode"]


def test_settings_are_taken_as_they_are() -> None:
    assert load(None, settings={"model.path": "a: #b"}).model.path == "a: #b"


@pytest.mark.parametrize(
    ("override", "path", "said"),
    [
        ("kv.block_sise=3", "kv.block_sise", "did you mean kv.block_size?"),
        ("pools.decode.worker=2", "pools.decode.worker", "did you mean pools.decode.workers?"),
        ("router.max_sequences=3", "router.max_sequences", "did you mean scheduler.max_sequences?"),
        ("bogus=1", "bogus", "there are autoscaling, controller, engine, http, kv"),
        ("pools.decod.workers=2", "pools.decod.roles", "pools with roles: prefill, decode"),
        ("pools.decode.workers=-1", "pools.decode.workers", "-1"),
        ("pools.decode.roles=[decode, encoder]", "pools.decode.roles.1", "'encoder'"),
        ("pools.decode.roles=[decode, decode]", "pools.decode.roles", "twice"),
        ("pools.decode.workers=0", "pools", "no pool has a worker with the role decode"),
        ("pools.prefill.workers=0", "pools", "router.local_prefill=always"),
        ("kv.block_size=abc", "kv.block_size", "'abc'"),
        ("kv=3", "kv", "3 is no section"),
        ("kv.num_blocks.x=3", "kv.num_blocks", "does not fit"),
        ("log.level=loud", "log.level", "'loud'"),
        ("transfer.lease_s=.nan", "transfer.lease_s", "nan"),
        ("model=null", "model", "None is no section"),
        ("model={}", "model.path", "is missing"),
        ("words.port_min=30000", "words.port_max", "words.port_min = 30000"),
        ("words.heartbeat_timeout_s=0.1", "words.heartbeat_timeout_s", "raise it"),
        ("words.tls={cert_file: a, ca_file: b}", "words.tls.key_file", "set all three, or none"),
        ("words.tls.server_name=a", "words.tls.server_name", "set without words.tls.cert_file"),
        ("words.outbox_max_bytes=5", "words.outbox_max_request_bytes", "lower it"),
        ("scheduler.chunk_tokens=5000", "scheduler.chunk_tokens", "lower it"),
        ("scheduler.max_sequences=5000", "scheduler.max_sequences", "lower it"),
        ("transfer.stuck_read_s=1", "transfer.stuck_read_s", "raise it"),
        ("transfer.lease_s=0.1", "transfer.lease_s", "raise it"),
        ("http.max_ongoing_requests=512", "http.max_ongoing_requests", "429"),
        ("http={api_keys_file: a, api_keys_env: B}", "http.api_keys_env", "remove one"),
        ("engine={overlap: true, speculation: ngram}", "engine.overlap", "remove one"),
        ("http.drain_s=1", "http.drain_s", "cut streams"),
        ("engine.device=rocm", "engine.device", "'rocm' does not fit: input should be 'auto', 'cpu' or 'cuda'"),
        ("engine.disabled=[cutlass]", "engine.disabled.0", "'cutlass' does not fit"),
        ("pools.decode.gpus=1.5", "pools.decode.gpus", "1.5 is neither a number of GPUs nor a part of one"),
        ("engine={device: cpu}&pools.decode.gpus=1", "pools.decode.gpus", "remove it, or set engine.device=auto"),
        ("engine={device: cuda}&pools.decode.gpus=0", "pools.decode.gpus", "needs a GPU or a part of one"),
        ("kv.num_blocks=[", "kv.num_blocks", "no YAML value"),
        ("kv.num_blocks", "kv.num_blocks", "path=value"),
        ("name=Bad Name", "name", "'Bad Name'"),
    ],
)
def test_an_error_names_the_key_and_the_remedy(override: str, path: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        load(None, override.split("&"), MODEL)
    assert caught.value.path == path
    assert str(caught.value).startswith(f"{path}: ")


def test_workers_that_compute_on_a_gpu_ask_for_one_unless_told_otherwise() -> None:
    config = load(None, ["engine.device=cuda", "pools.decode.gpus=0.5"], MODEL)
    assert {name: pool.gpus for name, pool in config.pools.items()} == {"prefill": 1, "decode": 0.5}
    assert [placement.bundles[0].gpus for placement in place(config.pools)] == [0.5, 1.0]
    assert {pool.gpus for pool in load(None, [], MODEL).pools.values()} == {0.0}


def test_actors_that_asked_for_no_gpu_leave_those_that_ray_shows_them_alone() -> None:
    config = load(None, ["pools.decode.gpus=1"], MODEL)
    assert config.in_ray("prefill").engine.device == "cpu"
    assert config.in_ray("decode").engine.device == "auto"
    assert load(None, ["engine.device=cuda"], MODEL).in_ray("prefill").engine.device == "cuda"


@pytest.mark.parametrize(
    ("engine", "on_gpu", "overlaps"),
    [
        ({}, False, False),
        ({}, True, True),
        ({"overlap": False}, True, False),
        ({"overlap": True}, False, True),
        ({"speculation": "ngram"}, True, False),
    ],
)
def test_steps_overlap_on_a_gpu_unless_told_otherwise(engine: dict[str, object], on_gpu: bool, overlaps: bool) -> None:
    assert EngineConfig.model_validate(engine).overlaps(on_gpu=on_gpu) is overlaps


def test_two_kv_sizes_contradict() -> None:
    with pytest.raises(ConfigError, match=r"^kv\.memory_bytes: .*kv\.num_blocks"):
        load(None, ["kv.num_blocks=8", "kv.memory_bytes=1000"], MODEL)


def test_the_model_is_asked_for_by_its_path() -> None:
    with pytest.raises(ConfigError, match=r"^model\.path: is missing; .*--set model\.path="):
        load(None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kv: {block_size: 1, block_size: 2}", "block_size: stands twice"),
        ("- 1", "holds list"),
        ("kv: [", "is no YAML"),
        ("!!python/object/apply:os.getcwd []", "is no YAML"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file"):
        load(tmp_path / "none.yaml")


def test_frozen() -> None:
    config = load(None, settings=MODEL)
    with pytest.raises(ValidationError, match="frozen"):
        config.kv.block_size = 3  # pyright: ignore[reportAttributeAccessIssue]


@given(st.text(min_size=1, max_size=12), st.integers())
def test_no_unknown_key_is_ever_accepted(name: str, value: int) -> None:
    known = set(SluiceConfig.model_fields)
    with pytest.raises(ConfigError) as caught:
        parse({"model": {"path": "/m"}, name + "x" if name in known else name: value})
    assert caught.value.path
