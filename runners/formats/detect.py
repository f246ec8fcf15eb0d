"""Which layout a checkpoint has, and its quantized layers: from its config and the headers of its files."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from runners.errors import InputError
from runners.formats import recipe
from runners.formats.awq import AwqLayout
from runners.formats.bitsandbytes import BitsandbytesLayout
from runners.formats.compressed_tensors import CompressedLayout
from runners.formats.gptq import GptqLayout
from runners.formats.parts import Parts, headers_of
from runners.formats.scheme import Layout, PackedLayer, Scheme

LAYOUTS: dict[str, Callable[[dict[str, Any], str], Layout]] = {  # by the `quant_method` of a config
    "gptq": GptqLayout.of,
    "awq": AwqLayout.of,
    "compressed-tensors": CompressedLayout.of,
    "bitsandbytes": BitsandbytesLayout.of,
}
PLACES = (  # of the config: a file, a key of it, and the method where the config names none
    ("config.json", "quantization_config", ""),
    ("config.json", "compression_config", "compressed-tensors"),
    ("quantize_config.json", None, "gptq"),
    ("quant_config.json", None, "awq"),
)
FLOATS = ("F32", "F16", "BF16")  # types of weights that are no codes
READABLE = "compressed-tensors, GPTQ, AWQ and bitsandbytes with 4 bits"
# Last parts of names that belong to a quantized layer, and mean nothing without the rest of it.
REMAINS = (
    ".qweight", ".qzeros", ".g_idx", ".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_g_idx",
    ".weight_shape", ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map",
    ".input_scale", ".output_scale", ".k_scale", ".v_scale", ".weight_global_scale",
)  # fmt: skip


def packed_layers(folder: Path, files: list[Path]) -> dict[str, PackedLayer]:
    """The quantized layers of a checkpoint, by the name that their weight would have if it was not quantized.

    Args:
        folder: of the checkpoint.
        files: its safetensors files, which are known to be whole.

    Raises:
        InputError: it is not quantized, in a way that cannot be read, or a layer is not what its layout says.
    """
    config, where = _config(folder)
    method = str(config["quant_method"]).lower()
    if method not in LAYOUTS:
        raise InputError(f"{where} says that the weights are quantized by {method[:40]}, and {READABLE} can be read")
    layout = LAYOUTS[method](config, where)
    if isinstance(layout, CompressedLayout) and (made_by := recipe.method_of(folder)) is not None:
        layout = layout.made_by(made_by)
    headers = headers_of(files)
    names = layout.parts_of(set(headers))
    if not names:
        raise InputError(f"{where} says {method}, but no tensor of the files in {folder} is of a layer quantized so")
    used = {full for of_layer in names.values() for full in of_layer.values()}
    left = {name: header for name, header in headers.items() if name not in used}
    # Codes whose layout is another, or numbers of 8 bits: read as weights they would be others.
    codes = {name for name, header in left.items() if name.endswith(".weight") and header.dtype not in FLOATS}
    if remains := sorted(name for name in left if name in codes or name.endswith(REMAINS)):
        raise InputError(
            f"the tensor {remains[0]} in {headers[remains[0]].file} is of no layer that {method} explains: what it is for "
            "is not known, so the checkpoint cannot be read"
        )
    opened = {}
    for layer, of_layer in names.items():
        parts = Parts(layer, {part: headers[full] for part, full in of_layer.items()})
        if f"{layer}.weight" in headers and f"{layer}.weight" not in of_layer.values():
            raise parts.wrong(next(iter(of_layer)), f"stands beside {layer}.weight: only one of them can be true")
        opened[f"{layer}.weight"] = layout.open(parts)
    return opened


def main_scheme(layers: Iterable[PackedLayer]) -> Scheme:
    """The scheme that most weights have."""
    weights: Counter[Scheme] = Counter()
    for layer in layers:
        weights[layer.scheme] += layer.shape[0] * layer.shape[1]
    return weights.most_common(1)[0][0]


def _config(folder: Path) -> tuple[dict[str, Any], str]:
    """The entries that say how the weights are quantized, with `quant_method`, and where they are."""
    for file, key, method in PLACES:
        content = _read(folder / file)
        for node in (content, content.get("text_config")):
            entries = node if key is None else node.get(key) if isinstance(node, Mapping) else None
            if isinstance(entries, dict) and entries:
                if isinstance(
                    inner := entries.get("quantization_config"), dict
                ):  # compressed-tensors once nested it so
                    entries = inner | {"sparsity_config": entries.get("sparsity_config")}
                where = str(folder / file) if key is None else f"{key} in {folder / file}"
                if method == "compressed-tensors" or not entries.get("quant_method"):
                    entries = entries | {"quant_method": method or _guess(entries)}
                return entries, where
    raise InputError(
        f"{folder} does not say that its weights are quantized, and method=stored measures those that are: take method=fp16"
    )


def _guess(entries: dict[str, Any]) -> str:
    """The method of a config that does not name it, by the entries that one method alone has."""
    if "config_groups" in entries:
        return "compressed-tensors"
    return "bitsandbytes" if entries.get("load_in_4bit") or entries.get("load_in_8bit") else "unknown"


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is damaged: it is not JSON ({error})") from error
    return content if isinstance(content, dict) else {}
