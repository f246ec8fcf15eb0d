"""Zero-shot tasks that memory ran out for: work that is left, which costs nothing of the result that stands."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from runners.data.task_rows import BUNDLED
from runners.results.metrics import METRICS, TASKS_LEFT
from runners.results.run_folder import RunFolder
from runners.run import stages
from runners.run.experiment import run_cell, run_experiment
from runners.run.tasks_left import merged
from runners.sweeps.cells import read_status
from tests.conftest import ToySettings
from tests.harness.test_resume import measured

SHORT = ("evaluation.tasks=[stdlib_last_word]", "evaluation.limit=3", "keep_checkpoint=never")
ACCURACY = f"zero_shot/{BUNDLED}/acc"


@pytest.fixture
def memory_is_short(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The whole model does not fit, until the patch is undone."""

    def full(*_: object) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(stages, "whole_model", full)
    return monkeypatch


def stamp(folder: Path) -> int:
    return (folder / METRICS).stat().st_mtime_ns


def test_the_same_command_tries_them_again_and_ends_as_if_memory_had_sufficed(
    toy_settings: ToySettings, memory_is_short: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = toy_settings("method=rtn", *SHORT)
    short = run_experiment(settings)
    assert [row["status"] for row in short] == ["done", "done"]  # their perplexities are results
    assert not any(ACCURACY in row for row in short)
    row = read_status(settings.folder)
    assert row["status"] == "done"
    assert row[TASKS_LEFT] == f"not measured, as memory ran out: {BUNDLED}"
    assert (settings.folder / "checkpoint").is_dir()
    before = stamp(settings.folder), stamp(settings.reference().folder)
    run_experiment(settings)  # memory is short still: nothing changes
    assert (stamp(settings.folder), stamp(settings.reference().folder)) == before
    assert not list(settings.folder.glob("progress.json"))

    memory_is_short.undo()
    now = run_experiment(settings.replace(batch_size=1))  # as the sentence in the metrics advises
    whole = run_experiment(toy_settings("method=rtn", *SHORT, f"results={tmp_path / 'whole'}"))
    for got, expected in zip(now, whole, strict=True):
        assert measured(got).keys() == measured(expected).keys()
        assert got["zero_shot/batch_size"] == 1
        for key in measured(expected).keys() - {"zero_shot/batch_size"}:
            is_number = isinstance(expected[key], int | float)
            assert got[key] == (pytest.approx(expected[key], rel=1e-5) if is_number else expected[key]), key
    assert RunFolder(settings.folder).metrics() == {
        key: value for key, value in now[1].items() if key not in ("folder", "tracker")
    }
    assert TASKS_LEFT not in read_status(settings.folder)
    assert not (settings.folder / "checkpoint").exists()
    assert [row["skipped"] for row in run_experiment(settings)] == [True, True]


def test_a_try_that_fails_costs_nothing(toy_settings: ToySettings, memory_is_short: pytest.MonkeyPatch) -> None:
    settings = toy_settings("method=rtn", *SHORT)
    run_cell(settings)
    memory_is_short.undo()
    before = (settings.folder / METRICS).read_bytes()
    (settings.folder / "checkpoint" / "block-00001.json").write_text("{")
    row = run_cell(settings)
    assert row["status"] == "done"
    assert ACCURACY not in row
    assert (settings.folder / METRICS).read_bytes() == before


def test_an_interrupt_leaves_the_result(toy_settings: ToySettings, memory_is_short: pytest.MonkeyPatch) -> None:
    settings = toy_settings("method=fp16", *SHORT)
    run_cell(settings)
    before = (settings.folder / METRICS).read_bytes()

    def interrupt(*_: object) -> Any:
        raise KeyboardInterrupt

    memory_is_short.setattr(stages, "whole_model", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_cell(settings)
    assert (settings.folder / METRICS).read_bytes() == before
    assert TASKS_LEFT in read_status(settings.folder)


def test_a_run_whose_quantized_weights_are_gone_is_done(
    toy_settings: ToySettings, memory_is_short: pytest.MonkeyPatch
) -> None:
    settings = toy_settings("method=rtn", *SHORT)
    run_cell(settings)
    (settings.folder / "checkpoint" / "identity.json").unlink()
    assert TASKS_LEFT not in read_status(settings.folder)
    memory_is_short.undo()
    assert run_cell(settings)["skipped"] is True
    assert ACCURACY in run_cell(settings.replace(force=True))


def test_other_reasons_to_skip_a_task_stay(toy_settings: ToySettings, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(stages, "whole_model", fail)
    settings = toy_settings("method=fp16", *SHORT)
    assert run_cell(settings)["status"] == "done"
    assert TASKS_LEFT not in read_status(settings.folder)
    assert run_cell(settings)["skipped"] is True


def test_what_was_measured_with_another_batch_size_is_measured_again() -> None:
    short = json.loads(
        '{"status": "done", "zero_shot/piqa/acc": 0.5, "zero_shot/seconds": 5.0, "zero_shot/peak_memory_gb": 2.0, '
        '"zero_shot/batch_size": 8}'
    )
    ended = short | {"skipped/boolq": stages.metrics.OUT_OF_MEMORY, "skipped/c4": "there is no c4"}
    found = {"zero_shot/boolq/acc": 0.7, "skipped/c4": "no c4 today", "zero_shot/seconds": 3.0}
    found |= {"zero_shot/peak_memory_gb": 1.0, "zero_shot/batch_size": 8}
    assert merged(ended, found) == short | {
        "skipped/c4": "there is no c4",
        "zero_shot/boolq/acc": 0.7,
        "zero_shot/seconds": 8.0,
    }
    again = merged(ended, found | {"zero_shot/batch_size": 1, "zero_shot/piqa/acc": 0.6})
    assert (again["zero_shot/seconds"], again["zero_shot/piqa/acc"]) == (3.0, 0.6)
