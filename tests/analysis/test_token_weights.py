"""What the calibration weighs: the figure of token energy, and series that differ only in their token weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.collect import collect, read_tables
from analysis.figures.energy import token_energy
from analysis.figures.layer_choice import layer_choices
from analysis.figures.points import LeftOut
from analysis.intervals import compare_peers, window_losses, winners
from analysis.published import comparable
from analysis.report import write_report
from analysis.series import summarize
from analysis.tables.comparison import comparison
from tests.studies import write_run, write_table

LABELS: dict[str, Any] = {"model": "m", "status": "done", "bits_per_weight": 3.0}
TEXT = {"protocol/t": "gptq", "windows/t": 40, "sha256/t": "0"}


def put(study: Path, method: str, bits: int = 3, windows: Any = None, **more: Any) -> Path:
    name = f"{method}-{bits}-{more.get('token_weights')}"
    labels = LABELS | TEXT | {"method": method, "bits": bits, "series": name}
    return write_run(study, name, windows, **labels, **more)


def layer(block: int, name: str, share: float | None, position: int | None = 0, there: float = 1.0) -> dict[str, Any]:
    energy = {"energy_top_percent": share, "energy_max_over_median": 9.0 if share else None}
    known = position is not None and share is not None
    place = {"energy_position": position if known else None, "energy_position_share": there if known else None}
    return {"block": block, "layer": name, "relative_error": 0.1} | energy | place


def test_energy_has_one_line_per_input_and_tells_where_the_large_tokens_are(tmp_path: Path) -> None:
    rows = [layer(b, f"attn.{n}", 0.02 + b / 100, 7, 0.3) for b in range(3) for n in ("q_proj", "k_proj", "v_proj")]
    rows += [layer(b, "mlp.down_proj", share, b // 2, 0.96) for b, share in enumerate((0.4, 0.79, 0.5))]
    rows += [layer(b, f"mlp.experts.{e}.w2", 0.1 * e + 0.02 * b, None) for b in range(3) for e in range(2)]
    write_table(put(tmp_path, "gptq", 4) / "layers.csv", rows)
    write_table(put(tmp_path, "rtn", 3) / "layers.csv", [layer(0, "attn.q_proj", 0.9)])
    write_table(put(tmp_path, "rtn", 8) / "layers.csv", [{"block": 0, "layer": "attn.q_proj", "relative_error": 0.1}])
    frame = collect(tmp_path)
    figure = token_energy(summarize(frame), read_tables(frame, "layers.csv"), "m")
    (axis,) = figure.axes
    assert axis.get_title() == "m: calibration of gptq, 4 bits, per-channel, seed 0"  # that of 8 bits has measured none
    assert axis.get_ylim()[0] == 0
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named == ["attn.q_proj, k_proj, v_proj", "mlp.down_proj", "mlp.experts.*.w2", "all tokens alike"]
    shares = [list(np.asarray(line.get_ydata(), float)) for line in axis.lines[:3]]
    assert shares == [pytest.approx([0.02, 0.03, 0.04]), [0.4, 0.79, 0.5], pytest.approx([0.1, 0.12, 0.14])]
    told = {text.get_text(): text.xy for text in axis.texts}  # pyright: ignore[reportAttributeAccessIssue]
    assert told == {"position 0 (96 %)": (1, 0.79), "position 1 (96 %)": (2, 0.5)}


def test_a_large_share_without_a_known_position_has_no_words(tmp_path: Path) -> None:
    rows = [layer(0, "w2", 0.9, None), layer(1, "w2", None)]  # the second input is zero
    write_table(put(tmp_path, "gptq") / "layers.csv", rows)
    frame = collect(tmp_path)
    (axis,) = token_energy(summarize(frame), read_tables(frame, "layers.csv"), "m").axes
    assert list(np.asarray(axis.lines[0].get_xdata(), float)) == [0]
    assert not axis.texts


@pytest.mark.parametrize("rows", [[], [{"block": 0, "layer": "w", "relative_error": 0.1}], [layer(0, "w", None)]])
def test_without_energies_the_figure_is_left_out_with_a_reason(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    write_table(put(tmp_path, "gptq") / "layers.csv", rows)
    frame = collect(tmp_path)
    with pytest.raises(LeftOut, match="no run of m has token energies"):
        token_energy(summarize(frame), read_tables(frame, "layers.csv"), "m")


def test_runs_without_token_weights_are_uniform_and_either_can_be_chosen(tmp_path: Path) -> None:
    put(tmp_path, "rtn")  # older
    put(tmp_path, "gptq", token_weights="uniform")
    put(tmp_path, "gptq", token_weights="length_one")
    write_run(tmp_path, "fp16", None, **LABELS | {"method": "fp16", "bits_per_weight": 16.0})
    for value, chosen in {"uniform": ["fp16", "gptq", "rtn"], "length_one": ["fp16", "gptq"]}.items():
        assert sorted(collect(tmp_path, {"token_weights": value})["method"]) == chosen
    with pytest.raises(ValueError, match="no run has token_weights=l1: there are length_one, null, uniform"):
        collect(tmp_path, {"token_weights": "l1"})


def test_series_of_other_token_weights_have_words_of_their_own_and_are_no_rivals(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for method, loss in {"rtn": 2.0, "gptq": 1.5, "spqr": 1.4}.items():
        for weights, gain in {"uniform": 0.0, "length_one": 0.2}.items():
            nll = list(loss - gain + generator.normal(0, 0.01, 40))
            measured = {"ppl/t": float(np.exp(np.mean(nll))), "token_weights": weights}
            folder = put(tmp_path, method, 3, {"t": nll}, **measured)
            write_table(folder / "layers.csv", [layer(0, "w", 0.1)])
    frame = collect(tmp_path)
    summary = summarize(frame)
    table = comparison(frame)
    assert len(set(zip(table["method"], table["grid"], strict=True))) == 6
    length_one = "per-channel length-one tokens"
    assert list(table["grid"]) == ["per-channel"] * 2 + [length_one] * 2 + ["its own", "its own length-one tokens"]
    pairs = compare_peers(summary, window_losses(frame))
    assert all(pair.first["grid"] == pair.other["grid"] for pair in pairs)
    won = {series for series, _ in winners(pairs)}
    assert won == {"gptq-3-uniform", "gptq-3-length_one"}  # each beats the rtn of its own weights; spqr has no rival
    choices = layer_choices(summary, read_tables(frame, "layers.csv"), "m")
    assert [choice.title for choice in choices] == [
        f"m, 3 bits, {grid}: error of every layer relative to GPTQ's" for grid in ("per-channel", length_one)
    ]
    page = (write_report(tmp_path) / "index.html").read_text()
    assert page.count("length-one tokens") > 6
    published = [{"model": "m", "method": "gptq", "bits": 3, "group_size": None, "text": "t", "protocol": "gptq"}]
    published[0] |= {"outlier_ratio": None}
    beside = [row["series"] for row in summary if comparable(published, row, "t")]
    assert beside == ["gptq-3-uniform"]  # papers calibrate on plain sums over tokens


def test_the_report_has_the_figure_and_its_sentence(reported: Path) -> None:
    folder = reported / "report"
    assert (folder / "energy-opt-13b.png").exists()
    assert (
        "Share of the energy of an input that the largest 1 % of the calibration tokens carry"
        in (folder / "index.html").read_text()
    )
