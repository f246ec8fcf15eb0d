"""Figures: what their axes show, the reasons why some are left out, and that their files are repeatable."""

import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from analysis.collect import collect, read_tables
from analysis.figures import layer_figures, size_figures
from analysis.figures.pareto import front, pareto
from analysis.figures.points import LeftOut
from analysis.figures.style import METHODS, looks, png
from analysis.series import METHOD_ORDER, Row, summarize
from tests.conftest import PROJECT
from tests.studies import SIZES, write_run


def lines(axis: Axes, color: str) -> list[tuple[list[float], list[float]]]:
    """The data of every line of a color that has markers."""
    drawn = [
        line for line in axis.get_lines() if line.get_color() == color and line.get_marker() in ("o", "^", ".", "s")
    ]
    return [
        (list(map(float, np.asarray(x))), list(map(float, np.asarray(y))))
        for x, y in (line.get_data() for line in drawn)
    ]


def value(summary: list[Row], model: str, method: str, bits: int | None, metric: str) -> float:
    (row,) = [row for row in summary if (row["model"], row["method"], row["bits"]) == (model, method, bits)]
    return row[metric]


def test_the_pareto_figure_shows_every_series_the_front_and_full_precision(summary: list[Row]) -> None:
    axis = pareto(summary, "opt-13b").axes[0]
    assert axis.get_yscale() == "log"
    assert "wikitext2 (protocol gptq)" in axis.get_title()
    points = lines(axis, METHODS["quantease"][0])
    assert sorted(x for (x,), _ in points) == pytest.approx([3.01, 4.01])
    assert sorted(y for _, (y,) in points) == pytest.approx(
        sorted(value(summary, "opt-13b", "quantease", bits, "ppl/wikitext2") for bits in (3, 4))
    )
    reference = value(summary, "opt-13b", "fp16", None, "ppl/wikitext2")
    assert any(list(np.asarray(line.get_ydata())) == [reference] * 2 for line in axis.get_lines())


def test_no_series_at_as_few_bits_is_lower_than_the_front() -> None:
    stored = [3.0, 3.0, 3.5, 4.0, 4.2]
    rows: list[Row] = [{"bits_per_weight": b, "p": p} for b, p in zip(stored, [12, 10, 11, 9, math.nan], strict=True)]
    assert [(row["bits_per_weight"], row["p"]) for row in front(rows, "p")] == [(3.0, 10), (4.0, 9)]


def test_lines_against_size_join_the_models_of_a_family(summary: list[Row]) -> None:
    axes = size_figures.against_size(summary).axes
    assert [axis.get_title() for axis in axes] == ["4 bits", "3 bits"]
    drawn = lines(axes[1], METHODS["gptq"][0])
    assert sorted(x for x, _ in drawn) == [
        [SIZES["opt-125m"], SIZES["opt-1.3b"], SIZES["opt-13b"]],
        [SIZES["bloom-560m"]],
    ]
    longest = max((y for _, y in drawn), key=len)
    assert longest[1] == pytest.approx(value(summary, "opt-1.3b", "gptq", 3, "ppl/wikitext2"))
    assert axes[0].get_xscale() == axes[0].get_yscale() == "log"


def test_zero_shot_has_the_tasks_standard_error(summary: list[Row]) -> None:
    axis = size_figures.zero_shot(summary).axes[0]
    assert axis.get_ylabel() == "accuracy on piqa (acc)"
    bars = [np.asarray(bar.get_segments()) for bar in axis.collections]  # pyright: ignore[reportAttributeAccessIssue]
    assert all(np.allclose(bar[:, 1, 1] - bar[:, 0, 1], 0.02) for bar in bars)


def test_time_is_shown_for_each_device(summary: list[Row]) -> None:
    other = [row | {"device": "CPU"} if row["model"] == "opt-13b" else row for row in summary]
    assert [axis.get_title() for axis in size_figures.seconds(other).axes] == ["CPU", "NVIDIA H200"]


def test_layer_errors_are_shown_on_calibration_and_held_out_data(study: Path, summary: list[Row]) -> None:
    figure = layer_figures.layer_errors(summary, read_tables(collect(study), "layers.csv"), "opt-1.3b")
    axis = figure.axes[0]
    solid, dotted = (
        [line for line in axis.get_lines() if line.get_color() == METHODS["gptq"][0] and line.get_linestyle() == style]
        for style in ("-", ":")
    )
    assert len(solid) == len(dotted) == 1
    assert np.allclose(np.asarray(dotted[0].get_ydata(), float), 1.3 * np.asarray(solid[0].get_ydata(), float))
    assert len(np.asarray(solid[0].get_ydata())) == 8
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "1", "2", "3"]


def test_sweep_errors_are_the_mean_after_each_sweep(study: Path, summary: list[Row]) -> None:
    figure = layer_figures.sweep_errors(summary, read_tables(collect(study), "sweeps.csv"), "opt-1.3b")
    ((x, y),) = lines(figure.axes[0], METHODS["quantease"][0])
    assert x == [0, 1, 2, 3, 4, 5]
    assert y[0] == pytest.approx(0.1 / 20 * 2)
    assert y == sorted(y, reverse=True)


def test_a_figure_that_would_be_empty_says_why(tmp_path: Path) -> None:
    write_run(tmp_path, "a", model="m", method="gptq", bits=3, status="done", bits_per_weight=3.0, parameters=1)
    frame = collect(tmp_path)
    rows = summarize(frame)
    cases: dict[str, Callable[[], Figure]] = {
        "no quantized run of m has a perplexity": lambda: pareto(rows, "m"),
        "models of two sizes": lambda: size_figures.against_size(rows),
        "no run has zero-shot": lambda: size_figures.zero_shot(rows),
        "it needs models": lambda: size_figures.seconds(rows),
        "has a layers.csv": lambda: layer_figures.layer_errors(rows, read_tables(frame, "layers.csv"), "m"),
        "track_objective=true": lambda: layer_figures.sweep_errors(rows, read_tables(frame, "sweeps.csv"), "m"),
    }
    for sentence, draw in cases.items():
        with pytest.raises(LeftOut, match=sentence):
            draw()


def test_every_method_has_a_color_and_a_marker_of_its_own() -> None:
    shipped = {path.stem for path in (PROJECT / "conf" / "method").glob("*.yaml")}
    assert shipped <= set(METHODS)
    assert set(METHOD_ORDER) == set(METHODS)
    assert (
        len({color for color, _ in METHODS.values()}) == len({marker for _, marker in METHODS.values()}) == len(METHODS)
    )
    mine = looks([{"label": name, "rank": place} for place, name in enumerate(["mine", "gptq", "gptq damping=1"])])
    assert list(mine) == ["gptq", "mine", "gptq damping=1"]
    assert len(set(mine.values())) == 3


def test_a_file_is_the_same_every_time_and_names_no_version(summary: list[Row]) -> None:
    first, second = (png(size_figures.against_size(summary)) for _ in range(2))
    assert first == second
    image = Image.open(io.BytesIO(first))
    assert image.info.keys() <= {"dpi"}
    assert image.width > 1000
