"""What cannot be read as it is stored is refused in a sentence that names the layer, the key and the file."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from runners.errors import InputError
from runners.formats.detect import packed_layers
from runners.models.checkpoint import Model, open_checkpoint
from tests.conftest import ToySettings
from tests.formats.test_golden import GOLDEN, LAYER, tensors_of, write_case

GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False}
WEIGHTS: dict[str, Any] = {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": True}
CASE = "pack-quantized-4-channel-True-float16"


def gptq_layer(**changes: Any) -> dict[str, torch.Tensor]:
    """A layer of 8 rows and 32 columns."""
    tensors = {
        "qweight": torch.zeros(4, 8, dtype=torch.int32),
        "qzeros": torch.zeros(2, 1, dtype=torch.int32),
        "scales": torch.ones(2, 8, dtype=torch.float16),
        "g_idx": torch.arange(32, dtype=torch.int32) // 16,
    } | changes
    return {part: tensor for part, tensor in tensors.items() if tensor is not None}


def read(folder: Path) -> None:
    for layer in packed_layers(folder, [folder / "model.safetensors"]).values():
        layer.weight()


def compressed(**changes: Any) -> dict[str, Any]:
    weights = WEIGHTS | changes.pop("weights", {})
    group = {"targets": ["Linear"], "weights": weights} | changes.pop("group", {})
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": group}} | changes


CONFIGS = {
    "quantizes activations, too": compressed(group={"input_activations": {"num_bits": 8}}),
    "kv_cache_scheme in .* cache of keys and values": compressed(kv_cache_scheme={"num_bits": 8}),
    "type float with 8 bits": compressed(weights={"type": "float", "num_bits": 8}),
    "format of .* is nvfp4-pack-quantized": compressed(format="nvfp4-pack-quantized"),
    "strategy block": compressed(weights={"strategy": "block"}),
    "sparsity_config in .* sparse-bitmask": compressed(sparsity_config={"format": "sparse-bitmask"}),
    "config_groups in .* is empty": {"quant_method": "compressed-tensors", "config_groups": {}},
    "quantized by fp8, and": {"quant_method": "fp8"},
    "quantized by unknown, and": {"bits": 4},
    "checkpoint_format in .* is marlin": GPTQ | {"checkpoint_format": "marlin"},
    "bits in .* is 5": GPTQ | {"bits": 5},
    "group_size in .* is 'all'": GPTQ | {"group_size": "all"},
    "version in .* is gemv": {"quant_method": "awq", "version": "gemv"},
    "8 bits, with which inputs": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "says awq, but no tensor": {"quant_method": "awq", "bits": 4},
}


@pytest.mark.parametrize("sentence", CONFIGS)
def test_a_config_that_cannot_be_measured_is_refused(sentence: str, tmp_path: Path) -> None:
    write_case(tmp_path, tensors_of(GOLDEN / "compressed_tensors.safetensors", CASE), CONFIGS[sentence])
    with pytest.raises(InputError, match=sentence) as refused:
        read(tmp_path)
    assert "config.json" in str(refused.value)


LAYERS: dict[str, dict[str, Any]] = {
    "without .*scales": {"scales": None},
    "qzeros in .* has the shape": {"qzeros": torch.zeros(2, 2, dtype=torch.int32)},
    "qweight in .* is of type I64": {"qweight": torch.zeros(4, 8, dtype=torch.int64)},
    "scales in .* has 4 groups, and 32 columns in groups of 16 have 2": {
        "scales": torch.ones(4, 8, dtype=torch.float16),
        "qzeros": torch.zeros(4, 1, dtype=torch.int32),
    },
    "g_idx in .* names the group 2, and there are 2": {"g_idx": torch.full((32,), 2, dtype=torch.int32)},
    "scales in .* NaN": {"scales": torch.full((2, 8), torch.nan, dtype=torch.float16)},
    "qzeros in .* zero point of 0": {"qzeros": torch.full((2, 1), -1, dtype=torch.int32)},
    "weight_scale in .* is of no layer that gptq explains": {"weight_scale": torch.ones(8)},
    "stands beside .*weight: only one": {"weight": torch.ones(8, 32)},
}


@pytest.mark.parametrize("sentence", LAYERS)
def test_a_layer_that_is_not_what_its_layout_says_is_refused(sentence: str, tmp_path: Path) -> None:
    write_case(tmp_path, gptq_layer(), GPTQ)
    read(tmp_path)
    write_case(tmp_path, gptq_layer(**LAYERS[sentence]), GPTQ)
    with pytest.raises(InputError, match=sentence) as refused:
        read(tmp_path)
    assert LAYER in str(refused.value)
    assert "model.safetensors" in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_a_weight_that_is_no_floating_point_number_and_no_code_of_the_layout_is_refused(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    write_case(tmp_path, gptq_layer(), GPTQ)
    tensors = load_file(tmp_path / "model.safetensors") | {"model.embed_tokens.weight": torch.zeros(8, 8).to(dtype)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.embed_tokens\.weight in .* is of no layer that gptq explains"):
        read(tmp_path)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_the_old_key_of_compressed_tensors_is_read(key: str, tmp_path: Path) -> None:
    write_case(tmp_path, tensors_of(GOLDEN / "compressed_tensors.safetensors", CASE), compressed(), key)
    read(tmp_path)


def test_the_config_may_be_in_a_file_of_its_own(tmp_path: Path) -> None:
    write_case(tmp_path, gptq_layer(), {})
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 16}))
    read(tmp_path)


def test_an_original_is_none(toy_settings: ToySettings, toy_model: Path) -> None:
    with pytest.raises(InputError, match=r"does not say that its weights are quantized.*method=fp16"):
        open_checkpoint(Model("toy", str(toy_model)), stored=True)
    with pytest.raises(InputError, match=r"reference=.*leave reference out"):
        toy_settings("method=rtn", f"reference={toy_model}")


def test_a_pickle_is_refused_as_before(toy_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toy_model, tmp_path / "pickled"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="are pickled, and unpickling runs code"):
        open_checkpoint(Model("pickled", str(folder)), stored=True)


def test_other_methods_refuse_a_quantized_checkpoint_and_name_the_one_that_does_not(model_copy: Path) -> None:
    tensors = load_file(model_copy / "model.safetensors")
    save_file(tensors | {f"{LAYER}.qweight": torch.zeros(4, 4, dtype=torch.int32)}, model_copy / "model.safetensors")
    with pytest.raises(InputError, match=r"quantized already .*method=stored"):
        open_checkpoint(Model("packed", str(model_copy)))


def test_a_layer_of_another_shape_than_the_model_has_is_refused(
    toy_settings: ToySettings, model_copy: Path, tmp_path: Path
) -> None:
    from runners.models.streaming import open_model

    name = "model.decoder.layers.0.fc1"
    tensors = load_file(model_copy / "model.safetensors")
    del tensors[f"{name}.weight"]
    packed = {f"{name}.{part}": tensor for part, tensor in gptq_layer().items()}
    save_file(tensors | packed, model_copy / "model.safetensors", {"format": "pt"})
    config = json.loads((model_copy / "config.json").read_text()) | {"quantization_config": GPTQ}
    (model_copy / "config.json").write_text(json.dumps(config))
    model = Model("packed", str(model_copy))
    with pytest.raises(InputError, match=rf"{name}\.weight is \(8, 32\), and should be \(64, 32\)"):
        open_model(open_checkpoint(model, stored=True), model, torch.device("cpu"))
