"""Loading: every damaged checkpoint names its file, the tensor and the remedy; weights are mapped, never copied."""

import io
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from cluster.errors import CheckpointError
from cluster.log import JsonFormatter, Log
from tests.support.checkpoints import checkpoint
from tests.support.mapped_memory import Residency, mapped
from tests.support.paged_model import PagedModel, Text
from workers.layers.linear import Embedding, Linear, Partition
from workers.models.loader import load

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "copy"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def shard(folder: Path) -> None:
    """Two files and an index instead of one file."""
    tensors = load_file(folder / WEIGHTS)
    weight_map: dict[str, str] = {}
    for number in range(2):
        name = f"model-{number + 1:05}-of-00002.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::2]}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / WEIGHTS).unlink()


def refusal(folder: Path, **arguments: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder, **arguments)  # pyright: ignore[reportArgumentType]
    return str(caught.value)


def parameters(folder: Path, **arguments: object) -> dict[str, torch.Tensor]:
    return load(folder, **arguments).model.state_dict()  # pyright: ignore


# ---------------------------------------------------------------- what loads


def test_every_tensor_equals_what_transformers_loads() -> None:
    for family in ("llama", "llama-mha-bias"):
        theirs = AutoModelForCausalLM.from_pretrained(checkpoint(family)).state_dict()
        ours = parameters(checkpoint(family))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_shards_give_the_same_tensors_and_another_identity(folder: Path) -> None:
    whole = load(checkpoint("llama"))
    shard(folder)
    assert all(
        torch.equal(left, right)
        for left, right in zip(parameters(folder).values(), parameters(checkpoint("llama")).values(), strict=True)
    )
    assert load(folder).weights_identity != whole.weights_identity


def test_identity_follows_the_weights_and_nothing_else(folder: Path) -> None:
    original = load(checkpoint("llama"))
    copy = load(folder)
    assert (copy.weights_identity, copy.config_json) == (original.weights_identity, original.config_json)
    assert load(folder, dtype="bfloat16").weights_identity == original.weights_identity
    with (folder / WEIGHTS).open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\0")
    assert load(folder).weights_identity != original.weights_identity


def test_config_json_is_free_of_where_the_file_came_from(folder: Path) -> None:
    edit_config(folder, transformers_version="0.0", _name_or_path="elsewhere")
    assert load(folder).config_json == load(checkpoint("llama")).config_json
    edit_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 5.0})
    assert load(folder).config_json != load(checkpoint("llama")).config_json


def test_another_dtype_is_a_rounded_copy() -> None:
    stored = parameters(checkpoint("llama"))
    for name, tensor in parameters(checkpoint("llama"), dtype="bfloat16").items():
        assert torch.equal(tensor, stored[name].bfloat16())
    assert load(checkpoint("llama", "bfloat16")).model.spec.dtype == "bfloat16"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_auto_follows_the_checkpoint_whichever_way_it_says_so(tmp_path: Path, dtype: str) -> None:
    said = checkpoint("llama", dtype)
    assert json.loads((said / "config.json").read_text())["dtype"] == dtype
    older, unsaid = (Path(shutil.copytree(said, tmp_path / name)) for name in ("older", "unsaid"))
    edit_config(older, dtype=..., torch_dtype=dtype)
    edit_config(unsaid, dtype=...)
    for folder in (said, older, unsaid):
        model = load(folder).model
        assert model.spec.dtype == dtype
        assert {tensor.dtype for tensor in model.state_dict().values()} == {getattr(torch, dtype)}  # pyright: ignore


def test_older_config_keys_mean_the_same(folder: Path) -> None:
    rope = json.loads((checkpoint("llama3-tied") / "config.json").read_text())["rope_parameters"]
    tied = Path(shutil.copytree(checkpoint("llama3-tied"), folder / "tied"))
    theta = rope.pop("rope_theta")
    edit_config(tied, rope_parameters=..., rope_scaling=rope, rope_theta=theta, dtype=..., torch_dtype="float32")
    assert load(tied).model.config == load(checkpoint("llama3-tied")).model.config  # pyright: ignore


def test_end_tokens_of_generation_config_win(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 7]}')
    assert load(folder).model.spec.eos_token_ids == (3, 7)
    (folder / "generation_config.json").unlink()
    assert load(folder).model.spec.eos_token_ids == (511,)


def test_a_stored_tied_head_and_old_rotary_buffers_are_left_alone(folder: Path) -> None:
    """And the log says so, once."""
    tied = Path(shutil.copytree(checkpoint("llama3-tied"), folder / "tied"))
    edit_weights(
        tied,
        lambda tensors: tensors.update(
            {
                "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
            }
        ),
    )
    logger = logging.Logger("told")
    handler = logging.StreamHandler(stream := io.StringIO())
    handler.setFormatter(JsonFormatter())
    logger.addHandler(handler)
    loaded = load(tied, log=Log(logger))
    assert loaded.ignored == ("lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq")
    (line,) = map(json.loads, stream.getvalue().splitlines())
    assert line["model"] == str(tied) and all(name in line["reason"] for name in loaded.ignored)
    assert parameters(tied).keys() == parameters(checkpoint("llama3-tied")).keys()
    assert load(checkpoint("llama3-tied")).ignored == ()


def test_every_matrix_says_how_it_is_split() -> None:
    modules = dict(load(checkpoint("llama")).model.named_modules())  # pyright: ignore
    split = {name.split(".")[-1]: module.partition for name, module in modules.items() if hasattr(module, "partition")}
    assert {name for name, module in modules.items() if isinstance(module, Linear | Embedding)}
    rows, replicated = {"o_proj", "down_proj"}, {"input_layernorm", "post_attention_layernorm", "norm"}
    columns = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head"}
    assert split == (
        dict.fromkeys(rows, Partition.ROW)
        | dict.fromkeys(replicated, Partition.REPLICATED)
        | dict.fromkeys(columns, Partition.COLUMN)
    )


# ---------------------------------------------------------------- dummy weights


def test_dummy_needs_config_json_only_and_does_not_collapse(tmp_path: Path) -> None:
    shutil.copy(checkpoint("llama") / "config.json", tmp_path)
    loaded = load(tmp_path, load_format="dummy", dummy_seed=3)
    texts = [Text([token, 1, 2]) for token in range(10, 18)]
    rows = PagedModel(loaded.model, block_size=16).generate(texts, 20)
    assert len({token for row in rows for token in row}) >= 80
    again = load(tmp_path, load_format="dummy", dummy_seed=3)
    other = load(tmp_path, load_format="dummy", dummy_seed=4)
    assert again.weights_identity == loaded.weights_identity != other.weights_identity
    same, different = (model.state_dict() for model in (again.model, other.model))  # pyright: ignore
    assert all(torch.equal(same[name], tensor) for name, tensor in loaded.model.state_dict().items())  # pyright: ignore
    assert not torch.equal(same[DOWN], different[DOWN])


def test_dummy_weights_have_the_stated_spread() -> None:
    weights = parameters(checkpoint("llama"), load_format="dummy")
    assert weights["model.embed_tokens.weight"].std().item() == pytest.approx(0.1, rel=0.05)
    assert weights[DOWN].std().item() == pytest.approx(4 / 160**0.5, rel=0.05)
    assert torch.equal(weights["model.norm.weight"], torch.ones(64))


# ---------------------------------------------------------------- what does not


def test_no_folder(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere" / "config.json") in message and "model.path" in message


def test_config_that_is_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert "config.json: not JSON" in refusal(folder)
    (folder / "config.json").write_text("[]")
    assert "holds a list" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"architectures": ["GrandForCausalLM"]}, ("GrandForCausalLM", "LlamaForCausalLM")),
        ({"architectures": ...}, ("architectures = None",)),
        ({"hidden_size": ...}, ("hidden_size = None", ">= 1")),
        ({"hidden_size": "64"}, ("hidden_size = '64'", "integer")),
        ({"num_hidden_layers": 0}, ("num_hidden_layers = 0",)),
        ({"num_key_value_heads": 3}, ("num_key_value_heads = 3", "must divide num_attention_heads = 4")),
        ({"head_dim": 15}, ("head_dim = 15", "even")),
        ({"hidden_act": "gelu"}, ("hidden_act = 'gelu'", "silu")),
        ({"tie_word_embeddings": "no"}, ("tie_word_embeddings = 'no'",)),
        ({"rms_norm_eps": -1}, ("rms_norm_eps = -1",)),
        ({"rope_parameters": 3}, ("rope_parameters = 3", "object")),
        ({"rope_parameters": {"rope_type": "spin"}}, ("rope_parameters.rope_type = 'spin'", "llama3")),
        ({"rope_parameters": {"rope_type": "llama3"}}, ("rope_parameters.factor = None",)),
        ({"dtype": "float8"}, ("dtype = 'float8'", "model.dtype", "bfloat16")),
        ({"eos_token_id": [1, "x"]}, ("eos_token_id = [1, 'x']",)),
    ],
)
def test_config_values_that_cannot_be_computed(folder: Path, changes: dict[str, object], parts: tuple[str]) -> None:
    if "eos_token_id" in changes:
        (folder / "generation_config.json").unlink()
    edit_config(folder, **changes)
    message = refusal(folder)
    assert str(folder / "config.json") in message
    assert [part for part in parts if part not in message] == []


def test_arguments(folder: Path) -> None:
    assert "dtype = 'int4'" in refusal(folder, dtype="int4")
    assert "load_format = 'pickle'" in refusal(folder, load_format="pickle")


def test_pickled_weights_only(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    assert "convert the weights to safetensors" in refusal(folder)


def test_missing_tensors(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop(DOWN))
    message = refusal(folder)
    assert f"{folder}: tensor {DOWN} missing" in message and "download it again" in message
    edit_weights(folder, lambda tensors: [tensors.pop(name) for name in sorted(tensors) if "layers.2" in name])
    assert "and 7 more missing" in refusal(folder)


def test_unknown_tensors(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}))
    message = refusal(folder)
    assert str(folder / WEIGHTS) in message and "q_norm.weight unknown to LlamaForCausalLM" in message


def test_a_tensor_of_the_wrong_shape(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({DOWN: torch.ones(64, 161)}))
    message = refusal(folder)
    assert all(part in message for part in (str(folder / WEIGHTS), DOWN, "[64, 161]", "[64, 160]"))


def test_a_tensor_of_the_wrong_kind(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({DOWN: torch.ones(64, 160, dtype=torch.int32)}))
    assert f"tensor {DOWN} is stored as torch.int32" in refusal(folder)


@pytest.mark.parametrize("kept", [0, 5, 100, 5000, -1])
def test_truncated_files(folder: Path, kept: int) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    message = refusal(folder)
    assert f"{path}: truncated" in message and "download it again" in message


def test_a_file_that_is_no_safetensors(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((4).to_bytes(8, "little") + b"nope" + bytes(1000))
    assert "not a safetensors header" in refusal(folder)
    header = json.dumps({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}).encode()
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    assert "tensor x: shape [4] does not fill" in refusal(folder)


def test_index_without_its_shards(folder: Path) -> None:
    shard(folder)
    second = folder / "model-00002-of-00002.safetensors"
    hidden = second.rename(folder / "elsewhere")
    assert f"{second}: cannot be read" in refusal(folder)
    tensors = load_file(hidden)
    dropped = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != dropped}, second)
    message = refusal(folder)
    assert f"{second}: tensor {dropped} is missing, which {INDEX} places there" in message and "download" in message
    save_file(tensors, second)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][dropped] = "model-00001-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    message = refusal(folder)
    first = folder / "model-00001-of-00002.safetensors"
    assert f"{first}: tensor {dropped} is missing" in message and f"it is in {second.name}" in message
    (folder / INDEX).write_text("{}")
    assert f"{folder / INDEX}: no weight_map" in refusal(folder)


def test_shards_that_do_not_belong_together(folder: Path) -> None:
    shutil.copy(folder / WEIGHTS, folder / "whole")
    shard(folder)
    first, second = (folder / f"model-{number:05}-of-00002.safetensors" for number in (1, 2))
    (folder / "whole").rename(folder / WEIGHTS)
    assert f"holds both {WEIGHTS} and {INDEX}; remove" in refusal(folder)
    (folder / WEIGHTS).unlink()
    tensors = load_file(second)
    twice = sorted(load_file(first))[0]
    save_file(tensors | {twice: torch.ones(2)}, second)
    assert f"{second}: tensor {twice} is in {first.name}, too; download" in refusal(folder)
    (folder / INDEX).unlink()
    assert f"{folder}: {INDEX} is missing, which says what {first.name} holds; download" in refusal(folder)


def test_an_empty_folder(tmp_path: Path) -> None:
    message = refusal(tmp_path)
    assert f"{tmp_path / 'config.json'}: no such file" in message and "model.path" in message


# ---------------------------------------------------------------- shared memory


def test_two_processes_share_the_weights(tmp_path: Path) -> None:
    """Both map the same file and touch all of it; neither owns a page of its own."""
    config = AutoConfig.from_pretrained(checkpoint("llama"), vocab_size=16384, hidden_size=128)
    config.save_pretrained(tmp_path)
    save_file(parameters(tmp_path, load_format="dummy"), tmp_path / WEIGHTS)
    loaded = load(tmp_path)
    PagedModel(loaded.model, block_size=8).generate([Text([1, 2, 3])], 4)
    touch = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from workers.models.loader import load\n"
        "from tests.support.mapped_memory import mapped\n"
        "from pathlib import Path\n"
        "model = load(sys.argv[1]).model\n"
        "assert all(bool(p.isfinite().all()) for p in model.parameters())\n"
        "print(*mapped(Path(sys.argv[1]) / 'model.safetensors'), flush=True)\n"
        "sys.stdin.read()\n"
    )
    assert all(bool(tensor.isfinite().all()) for tensor in loaded.model.state_dict().values())  # pyright: ignore
    with subprocess.Popen(
        [sys.executable, "-c", touch, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    ) as other:
        assert other.stdout is not None
        theirs = Residency(*map(int, other.stdout.readline().split()))
        mine = mapped(tmp_path / WEIGHTS)
        other.communicate("")
    size = (tmp_path / WEIGHTS).stat().st_size
    assert size > 16 << 20
    for residency in (mine, theirs):
        assert residency.resident_bytes > 0.9 * size
        assert residency.private_dirty_bytes == 0
        assert residency.shared_bytes > 0.9 * size
