"""The tables that a run and a sweep print at their end."""

import shlex
from typing import Any

import pytest

from runners import cli
from runners.config.command_line import check
from runners.console import console
from runners.results.metrics import METRICS, OUT_OF_MEMORY, calibration_seconds
from runners.results.run_folder import RunFolder
from runners.results.tables import next_steps, results_table
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
    cli._summarize(cells, 0, ["method=rtn", "bits=3,4"])
    output = capsys.readouterr().out
    assert output.replace("\n", "").endswith(f"next      python -m analysis {cells[0].study_folder}")
    methods = [line.split()[0] for line in output.splitlines() if line.strip()]
    assert [name for name in methods if name in ("fp16", "rtn")] == ["fp16", "rtn", "rtn"]


def test_a_single_run_shows_its_table_before_it_turns_to_the_reference(
    toy_settings: ToySettings, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = toy_settings("method=rtn")
    cli._run_cell(settings, single=True)
    printed = capsys.readouterr().out
    first, then = printed.split("This result is stored")
    assert first.count("rtn ") >= 1
    assert "fp32" not in first
    assert then.index("Next comes the unquantized model") < then.index("evaluate fp16: ") < then.index("fp32")
    assert then.index("fp32") < then.index("next      python run.py")
    cli._run_cell(settings.replace(force=True), single=True)  # the reference is there: one table is enough
    assert "This result is stored" not in capsys.readouterr().out


def test_a_sweep_that_has_not_ended_says_its_whole_command(
    toy_settings: ToySettings, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [toy_settings("method=rtn", f"bits={bits}") for bits in (3, 4)]
    typed = ["model=local", "model.path=/a (b)/c", "method=rtn", "bits=3,4", "force=true"]
    with pytest.raises(SystemExit):
        cli._summarize(cells, 0, typed)
    again = "next      python run.py -m model=local 'model.path=/a (b)/c' method=rtn bits=3,4\n"
    assert capsys.readouterr().out.endswith(again)
    failure = {"status": "failed", "stage": "load", "error": "killed", "model": "toy", "method": "rtn", "bits": 3}
    RunFolder(cells[0].folder).write_json(METRICS, failure)
    with pytest.raises(SystemExit):
        cli._summarize(cells, 0, [*typed, "retry_failed=false"])
    again = again.replace("-m ", "-m retry_failed=true ")
    assert capsys.readouterr().out.endswith(again)


def test_what_to_try_next_has_the_users_own_model_and_settings() -> None:
    run = {"folder": "results/runs/m/a", "tracker": None}
    typed = ["model=local", "model.path=/my models/m", "method=quantease", "method.num_iters=9", "bits=4", "seed=1"]
    *_, sweep, other, table, shown = next_steps(run, typed).splitlines()
    mine = "model=local 'model.path=/my models/m'"
    assert sweep == f"next      python run.py -m method=rtn,gptq,quantease bits=2,3,4 {mine} seed=1"
    assert other.strip() == f"python run.py method=gptq_quantease group_size=64 {mine} bits=4 seed=1"
    assert table.strip() == "python -m analysis results/runs"
    assert shown.strip() == "python run.py --help"
    elsewhere = next_steps(run, ["bits=4", "results=/my results", "study=night"])
    assert "python run.py model=opt-125m 'results=/my results' study=night  " in elsewhere
    commands = [line for line in elsewhere.splitlines() if "run.py " in line and "--help" not in line]
    assert all("'results=/my results' study=night" in line for line in commands)
    words = shlex.split(sweep)[4:]
    assert [cell.run.model.path for cell in check(words, multirun=True)] == ["/my models/m"] * 9


def test_the_seconds_of_calibration_are_told_apart(toy_settings: ToySettings) -> None:
    rows = run_experiment(toy_settings("method=gptq"))
    reference, row = rows
    parts = [row[f"quantize/{phase}_seconds"] for phase in ("calibrate", "propagate")]
    assert calibration_seconds(row) == sum(parts) < row["quantize/seconds"]
    assert calibration_seconds(reference) is None
    long = {"quantize/seconds": 31.4, "quantize/calibrate_seconds": 20.0, "quantize/propagate_seconds": 2.5}
    lines = printed(REFERENCE, ROUNDED | long)
    assert "of them" in lines[0]
    assert " 31.4 " in lines[-2]
    assert " 22.5" in lines[-2]


def test_a_noise_floor_that_float32_cannot_resolve_is_no_number() -> None:
    floors = {"ppl/t": 9.0, "agreement/t/kl_floor": -8e-10}
    assert "noise floor of the KL on t: below 1e-07, all that float32 resolves;" in " ".join(
        printed(REFERENCE | floors)
    )
    floors["agreement/t/kl_floor"] = 1.63e-3
    assert "noise floor of the KL on t: 1.6e-03; a smaller" in " ".join(printed(REFERENCE | floors))


def test_tasks_that_memory_ran_out_for_are_work_left() -> None:
    rows = printed(REFERENCE | {"skipped/piqa": OUT_OF_MEMORY})
    assert "what memory ran out for, the same command tries again" in " ".join(rows)
    assert "tries again" not in " ".join(printed(REFERENCE | {"skipped/piqa": "there is no piqa"}))


def test_what_stores_far_more_than_its_bits_is_marked() -> None:
    spqr = ROUNDED | {"method": "spqr", "bits": 2, "bits_per_weight": 6.14}
    lines = printed(spqr, ROUNDED | {"bits_per_weight": 4.0}, REFERENCE)
    rows = {line.split()[0]: line for line in lines}
    assert "‡ 6.14" in rows["spqr"]
    assert "‡" not in rows["rtn"] + rows["fp16"]
    assert "‡ stores over 1 bit per weight more than its bits" in " ".join(lines)
    assert "‡" not in "".join(printed(ROUNDED, REFERENCE))


def test_every_stage_of_a_run_records_its_memory(toy_settings: ToySettings) -> None:
    (_, row) = run_experiment(toy_settings("method=rtn", "evaluation=full", "evaluation.limit=2"))
    for stage in ("quantize", "evaluate", "zero_shot"):
        assert row[f"{stage}/peak_memory_gb"] > 0
