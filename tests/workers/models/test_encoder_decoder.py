"""Loading encoder–decoders: what is converted, what stands in for what is left out, and damaged checkpoints."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.errors import CheckpointError
from cluster.request import SamplingParams
from tests.support.checkpoints import checkpoint, transformers_model
from tests.support.engines import LoadedEngine, limits
from workers.attention.interface import EncoderBatch
from workers.models.encoder_decoder import EncoderDecoderModel
from workers.models.loader import LoadedModel, load
from workers.models.t5 import T5ForConditionalGeneration

WEIGHTS = "model.safetensors"
LENS = [7, 1, 12]


def copy(family: str, tmp_path: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    folder = Path(shutil.copytree(checkpoint(family), tmp_path / "copy"))
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


def encoder_decoder(loaded: LoadedModel) -> EncoderDecoderModel:
    assert isinstance(loaded.model, EncoderDecoderModel)
    return loaded.model


@pytest.mark.parametrize("family", ["t5", "t5-gated", "bart", "bart-relu", "mbart"])
def test_the_encoder_says_what_transformers_says(family: str) -> None:
    """Packed inputs of different lengths, beside each other and alone."""
    tokens = torch.randint(3, 500, (sum(LENS),), generator=torch.Generator().manual_seed(0))
    model = encoder_decoder(load(checkpoint(family)))
    states = model.encode(tokens, EncoderBatch(LENS, torch.arange(sum(LENS))))
    with torch.inference_mode():
        encoder = transformers_model(family).get_encoder()
        wanted = torch.cat([encoder(part[None]).last_hidden_state[0] for part in tokens.split(LENS)])
    torch.testing.assert_close(states, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"20 encoder tokens for lengths of \[7, 1, 11\]"):
        model.encode(tokens, EncoderBatch([7, 1, 11], torch.arange(19)))


@pytest.mark.parametrize("family", ["t5-gated", "bart", "mbart"])
def test_weights_stored_in_float32_are_rounded_to_bfloat16(family: str) -> None:
    stored = load_file(checkpoint(family) / WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    loaded = load(checkpoint(family), dtype="bfloat16")
    model = encoder_decoder(loaded)
    names = dict(model.named_parameters())
    for name, parameter in names.items():
        assert parameter.dtype == torch.bfloat16
        if name in stored:
            assert torch.equal(parameter, stored[name].to(torch.bfloat16)), name
    assert names.keys() - stored.keys() <= {"lm_head.weight"}
    exact = encoder_decoder(load(checkpoint(family)))
    tokens = torch.randint(3, 500, (sum(LENS),), generator=torch.Generator().manual_seed(0))
    rounded, wide = (each.encode(tokens, EncoderBatch(LENS, torch.arange(sum(LENS)))) for each in (model, exact))
    with torch.inference_mode():
        encoder = transformers_model(family, "bfloat16").get_encoder()
        theirs = torch.cat([encoder(part[None]).last_hidden_state[0] for part in tokens.split(LENS)])
    assert rounded.dtype == theirs.dtype == torch.bfloat16
    # Both round at every step, in other places: neither may be much further from float32 than the other.
    assert 0 < (rounded - wide).norm() < 1.5 * (theirs - wide).norm() < 0.5 * wide.norm()
    engine = LoadedEngine(loaded, block_size=4, scheduler_limits=limits(max_encoder_tokens=40))
    assert all(region.dtype == "bfloat16" for group in model.kv_groups(4) for region in group.regions)
    seq = engine.sequence([2, 5, 9], SamplingParams(max_tokens=4, ignore_eos=True), encoder_tokens=tokens.tolist())
    engine.scheduler.add(seq)
    engine.run()
    assert len(engine.emitted(seq)) == 4


def test_a_head_of_its_own_and_one_that_is_the_embedding(tmp_path: Path) -> None:
    tied = load(checkpoint("t5-gated")).model
    assert isinstance(tied, T5ForConditionalGeneration)
    assert tied.lm_head.weight.data_ptr() == tied.shared.weight.data_ptr()
    head = torch.randn(512, 64, generator=torch.Generator().manual_seed(3))
    own = load(copy("t5-gated", tmp_path, lambda tensors: tensors.update({"lm_head.weight": head}))).model
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(own.logits(hidden), hidden @ head.t())
    scaled = load(checkpoint("t5")).model
    assert isinstance(scaled, T5ForConditionalGeneration)
    torch.testing.assert_close(scaled.logits(hidden), hidden @ scaled.shared.weight.t() / 8)


def test_a_bias_of_the_logits_that_is_left_out_is_zero(tmp_path: Path) -> None:
    with_bias = load(checkpoint("bart")).model
    without = load(copy("bart", tmp_path, lambda tensors: tensors.pop("final_logits_bias"))).model
    hidden = torch.zeros(1, 64)
    assert with_bias.logits(hidden).abs().max() > 0.1
    assert without.logits(hidden).abs().max() == 0


@pytest.mark.parametrize(
    ("family", "tensor"),
    [
        ("t5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        ("t5", "shared.weight"),
        ("bart", "model.decoder.layers.1.encoder_attn.out_proj.bias"),
        ("mbart", "model.encoder.layer_norm.weight"),
    ],
)
def test_what_is_missing_is_named(family: str, tensor: str, tmp_path: Path) -> None:
    folder = copy(family, tmp_path, lambda tensors: tensors.pop(tensor))
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert f"{folder}: tensor {tensor} missing; download it again" in str(caught.value)


def test_what_is_unknown_is_named_and_copies_are_left_alone(tmp_path: Path) -> None:
    def extend(tensors: dict[str, Tensor]) -> None:
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
        name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
        tensors[name] = torch.zeros(16, 4)

    folder = copy("t5", tmp_path, extend)
    assert len(load(folder).ignored) == 2
    tensors = load_file(folder / WEIGHTS)
    tensors["decoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"] = torch.zeros(16, 4)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert f"{folder / WEIGHTS}: tensor decoder.block.1.layer.0" in message and "unknown to T5For" in message


def test_t5_in_float16_is_refused_however_it_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="pass what float16 can hold"):
        load(checkpoint("t5"), dtype="float16")
    folder = copy("t5", tmp_path, lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    with pytest.raises(CheckpointError, match="pass what float16 can hold"):
        load(folder)
    assert load(folder, dtype="bfloat16").model.spec.dtype == "bfloat16"


def test_generation_config_says_what_is_forced(tmp_path: Path) -> None:
    folder = copy("mbart", tmp_path, lambda tensors: None)
    forced = {"decoder_start_token_id": 7, "forced_bos_token_id": 8, "forced_eos_token_id": [9]}
    (folder / "generation_config.json").write_text(json.dumps(forced))
    spec = load(folder).model.spec.encoder
    assert spec is not None
    assert (spec.decoder_start_token_id, spec.forced_bos_token_id, spec.forced_eos_token_id) == (7, 8, 9)
    (folder / "generation_config.json").write_text(json.dumps({**forced, "forced_eos_token_id": [9, 10]}))
    with pytest.raises(CheckpointError, match="one token id is computed"):
        load(folder)


def test_dummy_weights(tmp_path: Path) -> None:
    for family in ("t5", "bart"):
        (tmp_path / "config.json").write_text((checkpoint(family) / "config.json").read_text())
        model = load(tmp_path, load_format="dummy").model
        assert model.spec.encoder is not None and model.spec.encoder.decoder_start_token_id in (0, 2)
