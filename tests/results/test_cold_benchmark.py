"""The benchmark of what a user waits for: what its rows say, and that a command that fails is no number."""

from typing import Any

import pytest

from runners.benchmark import cold
from runners.errors import InputError
from runners.run.experiment import run_cell
from tests.conftest import ToySettings


def test_a_row_has_the_seconds_of_a_command_and_of_its_cells(
    toy_settings: ToySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = toy_settings("method=rtn")
    words = ["model=local", f"model.path={settings.run.model.path}", "calibration=c4", "calibration.num_sequences=6"]
    words += ["evaluation=wikitext2", f"data_root={settings.execution.data_root}", "tracker=none", "method=rtn"]
    monkeypatch.setattr(cold, "COMMANDS", {"toy": tuple(words), "wrong": ("bits=9",)})
    row = cold.measure("toy")
    assert row["command"] == "toy"
    assert 0 < row["first_cell_outside_work"] < row["seconds"]
    assert row["later_cells_outside_work"] is None
    with pytest.raises(InputError, match=r"run.py bits=9 .* has failed: error: .*bits"):
        cold.measure("wrong")


def test_what_is_outside_work_is_the_rest_of_a_run(toy_settings: ToySettings) -> None:
    metrics: dict[str, Any] = run_cell(toy_settings("method=rtn"))
    parts = [metrics[key] for key in ("quantize/seconds", "evaluate/seconds")]
    assert cold.outside_work(metrics) == pytest.approx(metrics["run/seconds"] - sum(parts))
    assert cold.outside_work(metrics) > 0
