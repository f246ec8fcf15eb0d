"""Rank correlation of layer errors and KL: its value against scipy's, its interval by simulation, its table and figure."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis import correlation
from analysis.collect import collect
from analysis.correlation import correlations, rank_correlation, run_errors
from analysis.figures.error_figures import errors_and_kl
from analysis.figures.points import LeftOut
from analysis.figures.style import METHODS
from analysis.report import write_report
from analysis.series import LAYER_ERRORS, summarize
from analysis.tables.correlations import correlation_latex, correlation_markdown, correlation_words
from runners.results.metrics import HELD_OUT_ERROR, RELATIVE_ERROR, TOKEN_ERROR
from tests.conftest import PROJECT
from tests.studies import write_run

TINY = PROJECT / "results" / "tiny"


def spearman(first: Any, second: Any) -> float:
    found: Any = stats.spearmanr(first, second)
    return float(found.statistic)


def runs(errors: Any, kl: Any, series: Any = None) -> pd.DataFrame:
    return pd.DataFrame({"series": range(len(errors)) if series is None else series, RELATIVE_ERROR: errors, "kl": kl})


def put(study: Path, method: str, bits: int, seed: int, kl: float, **errors: float) -> None:
    measured = {f"layers/mean_{name}_error": value for name, value in errors.items()} | {"agreement/t/kl": kl}
    labels = {"model": "m", "method": method, "bits": bits, "seed": seed, "series": f"{method}{bits}", "ppl/t": 9.0}
    write_run(study, f"{method}-{bits}-{seed}", None, status="done", bits_per_weight=bits, **labels, **measured)


def errors_of(study: Path) -> pd.DataFrame:
    frame = collect(study)
    return run_errors(frame, summarize(frame))


def test_the_value_is_spearmans_with_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correlation, "RESAMPLES", 50)
    generator = np.random.default_rng(0)
    for count in (4, 9, 40):
        error, kl = generator.integers(0, 6, (2, count)).astype(float)
        error[:2], kl[:2] = (0, 1), (3, 2)  # never all the same
        found = rank_correlation(runs(error, kl), RELATIVE_ERROR)
        assert found is not None
        assert found.value == pytest.approx(spearman(error, kl))
        assert (found.runs, found.series) == (count, count)


def test_a_resample_is_the_same_runs_written_several_times() -> None:
    generator = np.random.default_rng(1)
    error, kl = generator.integers(0, 5, (2, 12)).astype(float)
    counts = generator.integers(0, 3, (20, 12)).astype(float)
    counts[0], counts[1] = 0, 0
    counts[0, 3], counts[1, :2] = 12, 6  # one run alone, and two
    error[:2] = 1, 2
    found = correlation._spearman(counts, error, kl)
    assert math.isnan(found[0])
    for row, value in zip(counts[2:].astype(int), found[2:], strict=True):
        assert value == pytest.approx(spearman(np.repeat(error, row), np.repeat(kl, row)))


def test_too_few_runs_and_constant_numbers_have_no_correlation() -> None:
    assert rank_correlation(runs([1, 2, 3], [1, 2, 3]), RELATIVE_ERROR) is None
    assert rank_correlation(runs([1, 1, 1, 1], [1, 2, 3, 4]), RELATIVE_ERROR) is None
    assert rank_correlation(runs([1, 2, 3, 4], [2, 2, 2, 2]), RELATIVE_ERROR) is None
    assert rank_correlation(runs([1, 2, 3, math.nan], [1, 2, 3, 4]), RELATIVE_ERROR) is None
    found = rank_correlation(runs([1, 2, 3, 4], [4, 3, 2, 1]), RELATIVE_ERROR)
    assert found is not None
    assert str(found) == "-1.00"  # four series: no interval


def test_the_interval_holds_the_true_correlation_and_knows_that_seeds_are_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(correlation, "RESAMPLES", 1000)
    generator = np.random.default_rng(2)
    true = 6 / math.pi * math.asin(0.7 / 2)  # Spearman's rho of two normal numbers with Pearson's correlation 0.7
    held, widths = 0, {"series": 0.0, "runs": 0.0}
    for _ in range(100):
        means = generator.multivariate_normal([0, 0], [[1, 0.7], [0.7, 1]], 12)
        error, kl = np.repeat(means, 3, axis=0).T + generator.normal(0, 0.01, (2, 36))
        of_series = rank_correlation(runs(error, kl, np.repeat(np.arange(12), 3)), RELATIVE_ERROR)
        of_runs = rank_correlation(runs(error, kl), RELATIVE_ERROR)
        assert of_series is not None
        assert of_runs is not None
        held += of_series.low <= true <= of_series.high
        widths["series"] += of_series.high - of_series.low
        widths["runs"] += of_runs.high - of_runs.low
    assert held >= 88  # below 95 on average with a probability of 1 in 400
    assert widths["series"] > 1.4 * widths["runs"]  # three times as many runs that tell nothing new


def test_bits_order_all_runs_and_the_rows_within_them_tell_about_methods(tmp_path: Path) -> None:
    for bits, factor in ((4, 1.0), (2, 100.0)):
        for place, method in enumerate(("rtn", "awq", "gptq", "quantease", "quantease_outlier")):
            for seed in range(2):
                low = factor * (
                    1 + place + 0.1 * seed
                )  # the token error orders methods, the relative error misorders them
                put(tmp_path, method, bits, seed, kl=low, relative=factor * 10 - low, token=2 * low)
    write_run(tmp_path, "fp16", None, model="m", method="fp16", status="done", bits_per_weight=16.0)
    table: Any = correlations(errors_of(tmp_path)).set_index(["bits", "error"])
    value = {(bits, error[:5]): row["correlation"] for (bits, error), row in table.iterrows()}
    assert value[4, "relat"] == pytest.approx(-1)
    assert value[2, "token"] == pytest.approx(1)
    overall = table.loc[table.index.get_level_values("bits").isna(), "correlation"]
    assert list(overall) == pytest.approx([0.5, 1.0], abs=0.05)
    assert [set(table[name]) for name in ("series", "runs")] == [{5, 10}, {10, 20}]
    words = correlation_words(table.reset_index())
    assert list(words["bits"]) == ["all", "4", "2"]
    assert list(words.columns[-2:]) == ["relative layer error", "token layer error"]
    assert set(words["token layer error"]) == {"1.00 [1.00, 1.00]"}
    assert list(words["relative layer error"])[1] == "−1.00 [−1.00, −1.00]"
    assert "$-$1.00 [$-$1.00, $-$1.00]" in correlation_latex(words)


def test_errors_that_some_runs_lack_are_counted_and_no_entry_is_nan(tmp_path: Path) -> None:
    for place, method in enumerate(("rtn", "awq", "gptq", "quantease", "spqr")):
        errors = {"relative": 1.0} | ({"held_out": 0.1 * place} if place else {})
        put(tmp_path, method, 3, 0, kl=float(place), **errors)
        put(tmp_path, method, 4, 0, kl=-1.0, relative=place + 2.0)  # a KL of rounding may lie below zero
    found = errors_of(tmp_path)
    words = correlation_words(correlations(found))
    # relative errors at 3 bits are all the same, and so are the KLs at 4 bits; spqr has a grid of its own
    assert words[["bits", "group size", "runs", "series"]].to_numpy().tolist() == [["all", "all", "4–10", "4–10"]]
    assert "nan" not in correlation_markdown(words).lower()
    figure = errors_and_kl(summarize(collect(tmp_path)), found, "m")
    assert "ρ" in figure.axes[0].get_title()


def test_series_of_the_same_weights_count_once(tmp_path: Path) -> None:
    for name, weights in (("rtn", "1"), ("rtn_again", "1"), ("gptq", "2"), ("awq", None), ("spqr", None)):
        measured = {"agreement/t/kl": 0.1, "ppl/t": 9.0} | ({"checkpoint/sha256": weights} if weights else {})
        labels = {"status": "done", "model": "m", "method": name.split("_")[0], "bits": 3, "bits_per_weight": 3.0}
        write_run(tmp_path, name, None, series=name, **labels, **measured)
    assert sorted(errors_of(tmp_path)["series"]) == ["awq", "gptq", "rtn", "spqr"]


def test_the_figure_has_a_panel_per_error_and_every_run_in_its_color(study: Path) -> None:
    frame = collect(study)
    summary = summarize(frame)
    figure = errors_and_kl(summary, run_errors(frame, summary), "opt-13b")
    assert [axis.get_xlabel().split(",")[0] for axis in figure.axes] == [
        f"{name} layer error" for name in ("relative", "held-out", "token")
    ]
    axis = figure.axes[2]
    assert axis.get_xscale() == axis.get_yscale() == "log"
    assert axis.get_title() == "opt-13b: ρ = 1.00 [1.00, 1.00], 16 runs"
    drawn: list[Any] = [line for line in axis.lines if line.get_color() == METHODS["gptq"][0]]
    assert sorted(line.get_marker() for line in drawn) == ["^", "^", "o", "o"]
    assert sorted(float(np.asarray(line.get_xdata())[0]) for line in drawn) == pytest.approx(
        sorted([0.15 / 12] * 2 + [0.15 * 2.5 / 12] * 2)
    )


def test_fewer_than_four_runs_are_left_out_with_a_reason(tmp_path: Path) -> None:
    for seed in range(3):
        put(tmp_path, "rtn", 3, seed, kl=1.0 + seed, relative=1.0 + seed)
    with pytest.raises(LeftOut, match=r"of 3 quantized runs of m is known, and it needs 4\."):
        errors_and_kl(summarize(collect(tmp_path)), errors_of(tmp_path), "m")
    folder = write_report(tmp_path)
    assert not list(folder.glob("correlation*"))
    assert "of 3 quantized runs of m is known" in (folder / "index.html").read_text()


def test_the_report_shows_the_table_on_its_page_and_in_three_files(reported: Path) -> None:
    folder = reported / "report"
    page = (folder / "index.html").read_text()
    assert "Rank correlation of layer errors with the KL divergence" in page
    assert page.count('href="correlation.') == 3
    assert "errors-opt-13b.png" in page
    table = pd.read_csv(folder / "correlation.csv")
    assert set(table["error"]) == {"relative layer error", "held-out layer error", "token layer error"}
    assert all(map(math.isfinite, table["correlation"]))
    assert "Near 0: the layer error does not order the runs" in (folder / "correlation.md").read_text()
    assert "\\rho" in (folder / "correlation.tex").read_text()


def test_the_committed_correlations_are_those_of_the_committed_runs() -> None:
    frame = collect(TINY, {"bits": "3"})
    at_3_bits = frame.loc[frame["group_size"].isna() & ~frame["method"].isin(["fp16", "spqr", "spqr_1pct"])]
    table = pd.read_csv(TINY / "report" / "correlation.csv")
    table = table.loc[(table["text"] == "stdlib_docs") & (table["bits"] == 3) & (table["group"] == "per-channel")]
    for key in (RELATIVE_ERROR, HELD_OUT_ERROR):
        wanted = spearman(at_3_bits[key], at_3_bits["agreement/stdlib_docs/kl"])
        chosen = table.loc[table["error"] == LAYER_ERRORS[key], "correlation"]
        assert list(chosen) == [pytest.approx(wanted, abs=1e-4)]
    with_token_error = set(frame.loc[frame[TOKEN_ERROR].notna(), "method"])
    assert not with_token_error & {"rtn", "gptq", "quantease"}  # runs that are older
