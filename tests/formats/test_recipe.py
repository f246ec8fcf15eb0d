"""The method of a compressed-tensors checkpoint is the one that the recipe beside it names."""

from pathlib import Path

import pytest

from runners.formats.detect import packed_layers
from runners.formats.recipe import FILE, method_of
from tests.formats.test_golden import GOLDEN, cases, tensors_of, write_case

GPTQ = """default_stage:
  default_modifiers:
    GPTQModifier:
      targets: [Linear]
      ignore: [lm_head]
      scheme: W4A16
"""
SMOOTH = """quant_stage:
  quant_modifiers:
    SmoothQuantModifier:
      smoothing_strength: 0.8
    QuantizationModifier:
      # GPTQModifier: not this time
      targets: Linear
"""


@pytest.mark.parametrize(
    ("text", "method"),
    [
        (GPTQ, "gptq"),
        (SMOOTH, "smoothquant+rtn"),
        ("stage:\n  modifiers:\n  - AWQModifier: {}\n", "awq"),
        ("stage:\n  QuantizationModifier :\n    targets: Linear\n", "rtn"),
        ("nothing: of the kind\n", None),
        ("\x00\x01 not text", None),
    ],
)
def test_the_methods_of_a_recipe(text: str, method: str | None, tmp_path: Path) -> None:
    assert method_of(tmp_path) is None
    (tmp_path / FILE).write_text(text)
    assert method_of(tmp_path) == method


def test_a_layer_is_of_the_method_of_the_recipe(tmp_path: Path) -> None:
    file, case, config = next(each.values for each in cases() if each.values[0].stem == "compressed_tensors")
    assert file.parent == GOLDEN
    write_case(tmp_path, tensors_of(file, case), config)

    def methods() -> set[str]:
        return {layer.scheme.method for layer in packed_layers(tmp_path, [tmp_path / "model.safetensors"]).values()}

    assert methods() == {"compressed-tensors"}
    (tmp_path / FILE).write_text(GPTQ)
    assert methods() == {"gptq"}
