"""Column scales are folded into whatever produces a layer's input, without a change of the model, or refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from quantease.grid import GridSpec
from quantease.layer import QuantizedLayer
from runners.export.folding import Folding
from runners.export.layouts import CannotHold
from runners.models.activations import BlockActivations
from runners.models.blocks import InMemoryModel, linear_layers
from runners.quantization.input_statistics import input_groups
from tests.families import FAMILIES, random_ids

SPEC = GridSpec(8, scale_bits=32)


def sources(family: str, **settings: Any) -> list[Any]:
    """Two equal models whose norms, biases and everything else are random."""
    config = FAMILIES[family]() if family in FAMILIES else getattr(transformers, family)(**settings)
    for name, value in settings.items():
        setattr(config, name, value)
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        model: Any = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        found.append(InMemoryModel(model))
    return found


def scaled_layers(source: Any, index: int) -> dict[str, QuantizedLayer]:
    """A block's layers as AWQ leaves them: layers of one input share random scales."""
    walk = BlockActivations(source, random_ids(2), 2)
    layers, found = linear_layers(source.blocks[index]), dict[str, QuantizedLayer]()
    for group in input_groups(walk, index):
        scale = 2 ** torch.randn(layers[group[0]].in_features)
        for name in group:
            grid = SPEC.fit(layers[name].weight.float() * scale)
            codes = grid.encode(layers[name].weight.float() * scale)
            found[name] = QuantizedLayer(codes, grid, column_scale=scale)
    return {name: found[name] for name in layers}


def logits(source: Any) -> Tensor:
    return source.model(random_ids(3), use_cache=False).logits


PHI3 = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
NO_TOKENS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
AS_MANY = {"num_key_value_heads": 4}  # as query heads
LLAMA = {"input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"}
FOLDED = [
    ("opt", {}, {"self_attn_layer_norm", "self_attn.v_proj", "final_layer_norm", "fc1"}),
    ("llama", AS_MANY, LLAMA),
    ("gemma2", AS_MANY, LLAMA - {"post_attention_layernorm"} | {"pre_feedforward_layernorm"}),
    (
        "Phi3Config",
        PHI3 | NO_TOKENS,
        {words.replace("v_proj", "qkv_proj").replace("up_", "gate_up_") for words in LLAMA},
    ),
]


@pytest.mark.parametrize(("family", "settings", "producers"), FOLDED, ids=[family for family, _, _ in FOLDED])
@torch.no_grad()
def test_a_folded_model_is_the_model_with_column_scales(
    family: str, settings: dict[str, Any], producers: set[str]
) -> None:
    scaled, folded = sources(family, **settings)
    folding = Folding(folded)
    for index in range(2):
        quantized = scaled_layers(scaled, index)
        moved = folding.fold(index, f"layers.{index}.", quantized)
        for source, layers in ((scaled, quantized), (folded, moved)):
            for name, layer in layers.items():
                linear_layers(source.blocks[index])[name].replace(layer.weight)
        assert all(layer.column_scale is None for layer in moved.values())
        assert all(torch.equal(moved[name].codes, layer.codes) for name, layer in quantized.items())
    torch.testing.assert_close(logits(folded), logits(scaled), rtol=1e-4, atol=1e-4)
    assert {words.split(" into ")[1] for words in folding.folded} == producers


@pytest.mark.parametrize(
    ("family", "layer"),
    [
        ("llama", "self_attn.o_proj"),  # two query heads for each value head
        ("gpt-neox", "attention.dense"),  # the rows of queries, keys and values are interleaved
        ("opt-350m", "self_attn.q_proj"),  # the norm is also what the residual adds
    ],
)
@torch.no_grad()
def test_scales_that_nothing_can_take_are_refused(family: str, layer: str) -> None:
    source, _ = sources(family)
    before = {name: parameter.clone() for name, parameter in source.model.named_parameters()}
    quantized = scaled_layers(source, 0)
    with pytest.raises(CannotHold, match=rf"layers\.0\.{layer} has a scale for each .* before it .*: format=dense can"):
        Folding(source).fold(0, "layers.0.", quantized)
    assert all(torch.equal(parameter, before[name]) for name, parameter in source.model.named_parameters())


@torch.no_grad()
def test_a_function_between_that_a_factor_cannot_pass_is_seen() -> None:
    source, _ = sources("opt", activation_function="gelu")
    with pytest.raises(CannotHold, match=r"fc2 has a scale for each input column"):
        Folding(source).fold(0, "", scaled_layers(source, 0))


@torch.no_grad()
def test_layers_of_one_input_must_share_their_scales() -> None:
    source, _ = sources("opt")
    quantized = scaled_layers(source, 0)
    other = quantized["self_attn.q_proj"]
    assert other.column_scale is not None
    quantized["self_attn.q_proj"] = replace(other, column_scale=2 * other.column_scale)
    with pytest.raises(CannotHold, match=r"and self_attn\.q_proj, which has the same input, has others"):
        Folding(source).fold(0, "", quantized)


@torch.no_grad()
def test_a_layer_that_keeps_its_weights_takes_its_share() -> None:
    scaled, folded = sources("opt")
    quantized = scaled_layers(scaled, 0)
    del quantized["self_attn.q_proj"]
    moved = Folding(folded).fold(0, "", quantized)
    for source, layers in ((scaled, quantized), (folded, moved)):
        for name, layer in layers.items():
            linear_layers(source.blocks[0])[name].replace(layer.weight)
    torch.testing.assert_close(logits(folded), logits(scaled), rtol=1e-4, atol=1e-4)
