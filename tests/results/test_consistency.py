"""Results that are older than the seal: their metrics must be those of their tables, and those of the project are."""

import csv
import json
import math
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from runners.results.consistency import contradiction
from runners.results.metrics import METRICS, read
from runners.results.seal import read_run
from runners.run.experiment import run_cell
from tests.conftest import PROJECT, ToySettings

RUNS = sorted(file.parent for file in (PROJECT / "results").glob(f"*/*/*/{METRICS}"))


@pytest.mark.parametrize("study", sorted({folder.parents[1].name for folder in RUNS}))
def test_every_committed_run_agrees_with_its_tables(study: str) -> None:
    runs = [folder for folder in RUNS if folder.parents[1].name == study]
    assert len(runs) > 5
    for folder in runs:
        assert read_run(folder)["method"] == folder.name.split("-")[0]


def test_a_new_run_agrees_with_its_tables(toy_settings: ToySettings) -> None:
    settings = toy_settings("method=gptq")
    run = run_cell(settings)
    assert contradiction(settings.folder, run) is None
    with (settings.folder / "windows.csv").open() as opened:
        losses = [float(row["nll"]) for row in csv.DictReader(opened)]
    assert math.log(run["ppl/wikitext2"]) == pytest.approx(fmean(losses), rel=1e-8)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (source,) = (PROJECT / "results" / "tiny" / "tiny").glob("rtn-3b-653f161fd9")
    return Path(shutil.copytree(source, tmp_path / source.name))


CHANGES: dict[str, tuple[str, float]] = {
    "ppl/stdlib_docs": ("nll", 1 + 1e-6),
    "agreement/stdlib_docs/kl": ("kl", 1.001),
    "agreement/stdlib_source/top1": ("top1", 1.001),
    "layers/mean_relative_error": ("relative_error", 1 + 1e-9),
    "layers/mean_held_out_error": ("held_out_error", 1 + 1e-9),
    "bits_per_weight": ("bits_per_weight", 1 + 1e-9),
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_number_that_is_not_that_of_its_table_is_refused(run: Path, key: str) -> None:
    column, factor = CHANGES[key]
    metrics: dict[str, Any] = json.loads((run / METRICS).read_text())
    (run / METRICS).write_text(json.dumps(metrics | {key: metrics[key] * factor}))
    with pytest.raises(
        ValueError, match=rf"\.csv is damaged \(its {column} comes to .*, and {key} in metrics\.json is"
    ):
        read_run(run)


@pytest.mark.parametrize(("name", "what"), [("windows.csv", "windows of stdlib_source"), ("layers.csv", "23 rows")])
def test_a_missing_row_is_told(run: Path, name: str, what: str) -> None:
    lines = (run / name).read_text().splitlines(keepends=True)
    (run / name).write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match=rf"{name} is damaged \(it has .*{what}|{name} is damaged \(it has 63 {what}"):
        read_run(run)


@pytest.mark.parametrize("name", ["windows.csv", "layers.csv"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"text,window,nll\nstdlib_docs,0\n", b"a,b\n1,2\n", b'"'])
def test_a_table_that_is_none_is_a_sentence(run: Path, name: str, content: bytes) -> None:
    (run / name).write_bytes(content)
    found = contradiction(run, read(run / METRICS))
    assert found is None or found[0] == run / name
