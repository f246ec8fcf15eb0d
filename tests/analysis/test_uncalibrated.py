"""A study with runs that measured no layer errors: told apart from those that did, and empty where they have none."""

from pathlib import Path

import pytest

from analysis.collect import collect, read_tables
from analysis.correlation import run_errors
from analysis.figures.layer_choice import layer_choices
from analysis.figures.layer_figures import layer_errors
from analysis.report import write_report
from analysis.series import summarize
from analysis.tables.comparison import comparison
from runners.run.experiment import run_experiment
from tests.conftest import ToySettings


@pytest.fixture
def study(toy_settings: ToySettings) -> Path:
    for seed in (0, 1):
        for calibration in ("c4", "none"):
            settings = toy_settings("method=rtn", f"calibration={calibration}", f"seed={seed}")
            run_experiment(settings)
    return settings.study_folder


def test_a_study_with_and_without_calibration(study: Path) -> None:
    frame = collect(study)
    table = comparison(frame).set_index("method")
    assert set(table.index[1:]) == {"rtn calibration=c4", "rtn calibration=none"}
    without, measured = table.loc["rtn calibration=none"], table.loc["rtn calibration=c4"]
    for name in ("relative layer error", "held-out layer error"):
        assert without[name] == ""
        assert float(measured[name].split(" ± ")[0]) > 0
    assert without["wikitext2"] == measured["wikitext2"]
    summary = summarize(frame)
    errors = run_errors(frame, summary)
    assert list(errors.groupby("label")["layers/mean_relative_error"].count()) == [2, 0]
    layers = read_tables(frame, "layers.csv")
    (choice,) = layer_choices(summary, layers, frame["model"].iloc[0])
    assert choice.title.endswith("per-channel: error of every layer")  # of rtn alone, relative to nothing
    figure = layer_errors(choice, layers)
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "rtn calibration=c4" in named
    assert "rtn calibration=none" not in named
    page = (write_report(study) / "index.html").read_text()
    assert "rtn calibration=none" in page
    assert "nan" not in {cell.strip() for cell in page.replace("<", ">").split(">")}


def test_a_study_without_any_calibration(toy_settings: ToySettings) -> None:
    settings = toy_settings("method=rtn", "calibration=none")
    run_experiment(settings)
    frame = collect(settings.study_folder)
    table = comparison(frame)
    assert list(table["method"][1:]) == ["rtn"]
    assert not [name for name in table.columns if "layer error" in name] or set(table["relative layer error"]) == {""}
    assert not layer_choices(summarize(frame), read_tables(frame, "layers.csv"), frame["model"].iloc[0])
    page = (write_report(settings.study_folder) / "index.html").read_text()
    assert "has measured layer errors" in page
