"""Figures: what their axes show, the reasons why some are left out, and that their files are repeatable."""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle
from PIL import Image

from analysis.collect import collect, read_tables
from analysis.figures import layer_figures, size_figures
from analysis.figures.interactive import shape
from analysis.figures.layer_choice import LayerChoice, errors_of, kind_names, layer_choices
from analysis.figures.pareto import front, pareto, pareto_caption
from analysis.figures.placement import Place, apart
from analysis.figures.points import LeftOut
from analysis.figures.style import METHODS, looks, png
from analysis.figures.sweep_figures import sweep_errors
from analysis.series import METHOD_ORDER, Row, summarize
from tests.conftest import PROJECT
from tests.studies import SIZES, write_run, write_table


def lines(axis: Axes, color: str) -> list[tuple[list[float], list[float]]]:
    """The data of every line of a color that has markers."""
    drawn = [
        line
        for line in axis.get_lines()
        if line.get_color() == color and line.get_marker() in ("o", "^", ".", "s", "X")
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


def test_the_caption_of_the_time_says_how_much_is_the_calibrations(summary: list[Row]) -> None:
    assert size_figures.seconds_caption(summary) == "Time to quantize against model size"  # it was not measured
    phases = {"quantize/calibrate_seconds": 0.2, "quantize/propagate_seconds": 0.1}  # of a second
    timed = [row | {"quantize/seconds": 1.0} | phases for row in summary]
    assert size_figures.seconds_caption(timed).endswith("; calibration takes 30 % of it")
    timed[-1]["quantize/seconds"] = 0.5
    assert size_figures.seconds_caption(timed).endswith("; calibration takes 30 to 60 % of it")


def test_the_pareto_figure_joins_nothing_but_the_front(summary: list[Row]) -> None:
    figure = pareto(summary, "opt-13b")
    joined = [line for axis in figure.axes for line in axis.get_lines() if len(np.asarray(line.get_xdata())) > 1]
    joined = [line for line in joined if line.get_linestyle() != "None" and line.get_color() != "black"]
    assert {line.get_drawstyle() for line in joined} == {"steps-post"}
    keys = {key.get_label(): key for key in figure.legends[0].legend_handles if isinstance(key, Line2D)}
    assert keys["gptq"].get_linestyle() == "None"
    assert keys["best at its bits or fewer"].get_linestyle() == "-"


def stored(method: str, bits: int, weight: float, perplexity: float, **more: Any) -> Row:
    """A series with what the Pareto figure needs."""
    labels = {"model": "m", "method": method, "label": method, "grid": "per-channel", "rank": (bits, method)}
    return labels | {"bits": bits, "bits_per_weight": weight, "ppl/t": perplexity, "seeds": 1, "deviations": {}} | more


def test_what_stores_far_more_is_beyond_a_break_with_its_bits_as_a_tick() -> None:
    near = [stored("gptq", bits, bits + 0.1, 30.0 / bits) for bits in (2, 3, 4)]
    axis = pareto([*near, stored("spqr", 2, 9.08, 11.0)], "m").axes[0]
    assert axis.get_xlim()[1] < 5
    ((far, _),) = lines(axis, METHODS["spqr"][0])
    (tick,) = [tick for tick, label in zip(axis.get_xticks(), axis.get_xticklabels(), strict=True)
               if label.get_text() == "9.08"]  # fmt: skip
    assert far == pytest.approx([tick])
    assert far[0] > 4.1
    assert "//" in [text.get_text() for text in axis.texts]
    more_bits = pareto([*near, stored("gptq", 8, 8.1, 5.0)], "m").axes[0]  # what was asked for is no outlier
    assert more_bits.get_xlim()[1] > 8
    assert not more_bits.texts


def test_points_that_would_cover_each_other_are_moved_apart_and_others_are_not() -> None:
    places = [Place(3.0, 10.0), Place(3.0, 10.01), Place(3.0, 10.02), Place(4.0, 10.0), Place(3.0, 30.0)]
    moved = apart(places, (2.0, 5.0), (9.0, 1000.0), math.log)
    assert [place.y for place in moved] == [place.y for place in places]
    assert (moved[0], moved[3], moved[4]) == (places[0], places[3], places[4])
    first, second, third = sorted(place.x for place in moved[:3])
    assert second - first == pytest.approx(third - second)
    assert 0.01 < (second - first) / 3.0 < 0.03


def test_seeds_are_named_only_where_there_are_several(summary: list[Row]) -> None:
    assert "(mean over 2 seeds; bars: standard deviation over the seeds;" in pareto_caption(summary, "opt-13b")
    single: list[Row] = [row | {"seeds": 1} for row in summary]
    assert "(one seed; points" in pareto_caption(single, "opt-13b")
    mixed = [row | {"seeds": 1 if row["bits"] == 4 else 3} for row in summary]
    assert "mean over 1 to 3 seeds; bars: standard deviation over the seeds, none where" in pareto_caption(
        mixed, "opt-13b"
    )
    bare = [row | {"deviations": {name: math.nan for name in row["deviations"]}} for row in single]
    assert not any(len(axis.collections) for axis in pareto(bare, "opt-13b").axes)


def choices(study: Path, model: str = "opt-1.3b") -> tuple[list[LayerChoice], pd.DataFrame]:
    frame = collect(study)
    layers = read_tables(frame, "layers.csv")
    return layer_choices(summarize(frame), layers, model), layers


def test_layer_errors_are_relative_to_gptq_by_kind_of_layer(study: Path) -> None:
    (_, at_3_bits), layers = choices(study)
    assert (at_3_bits.bits, at_3_bits.base, at_3_bits.file) == (3, "gptq", "layers-opt-1.3b-3-bits-per-channel.png")
    assert at_3_bits.title == "opt-1.3b, 3 bits, per-channel: error of every layer relative to GPTQ's"
    assert at_3_bits.caption == f"{at_3_bits.title}; mean over 2 seeds"
    figure = layer_figures.layer_errors(at_3_bits, layers)
    assert [axis.get_title() for axis in figure.axes] == ["fc1", "fc2"]
    ((x, y),) = lines(figure.axes[0], METHODS["rtn"][0])
    assert x == [0, 1, 2, 3]
    assert y == pytest.approx([0.6 / 0.15] * 4)
    flat = [line for line in figure.axes[0].get_lines() if line.get_color() == METHODS["gptq"][0]]
    assert [list(np.asarray(line.get_ydata())) for line in flat] == [[1, 1]]
    assert "held-out" in figure.get_supylabel()


def write_layers(study: Path, method: str, seed: int, error: float, weight: float = 3.0) -> None:
    """A run at 3 bits with one layer in one block."""
    labels = {"model": "m", "method": method, "series": method, "seed": seed, "bits": 3, "bits_per_weight": weight}
    folder = write_run(study, f"{method}-{seed}", status="done", parameters=1, **labels)
    write_table(folder / "layers.csv", [{"block": 0, "layer": "attn.q_proj", "relative_error": error}])


def test_only_seeds_that_a_series_shares_with_gptq_are_compared(tmp_path: Path) -> None:
    for seed, error in enumerate([0.1, 0.2, 0.6]):
        write_layers(tmp_path, "gptq", seed, error)
    write_layers(tmp_path, "quantease", 1, 0.1)
    ((choice,), layers) = choices(tmp_path, "m")
    column, values = errors_of(choice, layers)
    assert column == "relative_error"
    assert list(values["quantease"]) == pytest.approx([0.5])


def test_at_most_six_series_are_shown_and_the_others_are_named(tmp_path: Path) -> None:
    for place, method in enumerate(["gptq", "rtn", "a", "b", "c", "d", "e", "f"]):
        write_layers(tmp_path, method, 0, 0.1, 3.0 + 0.1 * place)
    ((choice,), layers) = choices(tmp_path, "m")
    assert [row["method"] for row, _ in choice.shown] == ["rtn", "a", "b", "c", "d", "e"]
    assert choice.caption.endswith("Shown are the 6 series nearest to it in bits per weight, not f")
    assert "one seed" in choice.caption
    (axis,) = layer_figures.layer_errors(choice, layers).axes
    assert len(axis.get_lines()) == 7


def test_quantease_is_among_the_six_of_equal_bits(tmp_path: Path) -> None:
    """Methods of 2026 come before it in tables, and store as much."""
    for method in ["gptq", "rtn", "a", "b", "c", "d", "e", "f", "quantease"]:
        write_layers(tmp_path, method, 0, 0.1, 3.0)
    ((choice,), _) = choices(tmp_path, "m")
    assert {"rtn", "quantease"} <= {row["method"] for row, _ in choice.shown}
    assert len(choice.shown) == 6


@pytest.mark.parametrize(
    ("methods", "words", "value"),
    [(("rtn", "mine"), "relative to rtn's (GPTQ was not run)", 0.5), (("mine",), "(gptq and rtn were not run)", 0.1)],
)
def test_without_gptq_the_title_says_so(tmp_path: Path, methods: tuple[str, ...], words: str, value: float) -> None:
    for method in methods:
        write_layers(tmp_path, method, 0, 0.1 if method == "mine" else 0.2)
    ((choice,), layers) = choices(tmp_path, "m")
    figure = layer_figures.layer_errors(choice, layers)
    assert figure.get_suptitle() == f"m, 3 bits, per-channel: error of every layer {words}"
    (line,) = [line for line in figure.axes[0].get_lines() if len(np.asarray(line.get_xdata())) == 1]
    assert list(np.asarray(line.get_ydata())) == pytest.approx([value])


def test_layers_are_called_by_the_last_part_of_their_names_unless_two_share_it() -> None:
    names = ["self_attn.q_proj", "self_attn.qkv", "attn.c_proj", "mlp.c_proj", "mlp.experts.0.up", "mlp.experts.11.up"]
    assert list(kind_names(names).values()) == ["q_proj", "qkv", "attn.c_proj", "mlp.c_proj", "up", "up"]
    assert kind_names(["experts.0.up", "shared.up"]) == {"experts.0.up": "experts.*.up", "shared.up": "shared.up"}


def test_sweep_errors_are_the_mean_after_each_sweep(study: Path, summary: list[Row]) -> None:
    figure = sweep_errors(summary, read_tables(collect(study), "sweeps.csv"), "opt-1.3b")
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
        "track_objective=true": lambda: sweep_errors(rows, read_tables(frame, "sweeps.csv"), "m"),
    }
    for sentence, draw in cases.items():
        with pytest.raises(LeftOut, match=sentence):
            draw()


def test_every_method_has_a_color_and_a_marker_of_its_own() -> None:
    shipped = {path.stem for path in (PROJECT / "conf" / "method").glob("*.yaml")}
    assert shipped - {"stored"} <= set(METHODS)  # which has the name of the method that quantized it
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


def test_the_figure_to_zoom_has_the_markers_of_the_others() -> None:
    """Matplotlib's own outlines of polygons and stars, whose y axis points up."""
    turned = [marker for _, marker in METHODS.values() if not isinstance(marker, str)]
    for marker in [*turned, (7, 0, 10), (5, 1, 36)]:
        style = MarkerStyle(marker)
        outline = np.array(style.get_path().transformed(style.get_transform()).vertices)[
            :-1
        ]  # of half the size, closed
        points = [point.split(",") for point in shape(marker)[1:-1].split("L")]
        assert np.abs(np.array(points, float) - outline * (2, -2)).max() < 0.01
    assert all(shape(marker) for _, marker in METHODS.values())
