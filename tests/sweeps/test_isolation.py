"""A cell in a process of its own: whatever ends it leaves a row that says what happened and where."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from quantease.grid import GridSpec
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer
from runners import cli
from runners.config.run import Method
from runners.config.settings import Settings
from runners.errors import InputError
from runners.results.metrics import METRICS, Reason
from runners.results.progress import PROGRESS, Progress, read_progress
from runners.results.run_folder import RunFolder
from runners.run.experiment import failure_metrics, run_cell, run_experiment
from runners.sweeps import isolation
from runners.sweeps.cells import read_status
from runners.sweeps.isolation import record_dead_runs, run_isolated
from runners.sweeps.signals import sigterm_as_interrupt
from tests.conftest import PROJECT, ToySettings
from tests.sweeps.endless import StartSweep, quantizing, session, wait_for

DONE = {"status": "done", "method": "fp16", "model": "toy", "bits_per_weight": 16.0, "layers/mean_relative_error": 0.0}


@dataclasses.dataclass(frozen=True)
class Ends(LayerSolver):
    """A method that rounds, until it reaches the first layer of 64 inputs: fc2 of block 0."""

    how: str

    def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        if problem.weight.shape[1] == 64:
            time.sleep(2)  # progress is written once a second
            self.end()
        grid = problem.fit_grid(spec)
        return QuantizedLayer(grid.encode(problem.weight), grid)

    def end(self) -> None:
        if self.how == "tells its time":
            raise TimeoutError(f"after {time.process_time():.2f} s")
        if self.how == "raises":
            raise ZeroDivisionError("in the middle")
        if self.how == "sleeps":
            time.sleep(600)
        if self.how == "leaves":
            os._exit(7)
        if self.how == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "is interrupted by its scheduler":
            os.kill(os.getpid(), signal.SIGTERM)


def ending(settings: Settings, how: str) -> Settings:
    return settings.replace(method=Method("ends", Ends(how)))


def stored(settings: Settings) -> dict[str, str]:
    return json.loads((settings.folder / METRICS).read_text())


ENDS = {
    "raises": ("exception", "ZeroDivisionError: in the middle"),
    "is killed": ("killed", "killed by SIGKILL during quantize, after "),
    "leaves": ("killed", "its process left with exit code 7 during quantize, after "),
    "is interrupted by its scheduler": ("interrupted", "interrupted during quantize, after "),
}


@pytest.mark.parametrize("how", ENDS)
def test_whatever_ends_a_cell_leaves_a_row(toy_settings: ToySettings, how: str) -> None:
    settings = ending(toy_settings("method=rtn"), how)
    (row,) = run_isolated(settings)
    reason, error = ENDS[how]
    assert (row["status"], row["reason"], row["stage"]) == ("failed", reason, "quantize")
    assert row["error"].startswith(error)
    assert stored(settings)["error"] == row["error"]
    assert (row["method"], row["bits"], row["digest"]) == ("ends", 3, settings.digest)
    if reason != "exception":
        assert "of 12 steps (block 1/2 fc1)" in row["error"]
    if how == "is killed":
        assert "probably out of memory; try a smaller batch_size" in row["error"]
    assert not (settings.folder / PROGRESS).exists()
    assert not RunFolder(settings.folder).is_running()
    assert (settings.folder / "layers.csv").exists() == (how not in ("is killed", "leaves"))


def test_a_process_gives_the_same_rows_and_the_next_one_too(toy_settings: ToySettings, tmp_path: Path) -> None:
    settings = toy_settings("method=rtn")
    run_isolated(ending(settings, "is killed"))
    there = run_isolated(settings)
    here = run_experiment(toy_settings("method=rtn", f"results={tmp_path / 'here'}"))
    for mine, other in zip(there, here, strict=True):
        for key in ("method", "status", "ppl/wikitext2", "layers/mean_relative_error", "digest"):
            assert mine[key] == other[key]
    assert [row["status"] for row in there] == ["done", "done"]


@pytest.mark.skipif(isolation.START_METHOD != "forkserver", reason="this system has no fork server")
def test_a_process_reaches_its_first_block_in_two_seconds(toy_settings: ToySettings) -> None:
    """Of its own processor time, which begins with its fork: what its server has imported costs it nothing."""
    (row,) = run_isolated(ending(toy_settings("method=rtn"), "tells its time"))
    assert float(row["error"].removeprefix("TimeoutError: after ").removesuffix(" s")) < 2


def test_a_process_gives_the_bits_of_a_cold_one(toy_settings: ToySettings, tmp_path: Path) -> None:
    """A forked cell against one in an interpreter of its own, which has imported nothing before."""
    arguments = ["method=quantease", "method.num_iters=3", "calibration=c4", "bits=3"]
    settings = toy_settings(*arguments)
    run_isolated(settings)
    toy = ["model=local", f"model.path={settings.run.model.path}", "calibration.num_sequences=6", "tracker=none"]
    command = [sys.executable, "run.py", *arguments, *toy, "evaluation=wikitext2", f"results={tmp_path / 'cold'}"]
    command += [f"data_root={settings.execution.data_root}"]
    subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, text=True)
    (cold,) = (tmp_path / "cold").glob("runs/toy/quantease-*")
    assert cold.name == settings.folder.name  # of one digest: the same cell
    assert (cold / "windows.csv").read_bytes() == (settings.folder / "windows.csv").read_bytes()
    warm, theirs = stored(settings), json.loads((cold / METRICS).read_text())
    others = ("seconds", "memory_gb", "seal", "cache/hits", "cache/misses")
    measured = {key for key in warm if not key.endswith(others)}
    assert {key: warm[key] for key in measured} == {key: theirs[key] for key in measured}
    assert {"checkpoint/sha256", "ppl/wikitext2"} <= measured


def test_a_process_tells_its_cell_before_the_reference_begins(toy_settings: ToySettings) -> None:
    settings = toy_settings("method=rtn", "evaluation.agreement=false")
    told: list[tuple[dict[str, Any], bool]] = []
    _, row = run_isolated(
        settings, on_cell=lambda metrics: told.append((metrics, (settings.reference().folder / METRICS).exists()))
    )
    assert told == [(row, False)]


def test_a_reference_that_takes_too_long_leaves_the_cells_row(toy_settings: ToySettings) -> None:
    settings = toy_settings("method=rtn").replace(timeout_minutes=10)

    def end_the_time(_: dict[str, Any]) -> None:
        raise isolation._TimeIsUp

    (row,) = run_isolated(settings, on_cell=end_the_time)
    assert row["status"] == "done"
    assert stored(settings)["status"] == "done"


def test_a_cell_that_takes_too_long_is_stopped(toy_settings: ToySettings) -> None:
    settings = ending(toy_settings("method=rtn"), "sleeps").replace(timeout_minutes=0.05)
    start = time.monotonic()
    (row,) = run_isolated(settings)
    assert time.monotonic() - start < 60
    assert (row["status"], row["reason"]) == ("failed", "timeout")
    assert row["error"].startswith("stopped after timeout_minutes=0.05 during ")
    assert stored(settings)["reason"] == "timeout"


def test_an_error_that_has_nowhere_to_go_comes_back_as_itself(toy_settings: ToySettings, tmp_path: Path) -> None:
    settings = toy_settings("method=rtn")
    (tmp_path / "results").write_text("a file where the folder should be")
    with pytest.raises(InputError, match="nothing can be written to"):
        run_isolated(settings)


def test_what_is_done_needs_no_process(toy_settings: ToySettings, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = toy_settings("method=rtn")
    run_experiment(settings)
    monkeypatch.setattr(isolation, "_start", lambda *_: pytest.fail("nothing may be started"))
    assert [row["skipped"] for row in run_isolated(settings)] == [True, True]


def test_a_failed_run_is_left_alone_until_it_is_to_be_retried(toy_settings: ToySettings) -> None:
    settings = toy_settings("method=rtn")
    folder = RunFolder(settings.folder)
    for reason, is_settled in {"exception": True, "killed": True, "timeout": True, "interrupted": False}.items():
        folder.write_json(METRICS, failure_metrics(settings, Reason(reason), "quantize", "broke"))
        assert (folder.metrics_to_keep(force=False, retry_failed=False) is not None) == is_settled
        assert folder.metrics_to_keep(force=False, retry_failed=True) is None
    folder.write_json(METRICS, failure_metrics(settings, Reason.KILLED, "quantize", "broke"))
    assert run_cell(settings)["error"] == "broke"
    assert run_cell(settings.replace(retry_failed=True))["status"] == "done"


@pytest.mark.parametrize("force", [False, True])
def test_a_run_that_another_process_works_on_is_not_touched(toy_settings: ToySettings, force: bool) -> None:
    settings = toy_settings("method=rtn", f"force={force}")
    folder = RunFolder(settings.folder)
    folder.path.mkdir(parents=True)
    with folder.lock(wait=False) as mine:
        assert mine
        Progress(folder.path)
        if force:
            folder.write_json(METRICS, DONE)
        (row,) = run_experiment(settings)
        assert row["status"] == "running"
        assert f"process {os.getpid()} on " in row["error"]
        assert (folder.metrics() == DONE) == force
    assert not (folder.path / "config.yaml").exists()


def test_a_reference_that_another_process_measures_is_waited_for(toy_settings: ToySettings) -> None:
    settings = toy_settings("method=rtn")
    reference = RunFolder(settings.reference().folder)
    reference.path.mkdir(parents=True)
    has_it = threading.Event()

    def measure() -> None:
        with reference.lock(wait=False):
            has_it.set()
            time.sleep(2)
            reference.write_json(METRICS, DONE | {"by": "another"})

    other = threading.Thread(target=measure)
    other.start()
    has_it.wait()
    rows = run_experiment(settings)
    other.join()
    assert rows[0]["by"] == "another"
    assert rows[1]["status"] == "done"


def test_the_row_of_a_run_that_nobody_saw_dying(toy_settings: ToySettings) -> None:
    settings = toy_settings("method=rtn")
    settings.folder.mkdir(parents=True)
    Progress(settings.folder).stage = "evaluate"
    with RunFolder(settings.folder).lock(wait=False):
        record_dead_runs([settings])  # it is alive
    assert not (settings.folder / METRICS).exists()
    record_dead_runs([settings])
    assert (stored(settings)["reason"], stored(settings)["stage"]) == ("interrupted", "evaluate")
    assert not (settings.folder / PROGRESS).exists()


def test_sigterm_is_an_interrupt_and_then_what_it_was() -> None:
    def end() -> None:
        with sigterm_as_interrupt():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with pytest.raises(KeyboardInterrupt):
        end()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_interrupt_of_a_single_run_leaves_a_row(toy_settings: ToySettings) -> None:
    settings = ending(toy_settings("method=rtn"), "is interrupted by its scheduler")
    with pytest.raises(KeyboardInterrupt), sigterm_as_interrupt():
        run_cell(settings)
    assert stored(settings)["reason"] == "interrupted"
    assert len((settings.folder / "layers.csv").read_text().splitlines()) == 1 + 5


def test_ctrl_c_ends_a_sweep_in_order(start_endless_sweep: StartSweep, tmp_path: Path) -> None:
    sweep = start_endless_sweep(subprocess.PIPE)
    wait_for(lambda: bool(quantizing(tmp_path / "runs")))
    (folder,) = quantizing(tmp_path / "runs")
    os.killpg(sweep.pid, signal.SIGINT)  # as a terminal sends it: to all of them
    out, err = sweep.communicate(timeout=90)
    wait_for(lambda: not session(sweep.pid), seconds=30)
    assert sweep.returncode == cli.INTERRUPTED
    assert err.strip() == "interrupted: the same command again goes on with what is missing"
    assert "Traceback" not in out
    row = json.loads((folder / METRICS).read_text())
    assert (row["reason"], row["stage"]) == ("interrupted", "quantize")
    assert read_status(folder)["status"] == "interrupted"


def test_a_cell_does_not_outlive_its_sweep_and_a_killed_sweep_goes_on(
    start_endless_sweep: StartSweep, tmp_path: Path
) -> None:
    sweep = start_endless_sweep(subprocess.DEVNULL)
    wait_for(lambda: bool(quantizing(tmp_path / "runs")))
    (folder,) = quantizing(tmp_path / "runs")
    os.kill((read_progress(folder) or {})["pid"], signal.SIGKILL)
    wait_for(lambda: bool(set(quantizing(tmp_path / "runs")) - {folder}))  # the next cell
    assert read_status(folder)["reason"] == "killed"
    (other,) = quantizing(tmp_path / "runs")
    assert read_status(other)["status"] == "running"
    time.sleep(3)
    sweep.kill()
    sweep.wait()
    wait_for(lambda: not RunFolder(other).is_running())
    assert read_status(other)["status"] == "interrupted"
    assert read_status(other)["error"].startswith("interrupted during quantize")
