"""Every tensor of a converted model, held against the GGUF file's own.

transformers dequantizes and rearranges; the check does both again, the first with the gguf library, the second by the rules
below, which undo what llama.cpp's `convert_hf_to_gguf.py` does for an architecture. So an architecture is taken only if its
rule is written down here: a tensor that cannot be checked is refused.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from runners.errors import InputError
from runners.gguf_files.contents import GgufFile

Array = np.ndarray[Any, Any]
Rule = Callable[[str, Array, Any], Array]  # of a tensor's name in the file, its numbers, and the model's config


def _as_it_is(_name: str, array: Array, _config: Any) -> Array:
    return array


def _llama(name: str, array: Array, config: Any) -> Array:
    """llama.cpp rotates neighboring channels, transformers the two halves of a head: rows of q and k are rearranged."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return array
    return array.reshape(heads, len(array) // heads // 2, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _norm_minus_one(name: str, array: Array, _config: Any) -> Array:
    """Gemma's norms multiply by 1 + weight; llama.cpp stores the sum."""
    return array - 1 if name.endswith("norm.weight") else array


def _gpt2(name: str, array: Array, _config: Any) -> Array:
    """GPT-2 in transformers keeps its linear layers as (in, out)."""
    linear = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
    return array.T if name.endswith(linear) else array


def _bloom(name: str, array: Array, config: Any) -> Array:
    """BLOOM's q, k and v are interleaved head by head; llama.cpp stores all of q, then k, then v."""
    if "attn_qkv" not in name:
        return array
    heads = config.n_head
    return array.reshape(3, heads, len(array) // heads // 3, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)


def _falcon(name: str, array: Array, config: Any) -> Array:
    if config.new_decoder_architecture:
        raise InputError(f"the tensor {name} of a Falcon with several key heads is rearranged in a way unknown here")
    return array


RULES: dict[str, Rule] = {
    "bloom": _bloom,
    "falcon": _falcon,
    "gemma2": _norm_minus_one,
    "gemma3": _norm_minus_one,
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _llama,
    "phi3": _as_it_is,
    "qwen2": _as_it_is,
    "qwen3": _as_it_is,
    "starcoder2": _as_it_is,
}


def check_tensors(file: GgufFile, model: nn.Module, names: dict[str, str]) -> None:
    """Refuse a converted model unless every parameter has, bit for bit, the numbers of a tensor of the file.

    Args:
        file: that the model was made of, of an architecture of RULES.
        model: float32.
        names: of the model's parameters, by the names of the file's tensors.

    Raises:
        InputError: naming the tensor that differs, has no place in the model, or is missing from the file.
    """
    from gguf import dequantize

    parameters = dict(model.named_parameters(remove_duplicate=False))
    checked = set[int]()
    for tensor in file.tensors:
        parameter = parameters.get(names.get(tensor.name, ""))
        if parameter is None:
            raise InputError(
                f"the tensor {tensor.name} in {file.path} has no place in the model that transformers builds of it, so that "
                "model would be another one"
            )
        numbers = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        expected = RULES[file.architecture](tensor.name, numbers, model.config)
        if not _equal(parameter, expected):
            raise InputError(
                f"transformers has made something else of the tensor {tensor.name} in {file.path} than the gguf library: "
                "this version cannot be trusted with this file"
            )
        checked.add(id(parameter))
    for name, parameter in parameters.items():
        if id(parameter) not in checked:
            raise InputError(f"{file.path} has no tensor for the model's {name}")


def _equal(parameter: Tensor, expected: Array) -> bool:
    theirs = torch.from_numpy(np.ascontiguousarray(expected))
    return parameter.shape == theirs.shape and torch.equal(parameter.detach().float(), theirs)
