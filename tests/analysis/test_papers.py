"""Tables in the form of the papers: their order, their entries, and that all formats agree."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from analysis.collect import collect
from analysis.intervals import compare_peers, window_losses, winners
from analysis.published import published_numbers
from analysis.report import write_report
from analysis.series import Row, summarize
from analysis.tables.comparison import comparison_of
from analysis.tables.comparison import markdown as comparison_markdown
from analysis.tables.latex import escape, latex
from analysis.tables.papers import PaperTable, markdown, paper_table, table_metrics
from tests.studies import write_run


@pytest.fixture(scope="module")
def perplexity(study: Path, summary: list[Row]) -> PaperTable:
    bold = winners(compare_peers(summary, window_losses(collect(study))))
    return paper_table(summary, table_metrics(summary)[0], bold, published_numbers())


def test_there_is_one_table_per_text_and_task(summary: list[Row]) -> None:
    assert [metric.key for metric in table_metrics(summary)] == [
        "ppl/wikitext2",
        "zero_shot/piqa/acc",
        "agreement/wikitext2/kl",
        "agreement/wikitext2/top1",
    ]


def test_models_are_ordered_by_family_and_size_and_full_precision_is_first(perplexity: PaperTable) -> None:
    header, _, *rows = markdown(perplexity).split("\n\n")[1].splitlines()
    assert [name.strip() for name in header.split("|")[5:-1]] == ["bloom-560m", "opt-125m", "opt-1.3b", "opt-13b"]
    lines = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [(line[0], line[1]) for line in lines[:3]] == [("fp16", ""), ("rtn", "4"), ("gptq", "4")]
    assert lines[-1][:4] == ["quantease_outlier", "3", "per-channel", "3.01"]


def test_an_entry_is_the_mean_of_its_runs_with_the_published_number(study: Path, perplexity: PaperTable) -> None:
    (entry,) = [
        entry
        for entry in perplexity.entries
        if (entry["model"], entry["method"], entry["bits"]) == ("opt-1.3b", "gptq", 3)
    ]
    values = [
        json.loads((study / run / "metrics.json").read_text())["ppl/wikitext2"] for run in entry["runs"].split("; ")
    ]
    assert len(values) == 2
    assert entry["value"] == pytest.approx(sum(values) / 2)
    assert entry["published"] == "20.97"
    assert float(entry["difference"].replace("−", "-")) == pytest.approx(entry["value"] - 20.97, abs=0.005)
    assert f"{entry['value']:.2f} ± {entry['sd']:.2f} (20.97ᵃ {entry['difference']})" in markdown(perplexity)
    assert "ᵃ published: GPTQ paper, WikiText-2 perplexities, https://arxiv.org/abs/2210.17323" in markdown(perplexity)


def test_published_numbers_of_two_sources_are_both_shown(perplexity: PaperTable) -> None:
    (entry,) = [entry for entry in perplexity.entries if (entry["model"], entry["method"]) == ("opt-1.3b", "fp16")]
    assert entry["published"] == "14.63; 14.62"
    assert re.fullmatch(r"14\.63ᵃ \+\d+\.\d\d; 14\.62ᵇ \+\d+\.\d\d", entry["beside"])


def test_bold_is_the_same_in_every_format(perplexity: PaperTable) -> None:
    winning = [entry for entry in perplexity.entries if entry["bold"]]
    assert {entry["method"] for entry in winning} == {"quantease_outlier"}
    for entry in winning:
        assert f"**{entry['printed']}**" in markdown(perplexity)
        assert f"\\textbf{{{escape(entry['printed'])}}}" in latex(perplexity)


def test_latex_is_complete_and_plain(perplexity: PaperTable) -> None:
    text = latex(perplexity)
    body = text.split("\\midrule\n")[1].split("\\bottomrule")[0].splitlines()
    assert len(body) == 9
    assert {line.count("&") - line.count("\\&") for line in body} == {7}
    assert text.count("{") - text.count("\\{") == text.count("}") - text.count("\\}")
    assert "quantease\\_outlier" in text
    assert not set("±−–ᵃᵇ†") & set(text)
    assert re.findall(r"\\(toprule|midrule|bottomrule)", text) == ["toprule", "midrule", "bottomrule"]
    assert escape("50% of a_b & $5") == r"50\% of a\_b \& \$5"


def test_a_model_without_a_run_has_an_empty_entry_and_shares_are_in_per_cent(tmp_path: Path) -> None:
    base: dict[str, Any] = {"status": "done", "parameters": 1000, "bits_per_weight": 3.0, "bits": 3}
    write_run(tmp_path, "a", model="a-1b", method="rtn", **base | {"agreement/t/top1": 0.875})
    write_run(tmp_path, "b", model="b-1b", method="gptq", **base | {"agreement/t/top1": 0.9})
    summary = summarize(collect(tmp_path))
    table = paper_table(summary, table_metrics(summary)[0], set(), [])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown(table).splitlines()[4:6]]
    assert rows == [["rtn", "3", "per-channel", "3.00", "87.50", ""], ["gptq", "3", "per-channel", "3.00", "", "90.00"]]


def test_series_of_one_entry_are_told_apart_by_their_settings(tmp_path: Path) -> None:
    for sweeps in (10, 30):
        base = {"status": "done", "bits_per_weight": 3.0, "bits": 3, "series": f"s{sweeps}", "ppl/t": 9.0}
        folder = write_run(tmp_path, f"q{sweeps}", model="m", method="quantease", **base)
        (folder / "config.yaml").write_text(
            f"method:\n  solver:\n    sweeps: {sweeps}\n    damping: 0\nseed: {sweeps}\n"
        )
    summary = summarize(collect(tmp_path))
    assert [row["label"] for row in summary] == ["quantease sweeps=10", "quantease sweeps=30"]
    assert len(markdown(paper_table(summary, table_metrics(summary)[0], set(), [])).splitlines()) == 6


def test_what_must_be_said_with_a_models_numbers_is_said_below_them(tmp_path: Path) -> None:
    labels = {"status": "done", "model": "m", "bits_per_weight": 3.0, "ppl/t": 9.0, "model_note": "it was in 4 bits"}
    write_run(tmp_path, "a", method="gptq", bits=3, **labels, **{"agreement/t/kl": 0.2, "agreement/t/top1": 0.9})
    write_run(
        tmp_path, "b", method="fp16", **labels, **{"agreement/t/kl_floor": 1.2e-5, "agreement/t/top1_floor": 0.99}
    )
    summary = summarize(collect(tmp_path))
    tables = [paper_table(summary, metric, set(), []) for metric in table_metrics(summary)]
    floor, note = "Noise floor, below which a difference is none: m 1.2e-05", "m: it was in 4 bits"
    assert {table.metric.key: table.notes for table in tables} == {
        "ppl/t": [note],
        "agreement/t/kl": [floor, note],
        "agreement/t/top1": [note],
    }
    assert escape(note) in latex(tables[0])
    assert note in comparison_markdown(comparison_of(summary, set()))


def test_what_stores_far_more_than_its_bits_is_marked_in_every_format(tmp_path: Path) -> None:
    labels = {"status": "done", "model": "m", "bits": 2, "ppl/t": 9.0, "protocol/t": "gptq", "windows/t": 1}
    write_run(tmp_path, "a", method="spqr", bits_per_weight=9.08, **labels)
    write_run(tmp_path, "b", method="gptq", bits_per_weight=2.07, **labels)
    summary = summarize(collect(tmp_path))
    table = paper_table(summary, table_metrics(summary)[0], set(), [])
    note = "‡ stores over 1 bit per weight more than its bits"
    for text in (markdown(table), comparison_markdown(comparison_of(summary, set()))):
        marked = [line for line in text.splitlines() if "‡ 9.08" in line]
        assert [line.count("spqr") for line in marked] == [1]
        assert text.count("‡") == 2
        assert note in text
    assert latex(table).count(r"$\ddagger$ 9.08") == 1
    assert latex(table).count(r"$\ddagger$") == 2  # the row and the caption


def test_what_was_calibrated_on_is_said_below_perplexities_alone(tmp_path: Path) -> None:
    note = "t is what was calibrated on: perplexity and agreement there are too good"
    measured = {"ppl/t": 9.0, "protocol/t": "gptq", "windows/t": 1, "zero_shot/piqa/acc": 0.7, "agreement/t/kl": 0.1}
    labels = {"status": "done", "model": "m", "bits": 3, "bits_per_weight": 3.0, **measured}
    write_run(tmp_path, "a", method="gptq", calibration_note=note, **labels)
    write_run(tmp_path, "b", method="rtn", **labels)
    summary = summarize(collect(tmp_path))
    notes = {metric.key: paper_table(summary, metric, set(), []).notes for metric in table_metrics(summary)}
    said = f"gptq: {note}"
    assert notes == {"ppl/t": [said], "zero_shot/piqa/acc": [], "agreement/t/kl": [said]}
    assert said in comparison_markdown(comparison_of(summary, set()))
    assert said in (write_report(tmp_path) / "index.html").read_text()


def test_where_bos_was_in_calibration_is_said_where_it_differs(tmp_path: Path) -> None:
    labels = {"status": "done", "model": "m", "bits": 3, "bits_per_weight": 3.0, "ppl/t": 9.0}
    labels |= {"protocol/t": "gptq", "windows/t": 1}
    write_run(tmp_path, "a", method="gptq", **labels, **{"calibration/bos": "text"})
    write_run(tmp_path, "b", method="awq", **labels, **{"calibration/bos": "text"})
    alike = summarize(collect(tmp_path))
    assert "calibration.bos" not in comparison_of(alike, set())
    write_run(tmp_path, "c", method="quantease", **labels, **{"calibration/bos": "window"})
    summary = summarize(collect(tmp_path))
    assert comparison_of(summary, set())["calibration.bos"].tolist() == ["text", "text", "window"]
    said = "BOS in the calibration sequences (calibration.bos): text for awq, gptq; window for quantease"
    assert paper_table(summary, table_metrics(summary)[0], set(), []).notes == [said]
    assert paper_table(alike, table_metrics(alike)[0], set(), []).notes == []
