"""Tables of measured tactics: for which setting they hold, which steps take them, and that rules cover the rest."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from workers.kernels.tactic_table import (
    DENSE_BUCKETS,
    PROMPT_BUCKETS,
    RULES,
    TUNED,
    DeviceSetting,
    TacticTable,
    TunedFile,
    bucket,
    dense_key,
    experts_key,
    latent_key,
    read,
    skinny_key,
)
from workers.kernels.tactics import (
    LATENT_LAUNCHES,
    SINGLE_ENTRIES,
    ExpertTactic,
    ExpertTactics,
    LtKernel,
    RunsTactic,
    SkinnyTactic,
    expert_tactics,
    fp8_expert_tactics,
    latent_tactic,
    skinny_tactic,
)

HERE = DeviceSetting("NVIDIA H200", "580.1", "13.0", "2.11.0", "3.6.0", "130100")
BOTH = (66, 2816, 2048)
PAIR = ExpertTactics(ExpertTactic(32, 64, 64, 4, 5), ExpertTactic(32, 64, 128, 4, 4))
FEW = replace(PAIR, sort=False)
SKINNY = SkinnyTactic(32, 256, 0, 4, 5)
KINDS = {
    "experts": ExpertTactics,
    "fp8_experts": ExpertTactics,
    "skinny": SkinnyTactic,
    "skinny_gate_up": SkinnyTactic,
    "latent_decode": RunsTactic,
    "dense": LtKernel,
    "prompt_dense": LtKernel,
}
WIDE = RunsTactic(132, 64, 8, 3)
KERNEL = LtKernel(66, 20, 0, 1, 35, 0, 3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    experts = {
        experts_key("experts", 128, 8, BOTH): PAIR,
        experts_key("experts", 4, 8, BOTH): FEW,
        experts_key("fp8_experts", 64, 8, BOTH): PAIR,
        experts_key("fp8_experts", 4096, 8, BOTH): PAIR,
    }
    TunedFile(HERE, experts).write(tmp_path / "a.json")
    others = {skinny_key((4096, 4096), gated=False): SKINNY, latent_key(128, 16, 512, 64): WIDE}
    TunedFile(HERE, others).write(tmp_path / "b.json")
    return tmp_path


def test_steps_take_what_was_measured_at_the_next_size_and_else_the_rule(folder: Path) -> None:
    table = TacticTable.tuned(HERE, folder)
    assert table.source == "6 from a.json, b.json"
    for tokens in (113, 128):
        assert table.experts((tokens, 8), BOTH) == PAIR
    assert table.experts((129, 8), BOTH) == expert_tactics(129 * 8, 66) == RULES.experts((129, 8), BOTH)
    assert table.experts((128, 6), BOTH) == expert_tactics(128 * 6, 66)
    assert table.experts((128, 8), (64, 2816, 2048)) == expert_tactics(128 * 8, 64)
    assert table.skinny((4096, 4096), gated=False) == SKINNY
    assert table.skinny((4096, 4096), gated=True) == skinny_tactic(4096, gated=True)
    assert table.fp8_experts((49, 8), BOTH) == PAIR
    assert table.fp8_experts((65, 8), BOTH) == fp8_expert_tactics(65 * 8, 66)
    assert table.fp8_experts((4096, 8), BOTH) is None, "DeepGEMM's, whatever a table says"


def test_single_tokens_over_latents_take_what_was_measured_where_its_tiles_fit_the_blocks(folder: Path) -> None:
    table = TacticTable.tuned(HERE, folder)
    for sequences in (113, 128):
        assert table.latent_decode(sequences, 16, 512, 64, block_size=128) == WIDE
        assert table.latent_decode(sequences, 16, 512, 64, block_size=32) == latent_tactic(sequences, 16) != WIDE
    for other in ((112, 16, 512, 64), (129, 16, 512, 64), (128, 32, 512, 64), (128, 16, 256, 64)):
        assert table.latent_decode(*other, block_size=64) == latent_tactic(*other[:2])
    assert len({*LATENT_LAUNCHES}) == len(LATENT_LAUNCHES)


def test_products_of_many_rows_take_a_kernel_that_was_measured_at_the_next_size_and_else_cublas_chooses(
    folder: Path,
) -> None:
    entries = {dense_key(rows, (4096, 2048)): replace(KERNEL, tile=rows) for rows in (32, 48, DENSE_BUCKETS[-1])}
    TunedFile(HERE, entries).write(folder / "c.json")
    table = TacticTable.tuned(HERE, folder)
    found = {rows: table.dense(rows, (4096, 2048)) for rows in (17, 32, 33, 48, 49, 241, 256, 257, 8192)}
    tiles = {rows: None if kernel is None else kernel.tile for rows, kernel in found.items()}
    assert tiles == {17: 32, 32: 32, 33: 48, 48: 48, 49: None, 241: 256, 256: 256, 257: None, 8192: None}
    assert table.dense(32, (2048, 4096)) is None and RULES.dense(32, (4096, 2048)) is None


def test_products_of_prompts_take_a_kernel_that_was_measured_where_they_fill_a_step_and_else_cublas_chooses(
    folder: Path,
) -> None:
    entries = {dense_key(rows, (4096, 2048)): replace(KERNEL, tile=rows) for rows in PROMPT_BUCKETS[1:]}
    TunedFile(HERE, entries).write(folder / "c.json")
    table = TacticTable.tuned(HERE, folder)
    found = {rows: table.dense(rows, (4096, 2048)) for rows in (2048, 3968, 3969, 4096, 4097, 7936, 7937, 8192, 8193)}
    tiles = {rows: None if kernel is None else kernel.tile for rows, kernel in found.items()}
    assert [rows for rows, tile in tiles.items() if tile == 4096] == [3969, 4096]
    assert [rows for rows, tile in tiles.items() if tile == 8192] == [7937, 8192]
    assert set(tiles.values()) == {None, 4096, 8192}
    assert table.dense(8192, (2048, 4096)) is None and RULES.dense(8192, (4096, 2048)) is None


def test_unsorted_rows_are_for_few_entries_only(folder: Path) -> None:
    table = TacticTable.tuned(HERE, folder)
    assert SINGLE_ENTRIES < 3 * 8 and table.experts((3, 8), BOTH) == PAIR
    TunedFile(HERE, {experts_key("experts", 2, 8, BOTH): FEW}).write(folder / "c.json")
    assert TacticTable.tuned(HERE, folder).experts((2, 8), BOTH) == FEW


@pytest.mark.parametrize(
    ("key", "value"),
    [("driver", "590.0"), ("triton", "3.7.0"), ("torch", "2.12.0"), ("cuda", "12.9"), ("cublas", "130200")],
)
def test_a_table_of_another_setting_is_left_alone(folder: Path, key: str, value: str) -> None:
    table = TacticTable.tuned(replace(HERE, **{key: value}), folder)
    was = getattr(HERE, key)
    assert not table.entries
    assert table.source == f"none measured on NVIDIA H200; a.json is for {key} {was}; b.json is for {key} {was}"
    assert TacticTable.tuned(replace(HERE, device="NVIDIA H100"), folder).source == "none measured on NVIDIA H100"


@pytest.mark.parametrize("content", ["{", "[]", '{"setting": {}, "entries": {}}', '{"entries": {}}'])
def test_a_malformed_table_is_an_error_that_names_it(tmp_path: Path, content: str) -> None:
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(ValueError, match=r"bad\.json: no table of tactics"):
        TacticTable.tuned(HERE, tmp_path)


def test_an_unknown_tactic_is_an_error(folder: Path) -> None:
    content = json.loads((folder / "b.json").read_text())
    content["entries"]["skinny/1x1"] = {"cols": "wide"}
    (folder / "b.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"b\.json"):
        read(folder / "b.json")


def test_committed_tables_are_of_known_ops_and_both_products_fit() -> None:
    paths = sorted(TUNED.glob("*.json"))
    assert paths
    for path in paths:
        for key, tactic in read(path).entries.items():
            op = key.split("/")[0]
            assert isinstance(tactic, KINDS[op]), key
            if isinstance(tactic, ExpertTactics):
                assert tactic.first.rows == tactic.second.rows, key


def test_sizes_have_buckets() -> None:
    assert [bucket(count) for count in (1, 3, 96, 97, 256, 257, 8192, 10**6)] == [1, 4, 96, 112, 256, 512, 8192, 8192]
