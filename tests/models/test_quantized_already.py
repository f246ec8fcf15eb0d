"""What kind of checkpoint this is comes from all that is there; an original one is never refused for a name it uses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from runners.errors import InputError
from runners.models.checkpoint import Model, open_checkpoint
from runners.models.quantized_already import refuse_quantized
from tests.family_zoo import ALL_FAMILIES, NotBuilt, small_model
from tests.models.test_loaders import SAMPLE

LAYER = "model.layers.0.mlp.down_proj"
TENSORS = {  # what tools leave in the place of a layer's weight
    "GPTQ": "qweight qzeros scales g_idx",
    "AWQ": "qweight qzeros scales",
    "compressed-tensors": "weight_packed weight_scale weight_shape weight_zero_point",
    "FP8 in blocks": "weight weight_scale_inv",
    "FP8": "weight weight_scale input_scale",
    "bitsandbytes, 8 bits": "weight SCB weight_format",
    "bitsandbytes, 4 bits": "weight weight.absmax weight.quant_map weight.quant_state.bitsandbytes__nf4",
    "quanto": "weight._data weight._scale input_scale output_scale",
    "torchao": "weight:qdata weight:scale",
    "HQQ": "W_q scale zero",
    "EETQ": "weight weight_scales",
    "AQLM": "codes codebooks scales",
    "SpQR": "dense_weights row_offsets col_vals in_perm",
    "VPTQ": "indices centroids.weight weight_scale weight_bias",
    "QuIP#": "Qidxs SU SV",
    "EXL2": "q_weight q_scale q_invperm",
}


@pytest.mark.parametrize("kind", TENSORS)
def test_the_names_of_packed_tensors_tell(kind: str, tmp_path: Path) -> None:
    parts = TENSORS[kind].split()
    separator = {part: "" if part.startswith(":") else "." for part in parts}
    names = [f"{LAYER}{separator[part]}{part}" for part in parts] + ["model.norm.weight", "model.embed_tokens.weight"]
    with pytest.raises(InputError, match=r"quantized already \(.*: take the original checkpoint") as refused:
        refuse_quantized(tmp_path, names)
    assert kind in str(refused.value)
    assert f"{LAYER}." in str(refused.value)


CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "compressed-tensors": {"compression_config": {"format": "pack-quantized"}},
    "fp8": {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
    "of an unknown kind": {"quantization_config": {"bits": 4}},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_config_tells(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[kind]))
    with pytest.raises(InputError, match=rf"quantized already \({kind}; found: \w+_config in config\.json\)"):
        refuse_quantized(tmp_path, ["model.norm.weight"])


@pytest.mark.parametrize("file", ["quantize_config.json", "quant_config.json", "quanto_qmap.json", "model-q4_k_m.gguf"])
def test_files_beside_the_weights_tell(file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(InputError, match=f"found: the file {file}"):
        refuse_quantized(tmp_path, [])


def test_all_that_was_found_is_named(model_copy: Path) -> None:
    weights = load_file(model_copy / "model.safetensors")
    name = "model.decoder.layers.0.fc2"
    del weights[f"{name}.weight"]
    packed = {
        f"{name}.{part}": torch.ones(4, 4, dtype=torch.int32) for part in ("qweight", "qzeros", "scales", "g_idx")
    }
    save_file(weights | packed, model_copy / "model.safetensors", metadata={"format": "pt"})
    (model_copy / "quantize_config.json").write_text('{"bits": 4}')
    with pytest.raises(InputError, match=r"\(GPTQ; found: the file quantize_config\.json, the tensors .*g_idx and"):
        open_checkpoint(Model("packed", str(model_copy)))


def test_a_gguf_file_beside_safetensors_is_another_version(model_copy: Path) -> None:
    (model_copy / "model.gguf").write_bytes(b"GGUF")
    open_checkpoint(Model("original", str(model_copy)))


def innocent(family: str, folder: Path) -> None:
    if family not in ALL_FAMILIES:
        pytest.skip(f"transformers does not know {family}")
    try:
        model = small_model(family)
    except NotBuilt as error:
        pytest.skip(str(error))
    model.config.save_pretrained(folder)
    refuse_quantized(folder, model.state_dict())


@pytest.mark.parametrize("family", SAMPLE)
def test_originals_of_a_sample_of_families_are_not_refused(family: str, tmp_path: Path) -> None:
    innocent(family, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in ALL_FAMILIES if family not in SAMPLE])
def test_originals_of_every_family_are_not_refused(family: str, tmp_path: Path) -> None:
    innocent(family, tmp_path)


def test_a_scale_alone_is_innocent(tmp_path: Path) -> None:
    names = [
        "norm.scale",
        "norm.weight",
        "attn.layer_scale",
        "logit_scale",
        "a.scales",
        "moe.scale",
        "b.indices",
        "c.codes",
    ]
    refuse_quantized(tmp_path, names)
