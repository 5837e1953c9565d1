"""Tactics that were measured (workers.autotune), as JSON files beside this one, and what is launched by rule without.

A file is for one setting: another device, driver or library has it left alone, for what was best there need not be
best here, or compile. Needs no GPU.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TypeAlias

import torch
from pydantic import TypeAdapter, ValidationError

from workers.kernels.cublas_lt import LtError, version
from workers.kernels.tactics import (
    SINGLE_ENTRIES,
    ExpertTactics,
    LtKernel,
    RunsTactic,
    SkinnyTactic,
    expert_tactics,
    fp8_expert_tactics,
    latent_tactic,
    skinny_tactic,
)

TUNED = Path(__file__).parent / "tuned"
# Tokens; a step takes the next one.
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512, 1024, 2048, 4096, 8192)
DENSE_BUCKETS = tuple(range(32, 257, 16))  # rows; sizes of products jump with the tiles that they fill
PROMPT_BUCKETS = (2048, 4096, 8192)  # rows: budgets of a step, which prompts fill to the last row
_SHORT_OF_BUDGET = 32  # a bucket is for steps of one part in so many less; at others its kernel may be much slower
_DRIVER = Path("/sys/module/nvidia/version")

Tactic: TypeAlias = ExpertTactics | SkinnyTactic | RunsTactic | LtKernel
_ENTRIES: TypeAdapter[dict[str, Tactic]] = TypeAdapter(dict[str, ExpertTactics | SkinnyTactic | RunsTactic | LtKernel])


@dataclass(frozen=True, slots=True)
class DeviceSetting:
    """What a measurement holds for."""

    device: str
    driver: str
    cuda: str
    torch: str
    triton: str
    cublas: str

    @classmethod
    def of(cls, device: torch.device) -> DeviceSetting:
        import triton  # pyright: ignore[reportMissingImports]

        try:
            cublas = version()
        except LtError:
            cublas = ""  # no table fits
        driver = _DRIVER.read_text().strip() if _DRIVER.exists() else "unknown"
        name = torch.cuda.get_device_name(device)
        return cls(name, driver, torch.version.cuda or "", torch.__version__, triton.__version__, cublas)


def bucket(num_tokens: int) -> int:
    """The number that a step of `num_tokens` is measured at."""
    return BUCKETS[min(bisect_left(BUCKETS, num_tokens), len(BUCKETS) - 1)]


def experts_key(op: str, num_tokens: int, per_token: int, both: tuple[int, ...]) -> str:
    """op: experts or fp8_experts; both: shape of the gates and ups, [slots, 2 inner, hidden]."""
    return _experts_key(op, bucket(num_tokens), per_token, both)


@cache  # all layers of all steps ask the same few
def _experts_key(op: str, num_tokens: int, per_token: int, both: tuple[int, ...]) -> str:
    return f"{op}/{both[0]}x{both[1] // 2}x{both[2]}/{per_token}/{num_tokens}"


def skinny_key(weight: Sequence[int], *, gated: bool) -> str:
    return f"skinny{'_gate_up' if gated else ''}/{weight[0]}x{weight[1]}"


def dense_key(num_rows: int, weight: Sequence[int]) -> str:
    outputs, inputs = weight
    return f"{'dense' if num_rows <= DENSE_BUCKETS[-1] else 'prompt_dense'}/{outputs}x{inputs}/{num_rows}"


def latent_key(num_sequences: int, num_heads: int, latent: int, rope: int) -> str:
    return f"latent_decode/{num_heads}x{latent}+{rope}/{bucket(num_sequences)}"


@dataclass(frozen=True, slots=True)
class TacticTable:
    entries: Mapping[str, Tactic]
    source: str  # where they are from, or why there are none

    @classmethod
    def tuned(cls, setting: DeviceSetting, folder: Path = TUNED) -> TacticTable:
        """All files of the folder that are for this setting. Raises ValueError naming a file that is malformed."""
        entries: dict[str, Tactic] = {}
        others: list[str] = []
        names: list[str] = []
        for path in sorted(folder.glob("*.json")):
            content = read(path)
            if content.setting == setting:
                entries |= content.entries
                names.append(path.name)
            elif content.setting.device == setting.device:
                changed = [
                    f"{key} {value}" for key, value in asdict(content.setting).items() if asdict(setting)[key] != value
                ]
                others.append(f"{path.name} is for {', '.join(changed)}")
        found = f"{len(entries)} from {', '.join(names)}" if names else f"none measured on {setting.device}"
        return cls(entries, "; ".join([found, *others]))

    def experts(self, chosen: Sequence[int], both: tuple[int, ...]) -> ExpertTactics:
        """Shapes of the chosen slots [T, k], and of gates and ups [E, 2 I, d]."""
        tokens, per_token = chosen
        found = self.entries.get(experts_key("experts", tokens, per_token, both))
        if isinstance(found, ExpertTactics):
            return _sorted_if_many(found, tokens * per_token)
        return expert_tactics(tokens * per_token, both[0])

    def fp8_experts(self, chosen: Sequence[int], both: tuple[int, ...]) -> ExpertTactics | None:
        """None: rows in tiles, by DeepGEMM."""
        tokens, per_token = chosen
        by_rule = fp8_expert_tactics(tokens * per_token, both[0])
        found = self.entries.get(experts_key("fp8_experts", tokens, per_token, both))
        if by_rule is not None and isinstance(found, ExpertTactics):
            return _sorted_if_many(found, tokens * per_token)
        return by_rule

    def skinny(self, weight: Sequence[int], *, gated: bool) -> SkinnyTactic:
        """Shape of the matrix; of gates and ups both."""
        found = self.entries.get(skinny_key(weight, gated=gated))
        return found if isinstance(found, SkinnyTactic) else skinny_tactic(weight[0], gated=gated)

    def dense(self, num_rows: int, weight: Sequence[int]) -> LtKernel | None:
        """Of a product of more than SKINNY_ROWS rows; the shape of the matrix. None: what cuBLAS chooses."""
        buckets = DENSE_BUCKETS if num_rows <= DENSE_BUCKETS[-1] else PROMPT_BUCKETS
        if num_rows > buckets[-1]:
            return None
        rows = buckets[bisect_left(buckets, num_rows)]
        if buckets is PROMPT_BUCKETS and rows - num_rows >= rows // _SHORT_OF_BUDGET:
            return None
        found = self.entries.get(dense_key(rows, weight))
        return found if isinstance(found, LtKernel) else None

    def latent_decode(
        self, num_sequences: int, num_heads: int, latent: int, rope: int, *, block_size: int
    ) -> RunsTactic:
        found = self.entries.get(latent_key(num_sequences, num_heads, latent, rope))
        if isinstance(found, RunsTactic) and block_size % found.tile == 0:
            return found
        return latent_tactic(num_sequences, num_heads)


RULES = TacticTable({}, "rules alone")


@dataclass(frozen=True, slots=True)
class TunedFile:
    setting: DeviceSetting
    entries: Mapping[str, Tactic]

    def write(self, path: Path) -> None:
        entries = _ENTRIES.dump_python(dict(sorted(self.entries.items())))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"setting": asdict(self.setting), "entries": entries}, indent=1) + "\n")


def read(path: Path) -> TunedFile:
    """Raises ValueError naming the file."""
    try:
        content = json.loads(path.read_text())
        return TunedFile(DeviceSetting(**content["setting"]), _ENTRIES.validate_python(content["entries"]))
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise ValueError(f"{path}: no table of tactics ({error}); write it anew with workers.autotune") from error


def _sorted_if_many(tactics: ExpertTactics, num_entries: int) -> ExpertTactics:
    """A bucket's tactic may be for steps that are smaller than its largest."""
    return tactics if tactics.sort or num_entries <= SINGLE_ENTRIES else replace(tactics, sort=True)
