"""Runs of one quantization: one row in tables, with the windows of each evaluation."""

import math
from pathlib import Path
from typing import Any

import pytest

from analysis.collect import collect, read_tables
from analysis.evaluations import MORE
from analysis.intervals import window_losses
from analysis.series import summarize
from tests import studies

CODES = {"method": "gptq", "bits": 3, "model": "m", "status": "done", "quantization": "q", "checkpoint/sha256": "c"}
CODES |= {"bits_per_weight": 3.0, "bits_per_parameter": 3.0, "evaluate/seconds": 2.0, "seed": 0}


def text(name: str, ppl: float, protocol: str = "2048") -> dict[str, Any]:
    return {f"ppl/{name}": ppl, f"protocol/{name}": protocol, f"sha256/{name}": name, f"windows/{name}": 2}


def write_run(study: Path, digest: str, measured: dict[str, Any], **labels: Any) -> Path:
    losses = {key.removeprefix("ppl/"): [math.log(ppl)] * 2 for key, ppl in measured.items() if key.startswith("ppl/")}
    names = {"digest": digest, "series": f"s{digest}"}
    folder = studies.write_run(study, f"gptq-3b-{digest}", losses, **(CODES | names | labels | measured))
    studies.write_table(folder / "layers.csv", [{"block": 0, "layer": "q", "relative_error": 0.1}])
    return folder


def test_two_texts_of_one_quantization_are_one_row(tmp_path: Path) -> None:
    first = write_run(tmp_path, "1", text("wikitext2", 7.0))
    second = write_run(tmp_path, "2", text("c4", 9.0) | {"evaluate/peak_memory_gb": 3.0})
    frame = collect(tmp_path)
    assert len(frame) == 1
    row = frame.iloc[0].to_dict()
    assert (row["ppl/wikitext2"], row["ppl/c4"], row["evaluate/seconds"]) == (7.0, 9.0, 4.0)
    assert (row["folder"], row[MORE], row["evaluate/peak_memory_gb"]) == (str(first), [str(second)], 3.0)
    assert len(read_tables(frame, "layers.csv")) == 1
    assert sorted(read_tables(frame, "windows.csv")["text"]) == ["c4", "c4", "wikitext2", "wikitext2"]
    (series,) = summarize(frame)
    assert {name for _, name in window_losses(frame)} == {"c4", "wikitext2"}
    assert series["ppl/c4"] == 9.0


def test_a_text_that_both_have_measured_counts_once(tmp_path: Path) -> None:
    write_run(tmp_path, "1", text("wikitext2", 7.0))
    write_run(tmp_path, "2", text("wikitext2", 7.0) | text("c4", 9.0))
    frame = collect(tmp_path)
    assert len(frame) == 1
    assert sorted(read_tables(frame, "windows.csv")["text"]) == ["c4", "c4", "wikitext2", "wikitext2"]


def test_seeds_that_were_evaluated_alike_are_one_series(tmp_path: Path) -> None:
    for seed in (0, 1):
        for name in ("wikitext2", "c4"):  # the series is that of one evaluation, whatever the seed
            labels = {"seed": seed, "quantization": f"q{seed}", "checkpoint/sha256": f"c{seed}", "series": f"s-{name}"}
            write_run(tmp_path, f"{seed}{name}", text(name, 7.0), **labels)
    (series,) = summarize(collect(tmp_path))
    assert series["seeds"] == 2


@pytest.mark.parametrize(
    "labels",
    [{"quantization": "other"}, {"checkpoint/sha256": "other"}],
    ids=lambda labels: next(iter(labels)),
)
def test_other_codes_are_another_row(tmp_path: Path, labels: dict[str, Any]) -> None:
    write_run(tmp_path, "1", text("wikitext2", 7.0))
    write_run(tmp_path, "2", text("c4", 9.0), **labels)
    assert len(collect(tmp_path)) == 2


def test_another_protocol_is_not_mixed_in(tmp_path: Path) -> None:
    write_run(tmp_path, "1", text("wikitext2", 7.0))
    write_run(tmp_path, "2", text("wikitext2", 6.0, "512"))
    with pytest.raises(ValueError, match="mix protocols"):
        collect(tmp_path)


def test_a_task_that_was_asked_otherwise_is_another_row(tmp_path: Path) -> None:
    asked = {"zero_shot/piqa/acc": 0.5, "zero_shot/piqa/samples": 10}
    write_run(tmp_path, "1", text("wikitext2", 7.0) | asked)
    write_run(tmp_path, "2", text("wikitext2", 7.0) | asked | {"zero_shot/piqa/samples": 20})
    assert len(collect(tmp_path)) == 2
