"""Whether a checkpoint holds weights that are quantized already: from its files, its config.json and its tensors' names.

No single key tells: some tools write none, others leave theirs in a file of its own, and transformers passes over what it
does not know. Read as floating-point weights, codes would give a wrong number, or none.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from runners.errors import InputError

SHOWN = 4  # pieces of evidence in a message

CONFIG_KEYS = {  # of config.json, at any depth; the kind where the entry does not name its method
    "quantization_config": "quantized",
    "compression_config": "compressed-tensors",
    "sparsity_config": "compressed-tensors",
}
FILES = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
    "quanto_qmap.json": "quanto",
    "qmodel.pt": "HQQ",
}
# Last parts of tensor names that are only found together, in one module. One part alone may be innocent: a norm has a
# `scale`, too.
TENSORS: tuple[tuple[frozenset[str], str], ...] = tuple(
    (frozenset(parts.split()), kind)
    for parts, kind in [
        ("qweight qzeros g_idx", "GPTQ"),
        ("qweight scales", "GPTQ or AWQ"),
        ("qweight", "GPTQ or AWQ"),
        ("weight_packed weight_scale", "compressed-tensors"),
        ("weight_packed", "compressed-tensors"),
        ("compressed bitmask", "compressed-tensors"),
        ("weight weight_scale", "compressed-tensors or FP8"),
        ("weight weight_scale_inv", "FP8 in blocks"),
        ("weight weight_scales", "EETQ"),
        ("weight SCB", "bitsandbytes, 8 bits"),
        ("weight weight.absmax", "bitsandbytes, 4 bits"),
        ("weight weight.quant_map", "bitsandbytes, 4 bits"),
        ("weight._data weight._scale", "quanto"),
        ("weight:qdata weight:scale", "torchao"),
        ("weight_qdata weight_scale", "torchao"),
        ("W_q scale zero", "HQQ"),
        ("codes codebooks", "AQLM"),
        ("Qidxs SU SV", "QuIP#"),
        ("trellis suh svh", "EXL3"),
        ("q_weight q_scale", "EXL2"),
        ("indices centroids.weight", "VPTQ"),
        ("dense_weights row_offsets col_vals", "SpQR"),
        ("gate_up_proj_blocks gate_up_proj_scales", "MXFP4"),
    ]
)
_LONGEST = 1 + max(part.count(".") for parts, _ in TENSORS for part in parts)  # dots count, as in `weight.absmax`


def refuse_quantized(folder: Path, tensors: Iterable[str]) -> None:
    """Refuse a checkpoint whose weights are quantized already.

    Args:
        folder: of the checkpoint.
        tensors: names of all tensors in its safetensors files.

    Raises:
        InputError: naming the kind, and all that was found of it.
    """
    names = set(tensors)
    found = [*_of_config(folder / "config.json"), *_of_files(folder, names), *_of_tensors(names)]
    if not found:
        return
    kinds = list(dict.fromkeys(kind for kind, _ in found))
    specific = [kind for kind in kinds if kind != "quantized"]
    shown = [evidence for _, evidence in found[:SHOWN]] + ["..."] * (len(found) > SHOWN)
    raise InputError(
        f"the weights in {folder} are quantized already ({' / '.join(specific) or 'of an unknown kind'}; found: "
        f"{', '.join(shown)}): take the original checkpoint, whose weights are floating-point numbers, or measure this "
        "one as it is stored with method=stored"
    )


def _of_config(file: Path) -> Iterator[tuple[str, str]]:
    """Kind and evidence of each entry. A file that cannot be read is the matter of `check_config`."""
    try:
        waiting: list[Any] = [json.loads(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError, RecursionError):
        return
    while waiting:  # without recursion: a file may nest deeper than Python can
        node = waiting.pop()
        if isinstance(node, dict):
            for key in CONFIG_KEYS.keys() & node.keys():
                if (value := node[key]) is not None:
                    method = value.get("quant_method") if isinstance(value, dict) else None
                    yield str(method)[:40] if method else CONFIG_KEYS[key], f"{key} in {file.name}"
        waiting += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()


def _of_files(folder: Path, tensors: set[str]) -> Iterator[tuple[str, str]]:
    for name, kind in FILES.items():
        if (folder / name).is_file():
            yield kind, f"the file {name}"
    if not tensors:  # beside safetensors it may be another version of the same model
        yield from (("GGUF", f"the file {file.name}") for file in sorted(folder.glob("*.gguf"))[:1])


def _of_tensors(names: set[str]) -> Iterator[tuple[str, str]]:
    """Kind and evidence of each kind of which some module has all tensors; the first module is named."""
    modules: dict[str, set[str]] = {}
    for name in sorted(names):
        parts = name.replace(":", ".:").split(".")
        for count in range(1, min(_LONGEST, len(parts)) + 1):
            module, part = ".".join(parts[:-count]), ".".join(parts[-count:]).replace(".:", ":")
            modules.setdefault(module, set()).add(part)
    seen: set[str] = set()
    for parts, kind in TENSORS:
        module = next((module for module, held in modules.items() if parts <= held), None)
        # A part tells of one kind only, that of the longer line above: `qweight` adds nothing to `qweight qzeros g_idx`.
        if module is not None and seen.isdisjoint(parts - {"weight"}):
            seen |= parts
            tensors = " and ".join(f"{module}.{part}".lstrip(".") for part in sorted(parts))
            yield kind, f"the tensors {tensors}" if len(parts) > 1 else f"the tensor {tensors}"
