"""Tables from `results/`, and the README's own."""

import json
from itertools import product, takewhile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis.__main__ import main
from analysis.collect import collect
from analysis.figures.style import METHODS, looks
from analysis.series import summarize
from analysis.tables.comparison import comparison, markdown
from runners.config.command_line import check
from tests.conftest import PROJECT

FAILED = {"status": "failed", "model": "m", "method": "gptq", "bits": 3, "stage": "quantize", "error": "ValueError: no"}


def put(study: Path, name: str, **metrics: object) -> None:
    folder = study / str(metrics["model"]) / name
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))


def run(method: str, bits: int | None = None, ppl: float = 10.0, **more: Any) -> dict[str, Any]:
    quantized = {} if bits is None else {"bits": bits}
    measured = {
        "ppl/a": ppl,
        "protocol/a": "gptq",
        "windows/a": 1,
        "sha256/a": "1",
        "bits_per_weight": 3.0 if bits else 16.0,
    }
    base = {"status": "done", "model": "m", "method": method, "layers/mean_relative_error": 0.1}
    return base | quantized | measured | more


def test_full_precision_comes_first_and_failures_are_left_out(tmp_path: Path) -> None:
    put(tmp_path, "a", **run("quantease", 3))
    put(tmp_path, "b", **run("rtn", 3, ppl=12.25))
    put(tmp_path, "c", **run("fp16"))
    put(tmp_path, "d", **run("rtn", 4))
    put(tmp_path, "e", **FAILED)
    table = comparison(collect(tmp_path))
    assert list(zip(table["method"], table["bits"], strict=True)) == [
        ("fp16", ""),
        ("rtn", "4"),
        ("rtn", "3"),
        ("quantease", "3"),
    ]
    assert table["a"].tolist() == ["10.00", "10.00", "12.25", "10.00"]
    assert markdown(table).splitlines()[0].startswith("| model")


def test_full_precision_has_the_name_of_its_dtype(tmp_path: Path) -> None:
    put(tmp_path, "a", **run("rtn", 3))
    put(tmp_path, "b", **run("fp16", ppl=9.0, series="1", model_dtype="bfloat16"))
    put(tmp_path, "c", **run("fp16", ppl=8.0, series="2", model_dtype="float32"))
    frame = collect(tmp_path)
    table = comparison(frame)
    assert list(zip(table["method"], table["bits"], table["a"], strict=True)) == [
        ("bf16", "", "9.00"),
        ("fp32", "", "8.00"),
        ("rtn", "3", "10.00"),
    ]
    summary = summarize(frame)
    look = looks(summary)
    assert look["bf16"] == look["fp32"] == METHODS["fp16"]
    assert {row["method"] for row in summary} == {"fp16", "rtn"}


@pytest.mark.parametrize(
    ("setting", "others", "name"),
    [
        ("float32", None, "fp32"),
        ("null", "null", "bf16"),
        ("null", "float32", "fp16"),
        ("null", None, "fp16"),
        (None, "null", "fp16"),
    ],
    ids=["set", "as a younger run of the same setting", "another setting", "nobody knows", "no settings"],
)
def test_the_dtype_of_an_older_full_precision_is_that_of_its_settings_or_of_a_younger_run(
    tmp_path: Path, setting: str | None, others: str | None, name: str
) -> None:
    put(tmp_path, "a", **run("fp16", model_path="7"))
    put(tmp_path, "b", **run("rtn", 3, model_path="7", model_dtype="bfloat16"))
    put(tmp_path, "c", **run("rtn", 4, model_path="8", model_dtype="float16"))
    for folder, dtype in {"a": setting, "b": others, "c": setting}.items():
        if dtype is not None:
            (tmp_path / "m" / folder / "config.yaml").write_text(f"model:\n  dtype: {dtype}\n")
    assert comparison(collect(tmp_path))["method"].iloc[0] == name


@pytest.mark.parametrize(("key", "word"), [("protocol/a", "protocols"), ("sha256/a", "texts")])
def test_no_table_mixes_protocols_or_texts(tmp_path: Path, key: str, word: str) -> None:
    put(tmp_path, "a", **run("rtn", 3))
    put(tmp_path, "b", **(run("gptq", 3) | {key: "other"}))
    with pytest.raises(ValueError, match=f"on a mix {word}"):
        collect(tmp_path)


def test_no_table_mixes_what_the_layers_were_calibrated_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "a", **run("rtn", 3))  # older runs do not say
    put(tmp_path, "b", **run("gptq", 3, calibration_inputs="quantized"))
    put(tmp_path, "c", **run("fp16"))
    assert len(collect(tmp_path)) == 3
    put(tmp_path, "d", **run("awq", 3, calibration_inputs="full_precision"))
    with pytest.raises(ValueError, match="Choose by calibration_inputs=full_precision or calibration_inputs=quantized"):
        collect(tmp_path)
    main([str(tmp_path), "calibration_inputs=quantized"])
    table = capsys.readouterr().out
    assert "gptq" in table
    assert "rtn" in table
    assert "fp16" in table
    assert "awq" not in table


def test_held_out_layer_error_is_shown_after_that_on_the_calibration_data(tmp_path: Path) -> None:
    put(tmp_path, "a", **run("rtn", 3, **{"layers/mean_held_out_error": 0.125}))
    put(tmp_path, "b", **run("gptq", 3, seed=0, series="s"))
    put(tmp_path, "c", **run("gptq", 3, seed=1, series="s"))
    table = comparison(collect(tmp_path))
    assert list(table.columns[-3:]) == ["relative layer error", "held-out layer error", "seeds"]
    assert table["held-out layer error"].tolist() == ["0.1250", ""]


def test_seeds_of_a_series_become_one_row_with_mean_and_spread(tmp_path: Path) -> None:
    for seed, ppl in enumerate((10.0, 11.0, 12.0)):
        put(tmp_path, f"a{seed}", **run("gptq", 3, ppl, seed=seed, series="1"))
    put(tmp_path, "b", **run("gptq", 3, 9.0, seed=0, series="2", group_size=64))
    put(tmp_path, "c", **run("fp16", series="3"))
    table = comparison(collect(tmp_path))
    assert table["grid"].tolist() == ["", "per-channel", "group 64"]
    assert table["a"].tolist() == ["10.00", "11.00 ± 1.00", "9.00"]  # the standard deviation of 10, 11, 12 is 1
    assert table["seeds"].tolist() == ["1", "3", "1"]


def test_raised_damping_is_marked_and_explained(tmp_path: Path) -> None:
    put(tmp_path, "a", **run("gptq", 3, **{"warnings/damping_raised": 2}))
    put(tmp_path, "b", **run("rtn", 3, **{"warnings/damping_raised": 0}))
    table = comparison(collect(tmp_path))
    assert table["method"].tolist() == ["rtn", "gptq †"]
    assert "† damping was raised" in markdown(table)
    assert "†" not in markdown(table.iloc[:1])


def test_a_table_may_show_some_runs_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "a", **run("rtn", 3, group_size=64))
    put(tmp_path, "b", **run("gptq", 3))
    put(tmp_path, "c", **run("rtn", 4))
    put(tmp_path, "d", **run("fp16"))
    for condition, methods in {
        "bits=3": "fp16 gptq rtn",
        "group_size=null": "fp16 rtn gptq",
        "method=rtn": "fp16 rtn rtn",
    }.items():
        main([str(tmp_path), condition])
        rows = capsys.readouterr().out.splitlines()[2:]
        assert " ".join(word for row in rows for word in row.split() if word in methods.split()) == methods
    for wrong, sentence in {
        "bits=5": "no run has bits=5: there are 3, 4, null",
        "bit=3": "the runs have no bit: they",
    }.items():
        with pytest.raises(SystemExit):
            main([str(tmp_path), wrong])
        assert sentence in capsys.readouterr().err


def test_runs_that_are_not_done_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "a", **FAILED)
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "no run is done: there are 1 failed" in capsys.readouterr().err
    put(tmp_path, "b", **run("rtn", 3))
    main([str(tmp_path)])
    assert "Of 2 runs: 1 failed, 1 done" in capsys.readouterr().out.replace("1 done, 1 failed", "1 failed, 1 done")


def test_damaged_and_empty_studies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no runs"):
        collect(tmp_path)
    put(tmp_path, "a", **run("rtn", 3))
    (tmp_path / "m" / "a" / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        collect(tmp_path)


def test_the_readmes_table_is_of_the_committed_study() -> None:
    table = comparison(collect(PROJECT / "results" / "tiny", {"bits": "3"}))
    printed = _cells(markdown(table.drop(columns="token layer error")))  # the newest runs alone have it
    readme = _cells((PROJECT / "README.md").read_text(encoding="utf-8"))
    start = readme.index(printed[0])
    rows = list(takewhile(bool, readme[start + 2 :]))
    assert len(rows) == 7
    assert all(row in printed[2:] for row in rows)


def _cells(text: str) -> list[list[str]]:
    """The cells of the lines of a Markdown table, without what pads them; [] for every other line."""
    lines = text.splitlines()
    return [[cell.strip() for cell in line.split("|")] if line.startswith("|") else [] for line in lines]


@pytest.fixture(scope="module")
def study() -> pd.DataFrame:
    frame = collect(PROJECT / "results" / "tiny")
    return frame.loc[frame["status"] == "done"]


def test_the_committed_study_is_whole(study: pd.DataFrame) -> None:
    asked = {
        (cell.run.method.name, cell.run.bits, cell.run.group_size or 0, cell.run.seed)
        if cell.run.quantizes
        else ("fp16", 0, 0, 0)
        for cell in check(["experiment=tiny"], multirun=True)
    }
    uniform = study.loc[study["token_weights"].fillna("uniform") == "uniform"]
    cells = list(uniform[["method", "bits", "group_size", "seed"]].fillna(0).itertuples(index=False, name=None))
    assert len(cells) == len(set(cells))
    assert asked <= set(cells)
    comparators = {
        cell for cell in set(cells) - asked if cell[1] == 3
    }  # those of 3 bits that the experiment's head names
    assert set(cells) - asked == comparators
    methods = {cell[0] for cell in comparators}
    assert comparators == set(product(methods, [3.0], [0.0, 64.0], [0.0, 1.0, 2.0]))


@pytest.mark.parametrize("text", ["ppl/stdlib_docs", "ppl/stdlib_source"])
def test_the_methods_separate_on_the_committed_study(study: pd.DataFrame, text: str) -> None:
    per_channel = study.loc[study["group_size"].isna()]
    value = per_channel.groupby(["method", "bits"])[text].mean().to_dict()
    for bits in (2, 3):
        assert value["gptq", bits] < value["rtn", bits]
        assert value["quantease", bits] < value["gptq", bits]
    assert value["rtn", 2] > 2 * value["gptq", 2]
    assert value["rtn", 3] > 1.1 * value["gptq", 3]
