"""The tables that a run and a sweep print at their end."""

from typing import Any

import pytest

from runners import cli
from runners.console import console
from runners.results.metrics import METRICS
from runners.results.run_folder import RunFolder
from runners.results.tables import results_table
from runners.run.experiment import run_experiment
from tests.conftest import ToySettings

LABELS = {"status": "done", "model": "toy", "parameters": 1, "layers/mean_relative_error": 0.1}
REFERENCE = LABELS | {"method": "fp16", "bits_per_weight": 16.0}
ROUNDED = LABELS | {"method": "rtn", "bits": 3, "bits_per_weight": 3.5, "setting": ""}


def printed(*rows: dict[str, Any]) -> list[str]:
    """The lines of the table that have text, from its heading on."""
    with console.capture() as captured:
        console.print(results_table(rows))
    return [line.strip() for line in captured.get().splitlines() if line.strip()]


@pytest.mark.parametrize("method", [REFERENCE, ROUNDED], ids=["fp16", "rtn"])
@pytest.mark.parametrize("largest", ["quantize", "evaluate", "zero_shot"])
def test_memory_is_the_largest_peak_of_all_stages(method: dict[str, Any], largest: str) -> None:
    stages = {f"{stage}/peak_memory_gb": 1.25 for stage in ("quantize", "evaluate", "zero_shot")}
    (row,) = [
        line for line in printed(method | stages | {f"{largest}/peak_memory_gb": 7.5}) if method["method"] in line
    ]
    assert row.endswith("7.50 GB")


def test_memory_of_results_that_lack_a_stage() -> None:
    assert printed(ROUNDED | {"evaluate/peak_memory_gb": 2.0})[-2].endswith("2.00 GB")
    assert "GB" not in "\n".join(printed(ROUNDED))


@pytest.mark.parametrize(
    ("dtype", "name"), [("bfloat16", "bf16"), ("float32", "fp32"), ("float16", "fp16"), (None, "fp16")]
)
def test_full_precision_has_the_name_of_its_dtype(dtype: str | None, name: str) -> None:
    row = printed(REFERENCE | ({} if dtype is None else {"model_dtype": dtype}))[-2]
    assert row.split()[0] == name


@pytest.mark.parametrize(("override", "dtype"), [("model.dtype=null", "float32"), ("model.dtype=bfloat16", "bfloat16")])
def test_a_run_records_the_dtype_of_its_model(override: str, dtype: str, toy_settings: ToySettings) -> None:
    rows = run_experiment(toy_settings("method=rtn", override))
    assert [(row["method"], row["model_dtype"]) for row in rows] == [("fp16", dtype), ("rtn", dtype)]


def test_full_precision_comes_first_in_each_model() -> None:
    runs = [ROUNDED, ROUNDED | {"model": "other"}, REFERENCE, REFERENCE | {"model": "other"}]
    rows = [line.split()[:2] for line in printed(*runs) if line.split()[0] in ("toy", "other")]
    assert rows == [["toy", "fp16"], ["toy", "rtn"], ["other", "fp16"], ["other", "rtn"]]


def test_the_table_of_a_sweep_has_the_reference_that_nobody_asked_for(
    toy_settings: ToySettings, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [toy_settings("method=rtn", f"bits={bits}") for bits in (3, 4)]
    for cell, labels in [(cells[0].reference(), REFERENCE), *((cell, ROUNDED) for cell in cells)]:
        RunFolder(cell.folder).write_json(METRICS, {name: labels[name] for name in labels if name != "setting"})
    cli._summarize(cells, 0)
    methods = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert [name for name in methods if name in ("fp16", "rtn")] == ["fp16", "rtn", "rtn"]


def test_every_stage_of_a_run_records_its_memory(toy_settings: ToySettings) -> None:
    (_, row) = run_experiment(toy_settings("method=rtn", "evaluation=full", "evaluation.limit=2"))
    for stage in ("quantize", "evaluate", "zero_shot"):
        assert row[f"{stage}/peak_memory_gb"] > 0
