"""What a dry run expects of a cell: from the runs most like it, scaled by what is known, and never without a basis."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from runners import cli
from runners.config.command_line import check
from runners.config.settings import Settings
from runners.models.checkpoint import Model, skeleton_here
from runners.quantization.finished_blocks import FOLDER
from runners.results import metrics
from runners.run.disk import codes_bytes, sequence_bytes
from runners.run.dry_run import forecasts
from runners.run.environment import processor
from runners.run.estimate import NOT_MEASURED, estimate
from runners.run.experiment import run_cell
from runners.run.measured import Machine, MeasuredRun, Work, measured_runs, model_of, work_of
from tests.conftest import ToySettings

SOLVER = {"class": "Mine", "strength": 1.0}
WORK = Work(
    "mine", 3, None, (False, "minmax", False), SOLVER, 0, ("quantized", False, "uniform"), 10, {"a": {}}, (), None, True
)


def measured(work: Work = WORK, solve: float = 4.0, threads: int = 1, **more: Any) -> MeasuredRun:
    """A run of 2 s of calibration, 1 s of propagation, 8 s for 20 windows, and 0.5 and 0.7 GB."""
    taken = {
        metrics.phase_seconds("calibrate"): 2.0,
        metrics.phase_seconds("solve"): solve,
        metrics.phase_seconds("propagate"): 1.0,
        metrics.QUANTIZE_MEMORY: 0.5,
        metrics.EVALUATE_SECONDS: 8.0,
        metrics.EVALUATE_MEMORY: 0.7,
        metrics.windows("a"): 20,
    }
    return MeasuredRun(work, taken | more, threads)


def test_the_same_run_again_takes_what_it_took() -> None:
    found = estimate(WORK, [measured()], threads=1)
    assert (found.seconds, found.memory_gb, found.unknown) == (15.0, 0.7, ())
    assert found.basis == "from 1 run of mine"


def test_of_runs_that_are_alike_the_median_counts_and_the_largest_memory() -> None:
    peaks: list[dict[str, Any]] = [{metrics.QUANTIZE_MEMORY: peak} for peak in (0.3, 50.0, 0.4)]
    runs = [measured(solve=solve, **peak) for solve, peak in zip((3.0, 4.0, 50.0), peaks, strict=True)]
    found = estimate(WORK, runs, threads=1)
    assert (found.seconds, found.memory_gb) == (15.0, 50.0)
    assert found.basis == "from 3 runs of mine"


def test_the_same_bits_come_before_others_and_the_same_settings_before_both() -> None:
    four = measured(dataclasses.replace(WORK, bits=4), solve=6.0)
    stronger = measured(dataclasses.replace(WORK, solver=SOLVER | {"strength": 2.0}), solve=7.0)
    assert estimate(WORK, [four, stronger, measured()], threads=1).seconds == 15.0
    found = estimate(WORK, [four, stronger], threads=1)
    assert found.seconds == 17.0
    assert found.basis == "from 1 run of mine at 4 bits"
    other_threads = measured(solve=60.0, threads=8)
    assert estimate(WORK, [other_threads, measured()], threads=1).seconds == 15.0


def test_sweeps_scale_the_solver_and_sequences_the_calibration() -> None:
    run = measured(dataclasses.replace(WORK, sweeps=10))
    found = estimate(dataclasses.replace(WORK, sweeps=30, sequences=20), [run], threads=1)
    assert found.seconds == 2 * (2.0 + 1.0) + 3 * 4.0 + 8.0
    assert found.basis == "from 1 run of mine, calibration by 20 sequences, solver by 30 sweeps"


def test_further_sequences_and_windows_take_memory_and_fewer_free_none_for_sure() -> None:
    more = dataclasses.replace(WORK, sequences=12, texts={"a": {}, "b": {"max_windows": 5}})
    found = estimate(more, [measured()], threads=1, sequence_bytes=100_000_000)
    assert found.seconds == pytest.approx(3.0 * 1.2 + 4.0 + 8.0 * 25 / 20)
    assert found.memory_gb == pytest.approx(0.7 + 2 * 5 * 0.1)  # two walks of five windows
    assert "evaluation by 25 windows" in found.basis
    fewer = dataclasses.replace(WORK, sequences=1)
    assert estimate(fewer, [measured()], threads=1, sequence_bytes=100_000_000).memory_gb == 0.7


def test_without_a_basis_there_is_no_estimate() -> None:
    found = estimate(WORK, [])
    assert (found.is_known, found.memory_gb, found.basis) == (False, None, NOT_MEASURED)


def test_what_was_not_measured_is_named_and_the_rest_is_a_lower_bound() -> None:
    new = dataclasses.replace(WORK, method="new", texts={"a": {}, "long": {"max_windows": None}})
    found = estimate(new, [measured()], threads=1)
    assert (found.seconds, found.unknown) == (11.0, ("new", "long"))
    assert found.basis == f"new, long {NOT_MEASURED}; from 1 run of mine"
    other_text = dataclasses.replace(WORK, texts={"long": {"max_windows": None}})
    assert estimate(other_text, [measured()]).unknown == ("evaluation",)
    otherwise_calibrated = dataclasses.replace(WORK, mode=("full_precision", False, "uniform"))
    assert estimate(otherwise_calibrated, [measured()]).unknown == ("calibration",)


def test_an_unquantized_model_is_estimated_from_unquantized_models_alone() -> None:
    reference = Work(metrics.REFERENCE, None, None, (), {}, 0, (), 0, {"a": {}}, (), None, True)
    assert not estimate(reference, [measured()]).is_known
    run = MeasuredRun(reference, {metrics.EVALUATE_SECONDS: 3.0, metrics.windows("a"): 20}, 1)
    assert estimate(reference, [measured(), run]).seconds == 3.0


@pytest.mark.parametrize(
    ("limit", "theirs", "asked", "seconds"),
    [(None, None, 80, 6.0), (20, None, 80, 1.5), (20, 40, 40, 3.0), (80, 40, 40, 12.0), (None, 40, 40, None)],
)
def test_questions_scale_the_zero_shot_tasks(limit: int | None, theirs: int | None, asked: int, seconds: float) -> None:
    work = dataclasses.replace(WORK, tasks=("t",), limit=limit)
    taken = {metrics.zero_shot("t", "samples"): asked, metrics.ZERO_SHOT_SECONDS: 6.0}
    found = estimate(work, [measured(dataclasses.replace(work, limit=theirs), **taken)], threads=1)
    assert found.seconds == 15.0 + (seconds or 0.0)
    assert found.unknown == (() if seconds else ("zero-shot tasks",))


def test_an_interrupted_run_has_only_the_rest_before_it() -> None:
    assert estimate(WORK, [measured()], threads=1, quantize_share=0.25).seconds == 0.25 * 7.0 + 8.0


def write_run(settings: Settings, device: str = "cpu", cpu: str | None = None, **taken: Any) -> Path:
    """A run's folder as the harness leaves it, as far as estimates read it."""
    folder = settings.folder
    folder.mkdir(parents=True)
    content: dict[str, Any] = {"method": settings.run.method.name, "model": settings.run.model.name, "status": "done"}
    content |= {metrics.BITS_PER_WEIGHT: 3.1, metrics.RELATIVE_ERROR: 0.1, "bits": 3, metrics.OUTLIER_RATIO: 0.0}
    content |= dict(measured().metrics) | {metrics.windows(text): 20 for text in settings.run.evaluation.texts}
    (folder / metrics.METRICS).write_text(json.dumps(content | taken))
    (folder / "config.yaml").write_text(json.dumps(settings.resolved()))  # JSON is YAML
    machine = {"device": device, "processor": processor() if cpu is None else cpu, "threads": torch.get_num_threads()}
    (folder / "environment.json").write_text(json.dumps(machine))
    return folder


def test_only_runs_of_this_model_on_this_machine_count(toy_settings: ToySettings) -> None:
    cell = toy_settings("method=rtn", "bits=3")
    here, model = Machine("cpu", processor(), 1), model_of(cell.resolved())
    results = Path(cell.execution.results)
    write_run(toy_settings("method=rtn", "bits=4", "study=another"))
    write_run(toy_settings("method=rtn", "bits=5"), device="NVIDIA H100")
    write_run(toy_settings("method=rtn", "bits=6"), cpu="another")
    write_run(toy_settings("method=rtn", "bits=7", "model.dtype=float16"))
    write_run(toy_settings("method=rtn", "bits=8"), status="failed", stage="load", error="no")
    damaged = write_run(toy_settings("method=rtn", "bits=2"))
    (damaged / "config.yaml").write_text("[")
    assert [run.work.bits for run in measured_runs(results, model, here)] == [4]
    (run,) = measured_runs(results, model, here)
    assert run.work == dataclasses.replace(work_of(cell.resolved()), bits=4)
    assert [run.work.bits for run in measured_runs(results, model, Machine("NVIDIA H100", "", 0))] == [5]


@pytest.mark.parametrize("method", ["rtn", "gptq", "quantease_outlier", "quantease_structured", "spqr_1pct"])
def test_the_size_of_the_codes_is_that_on_disk(method: str, toy_settings: ToySettings) -> None:
    settings = toy_settings(f"method={method}", "bits=3", "group_size=16", "keep_checkpoint=true")
    assert run_cell(settings)["status"] == "done"
    written = sum(file.stat().st_size for file in settings.folder.glob(f"{FOLDER}/*.safetensors"))
    heads = 8_192  # of the files: names, shapes and the words on each layer
    computed = codes_bytes(
        skeleton_here(settings.run.model), settings, 0.01 if "1" in method or "ea" in method else 0.0
    )
    assert 0 < written - computed < heads * 2


def test_the_size_of_activations(toy_model: Path) -> None:
    toy = Model("toy", str(toy_model))
    assert sequence_bytes(skeleton_here(toy), toy, 64) == 64 * 32 * 4
    half = dataclasses.replace(toy, dtype="bfloat16")
    assert sequence_bytes(skeleton_here(half), half, 64) == 64 * 32 * 2


def test_a_model_that_is_not_here_is_not_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("runners.models.checkpoint.download_snapshot", lambda *_: pytest.fail("nothing is downloaded"))
    monkeypatch.setattr("runners.hub.hub_answers", lambda: pytest.fail("the hub is not asked"))
    (cell,) = check(
        ["model=opt-125m", "evaluation=stdlib", f"results={tmp_path}", "calibration=stdlib"], multirun=False
    )
    words, lines = forecasts([cell], is_here=True)
    assert list(words.values()) == [{"basis": NOT_MEASURED}]
    assert lines[-1] == "disk   not known for opt-125m: its files are not here, and a dry run downloads nothing"
    (tmp_path / "no.gguf").write_bytes(b"")
    assert skeleton_here(Model("file", str(tmp_path / "no.gguf"))) is None


def test_cells_that_run_elsewhere_have_no_time(toy_settings: ToySettings) -> None:
    cell = toy_settings("method=rtn")
    write_run(toy_settings("method=rtn", "seed=7"))
    words, lines = forecasts([cell], is_here=False)
    assert words[cell.folder].keys() == {"disk"}
    assert lines[0] == "time   not known: another machine runs them"


def test_what_is_done_has_no_estimate_and_a_reference_counts_once(toy_settings: ToySettings) -> None:
    cells = [toy_settings("method=rtn", f"bits={bits}", "seed=1", "device=cpu") for bits in (3, 4, 5)]
    write_run(cells[0])
    words, lines = forecasts(cells, is_here=True)
    assert words.keys() == {cell.folder for cell in cells[1:]}
    assert "for 2 cells and the unquantized model, of which not all was measured here yet" in lines[0]
    write_run(cells[0].reference(), method=metrics.REFERENCE)
    assert " for 2 cells; one after another" in forecasts(cells, is_here=True)[1][0]


@pytest.mark.parametrize("width", [80, 120])
def test_a_dry_run_after_a_real_one_expects_what_that_took(
    width: int, toy_settings: ToySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a factor of two of the seconds of the very run that it is from: rounding is all that may lie between."""
    done = toy_settings("method=quantease", "method.num_iters=4")
    found = run_cell(done)
    assert found["status"] == "done"
    again = toy_settings("method=quantease", "method.num_iters=4", "seed=1")
    words, _ = forecasts([again], is_here=True)
    took = found[metrics.QUANTIZE_SECONDS] + found[metrics.EVALUATE_SECONDS]
    number, unit = words[again.folder]["time"].split()
    assert took / 2 < float(number) * {"s": 1, "min": 60}[unit] < took * 2
    assert words[again.folder]["basis"] == "from 1 run of quantease"
    shown = io.StringIO()
    monkeypatch.setattr(cli, "console", Console(file=shown, width=width, markup=False, emoji=False))
    cli._list([done, again], is_here=True)
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    row = next(line for line in lines if "missing" in line)
    assert words[again.folder]["time"] in row
    assert words[again.folder]["memory"] in row
    assert lines[-1] == "1 done, 1 missing"


@pytest.mark.slow
def test_a_run_of_the_bundled_model_takes_about_what_was_expected(tmp_path: Path) -> None:
    """A factor of two between 3 and 4 bits: the work is the same, and a machine that others use is half as fast at times."""
    common = [f"results={tmp_path}", "tracker=none", "method=gptq", "device=cpu"]
    few = ["calibration.num_sequences=32", "evaluation.texts.stdlib_docs.max_windows=16"]
    (first,) = check([*common, *few, "bits=3"], multirun=False)
    (second,) = check([*common, *few, "bits=4"], multirun=False)
    for settings in (first, first.reference()):
        assert run_cell(settings)["status"] == "done"
    words, _ = forecasts([second], is_here=True)
    took = run_cell(second)
    stages = (metrics.QUANTIZE_SECONDS, metrics.EVALUATE_SECONDS, metrics.ZERO_SHOT_SECONDS)
    number, unit = words[second.folder]["time"].split()
    seconds = sum(took.get(stage, 0.0) for stage in stages)
    assert seconds / 2 < float(number) * {"s": 1, "min": 60}[unit] < seconds * 2
    assert float(words[second.folder]["memory"].split()[0]) == pytest.approx(metrics.peak_memory_gb(took), rel=0.5)
