"""A checkpoint that was quantized elsewhere is measured as it is stored, and is a row like any other."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from runners.results import metrics
from runners.run.experiment import run_cell, run_experiment
from tests.conftest import ToySettings
from tests.formats.writers import write_packed

BLOCKS = "model.decoder.layers."  # of the toy


def quantized(toy_settings: ToySettings, *settings: str) -> dict[str, Any]:
    """A run of our GPTQ whose codes are kept."""
    result = run_cell(toy_settings("method=gptq", "keep_checkpoint=always", *settings))
    assert result["status"] == "done"
    return result


def measured(toy_settings: ToySettings, folder: Path, *settings: str) -> dict[str, Any]:
    return run_cell(toy_settings("method=stored", f"model.path={folder}", *settings))


@pytest.mark.parametrize(
    ("version", "settings"),
    [
        (1, ("bits=4", "group_size=16", "symmetric=true")),
        (2, ("bits=3", "group_size=16", "act_order=true")),
        (2, ("bits=2",)),
        (2, ("bits=8", "group_size=8", "act_order=true")),
    ],
)
def test_our_gptq_in_its_layout_is_measured_to_the_last_digit(
    toy_settings: ToySettings, toy_model: Path, tmp_path: Path, version: int, settings: tuple[str, ...]
) -> None:
    ours = quantized(toy_settings, *settings)
    folder = tmp_path / "packed"
    write_packed(toy_model, Path(ours["folder"]), folder, f"gptq v{version}", BLOCKS)
    theirs = measured(toy_settings, folder, f"reference={toy_model}")
    assert theirs["status"] == "done"
    for key in (metrics.ppl("wikitext2"), metrics.agreement("wikitext2", "kl"), metrics.agreement("wikitext2", "top1")):
        assert theirs[key] == ours[key], key
    assert theirs["bits"] == ours["bits"]
    assert theirs["group_size"] == ours["group_size"]
    assert theirs["symmetric"] is ours["symmetric"]
    assert theirs[metrics.MODEL_PATH] == ours[metrics.MODEL_PATH]
    assert metrics.method_words(theirs) == "gptq (elsewhere)"


@pytest.mark.parametrize(
    ("layout", "settings", "method", "bits"),
    [
        ("awq", ("bits=4", "group_size=16"), "awq", 4 + 20 / 16),
        ("bitsandbytes", ("grid=nf4", "group_size=32", "scale_bits=32"), "nf4", None),
        ("naive", ("bits=6", "group_size=16"), "compressed-tensors", 8 + 40 / 16),
    ],
)
def test_whole_models_in_other_layouts_are_measured_to_the_last_digit(
    toy_settings: ToySettings,
    toy_model: Path,
    tmp_path: Path,
    layout: str,
    settings: tuple[str, ...],
    method: str,
    bits: float | None,
) -> None:
    ours = quantized(toy_settings, *settings)
    write_packed(toy_model, Path(ours["folder"]), tmp_path / "packed", layout, BLOCKS)
    theirs = measured(toy_settings, tmp_path / "packed")
    assert theirs[metrics.ppl("wikitext2")] == ours[metrics.ppl("wikitext2")]
    assert [theirs[name] for name in ("bits", "group_size")] == [ours[name] for name in ("bits", "group_size")]
    assert metrics.method_words(theirs) == f"{method} (elsewhere)"
    # NF4 has a table of levels and a text for each layer beside its codes.
    assert theirs[metrics.BITS_PER_WEIGHT] == bits if bits is not None else theirs[metrics.BITS_PER_WEIGHT] > 5


def test_every_stored_bit_is_counted(toy_settings: ToySettings, toy_model: Path, tmp_path: Path) -> None:
    ours = quantized(toy_settings, "bits=4", "group_size=16", "symmetric=true")
    folder = tmp_path / "packed"
    write_packed(toy_model, Path(ours["folder"]), folder, "gptq v1", BLOCKS)
    theirs = measured(toy_settings, folder)
    # By hand: 4 bits a weight, 16 + 4 bits a group for scale and zero point, 32 bits a column for g_idx.
    shapes = [(32, 32)] * 4 + [(64, 32), (32, 64)]
    bits = sum(out * columns * 4 + out * columns // 16 * (16 + 4) + columns * 32 for out, columns in shapes)
    assert theirs[metrics.BITS_PER_WEIGHT] == bits / sum(out * columns for out, columns in shapes)
    assert theirs[metrics.BITS_PER_PARAMETER] > theirs[metrics.BITS_PER_WEIGHT]


def test_without_a_reference_there_is_no_agreement(toy_settings: ToySettings, toy_model: Path, tmp_path: Path) -> None:
    ours = quantized(toy_settings, "bits=3", "symmetric=true")
    folder = tmp_path / "packed"
    write_packed(toy_model, Path(ours["folder"]), folder, "gptq v1", BLOCKS)
    (theirs,) = run_experiment(toy_settings("method=stored", f"model.path={folder}"))
    assert not metrics.keys_of(theirs, "agreement")
    assert math.isclose(theirs[metrics.ppl("wikitext2")], ours[metrics.ppl("wikitext2")], rel_tol=0)
    content = json.loads((Path(theirs["folder"]) / metrics.METRICS).read_text())
    assert content[metrics.STORED_LAYOUT] == "gptq v1"
