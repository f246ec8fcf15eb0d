"""Calibration on the unquantized model: measured once for all methods, shared, and as resumable as the other."""

import json
from pathlib import Path
from typing import Any

import pytest

from runners.errors import InputError
from runners.quantization.finished_blocks import FinishedBlocks
from runners.run.experiment import run_cell
from tests.conftest import ToySettings
from tests.harness.test_resume import codes, measured


def test_full_precision_inputs_are_measured_once_for_all_methods(toy_settings: ToySettings) -> None:
    rows = [
        run_cell(toy_settings(f"method={method}", "calibration.inputs=full_precision", f"bits={bits}"))
        for method, bits in (("rtn", 3), ("gptq", 2), ("gptq", 3))
    ]
    text = 1  # the unquantized model's activations on the evaluation text are shared, too
    assert [(row["cache/hits"], row["cache/misses"]) for row in rows] == [(0, 2 + text), (2 + text, 0), (2 + text, 0)]
    assert all(row["calibration_inputs"] == "full_precision" for row in rows)
    (alone,) = [run_cell(toy_settings("method=gptq", "calibration.inputs=full_precision", "cache=null", "force=true"))]
    assert measured(alone) == measured(rows[2])
    assert alone["cache/hits"] == 0


def test_full_precision_inputs_change_the_later_blocks_only(toy_settings: ToySettings) -> None:
    files = []
    for inputs in ("quantized", "full_precision"):
        settings = toy_settings("method=gptq", "bits=2", f"calibration.inputs={inputs}")
        run_cell(settings)
        lines = (settings.folder / "layers.csv").read_text().splitlines()[1:]
        files.append([line.split(",")[:5] for line in lines])
    first, second = ([[row for row in rows if row[0] == block] for rows in files] for block in ("0", "1"))
    assert first[0] == first[1]
    assert second[0] != second[1]


def test_what_the_cache_has_lost_is_measured_again(toy_settings: ToySettings, tmp_path: Path) -> None:
    def run(method: str) -> dict[str, Any]:
        return run_cell(toy_settings(f"method={method}", "calibration.inputs=full_precision", "force=true"))

    run("rtn")
    expected = run("gptq")
    for file in (tmp_path / "results" / "cache").glob("*.json"):
        if json.loads(file.read_text())["key"].get("block") == 1:
            file.unlink()
    again = run("gptq")
    assert measured(again) == measured(expected)
    assert again["cache/misses"] == 1


def test_full_precision_inputs_go_on_after_a_kill_too(
    toy_settings: ToySettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = toy_settings("method=gptq", "calibration.inputs=full_precision", "cache=null", "keep_checkpoint=true")
    save = FinishedBlocks.save
    monkeypatch.setattr(
        FinishedBlocks, "save", lambda self, index, *rest: save(self, index, *rest) if index == 0 else _interrupt()
    )
    with pytest.raises(KeyboardInterrupt):
        run_cell(settings)
    monkeypatch.undo()
    other = f"results={tmp_path / 'calm'}"
    calm = toy_settings("method=gptq", "calibration.inputs=full_precision", "cache=null", "keep_checkpoint=true", other)
    assert measured(run_cell(settings)) == measured(run_cell(calm))
    assert codes(settings) == codes(calm)


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_true_sequential_needs_quantized_inputs(toy_settings: ToySettings) -> None:
    with pytest.raises(InputError, match="true_sequential=true needs inputs=quantized"):
        toy_settings("calibration.inputs=full_precision", "calibration.true_sequential=true")
