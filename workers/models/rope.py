"""What config.json says about rotary embeddings, in the new spelling (`rope_parameters`) and the old one
(`rope_scaling` beside `rope_theta`)."""

from __future__ import annotations

from dataclasses import dataclass

from workers.layers.rotary import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling, yarn_mscale
from workers.models.fields import ConfigFields

_DEFAULT_THETA = 10000.0
_MOVING = "its frequencies change with the length of the text, and cached keys cannot follow"


@dataclass(frozen=True, slots=True)
class Rope:
    theta: float
    scaling: RopeScaling | None
    sharpness: float  # factor of the softmax scale, where a family applies it (DeepSeek does, Llama does not)


def read_rope(fields: ConfigFields) -> Rope:
    """Raises CheckpointError for what is malformed or not computed here, unknown keys of the section included."""
    theta = fields.number("rope_theta", _DEFAULT_THETA)
    section, older = fields.section("rope_parameters"), fields.section("rope_scaling")
    if section is not None and older is not None:
        fields.refuse("rope_scaling", "rope_parameters says the same in the newer spelling; keep one of the two")
    section = section or older
    if section is None:
        return Rope(theta, None, 1.0)
    theta = section.number("rope_theta", theta)
    kind = section.text("rope_type", section.text("type", "default"))
    section.expect("type", kind, "rope_type says so")
    section.expect("partial_rotary_factor", 1.0, "every feature of a head is rotated")
    sharpness = 1.0
    scaling: RopeScaling | None = None
    if kind == "linear":
        scaling = LinearScaling(factor=section.number("factor"))
    elif kind == "llama3":
        scaling = _read_llama3(section)
    elif kind == "yarn":
        scaling, sharpness = _read_yarn(section, fields.integer("max_position_embeddings"))
    elif kind in ("dynamic", "longrope"):
        section.refuse("rope_type", f"{_MOVING}; use default, linear, llama3 or yarn")
    elif kind != "default":
        section.refuse("rope_type", "use default, linear, llama3 or yarn")
    section.close()
    return Rope(theta, scaling, sharpness)


def _read_llama3(section: ConfigFields) -> Llama3Scaling:
    scaling = Llama3Scaling(
        factor=section.number("factor"),
        low_freq_factor=section.number("low_freq_factor"),
        high_freq_factor=section.number("high_freq_factor"),
        original_max_position_embeddings=section.integer("original_max_position_embeddings"),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        section.refuse("high_freq_factor", f"must be above low_freq_factor = {scaling.low_freq_factor:g}")
    return scaling


def _read_yarn(section: ConfigFields, max_position_embeddings: int) -> tuple[YarnScaling, float]:
    original = section.integer("original_max_position_embeddings", max_position_embeddings)
    factor = section.number("factor", max_position_embeddings / original)
    mscale, all_dim = (section.number(key, 0.0, minimum=0.0) for key in ("mscale", "mscale_all_dim"))
    stretched = yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim) if mscale and all_dim else None
    scaling = YarnScaling(
        factor=factor,
        beta_fast=section.number("beta_fast", 32.0),
        beta_slow=section.number("beta_slow", 1.0),
        original_max_position_embeddings=original,
        attention_factor=section.number(
            "attention_factor", yarn_mscale(factor, 1.0) if stretched is None else stretched
        ),
        truncate=section.flag("truncate", True),
    )
    return scaling, yarn_mscale(factor, all_dim) ** 2 if all_dim else 1.0
