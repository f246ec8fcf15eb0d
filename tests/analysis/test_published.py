"""The published numbers: their files against a second listing, and the results that each may be compared with."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis.published import COLUMNS, PUBLISHED, comparable, published_numbers

README = {  # of linkedin/QuantEase: full precision, 4 bits, 3 bits, 3 bits with 1 % structured and unstructured outliers
    "opt-1.3b": "14.62 15.28 21.30 18.51 16.25",
    "opt-13b": "10.13 10.32 12.41 12.07 10.37",
    "bloom-1b7": "15.39 16.11 20.03 18.89 17.06",
    "bloom-7b1": "11.37 11.69 13.43 12.97 12.03",
    "falcon-7b": "6.59 6.92 8.83 8.56 7.14",
    "falcon-40b": "5.23 5.46 6.20 5.99 5.51",
}
PAPER = {  # of GPTQ: full precision, RTN and GPTQ at 4 bits, RTN and GPTQ at 3 bits
    "opt-125m": "27.65 37.28 31.12 1.3e3 53.85",
    "opt-350m": "22.00 25.94 24.24 64.57 33.79",
    "opt-1.3b": "14.63 48.17 15.47 1.3e4 20.97",
    "opt-2.7b": "12.47 16.92 12.87 1.6e4 16.88",
    "opt-6.7b": "10.86 12.10 11.39 5.8e3 14.86",
    "opt-13b": "10.13 11.32 10.31 3.4e3 11.61",
    "opt-30b": "9.56 10.98 9.63 1.6e3 10.27",
    "opt-66b": "9.34 110 9.55 6.1e3 14.16",
    "bloom-560m": "22.42 25.90 24.03 57.08 32.31",
    "bloom-1b1": "17.69 22.00 19.05 50.19 25.08",
    "bloom-1b7": "15.39 16.97 16.48 63.59 21.11",
    "bloom-3b": "13.48 14.76 14.20 39.36 17.40",
    "bloom-7b1": "11.37 12.10 11.73 17.38 13.47",
}
ORDERS = {
    "quantease": [
        ("fp16", 0),
        ("quantease", 4),
        ("quantease", 3),
        ("quantease_structured", 3),
        ("quantease_outlier", 3),
    ],
    "gptq": [("fp16", 0), ("rtn", 4), ("gptq", 4), ("rtn", 3), ("gptq", 3)],
}


@pytest.mark.parametrize(("name", "listing"), [("quantease", README), ("gptq", PAPER)])
def test_the_files_agree_with_a_second_listing(name: str, listing: dict[str, str]) -> None:
    table = pd.read_csv(PUBLISHED / f"{name}.csv", dtype={"perplexity": str})
    assert list(table.columns) == COLUMNS
    found = {
        (row["model"], row["method"], 0 if pd.isna(row["bits"]) else row["bits"]): row["perplexity"]
        for row in table.to_dict("records")
    }
    asked = {
        (model, *cell): number
        for model, numbers in listing.items()
        for cell, number in zip(ORDERS[name], numbers.split(), strict=True)
    }
    assert len(table) == len(asked)
    assert found == asked


def test_every_number_names_its_source() -> None:
    for row in published_numbers():
        assert row["url"].startswith("https://")
        assert row["where"]
        assert (row["text"], row["protocol"]) == ("wikitext2", "gptq")
        assert row["group_size"] != row["group_size"]  # none: per-channel


def ours(**changes: Any) -> dict[str, Any]:
    row = {"model": "opt-1.3b", "method": "gptq", "label": "gptq", "bits": 3, "grid": "per-channel"}
    return row | {"protocol/wikitext2": "gptq", "outlier_ratio": 0.0} | changes


def numbers(row: dict[str, Any], text: str = "wikitext2") -> list[str]:
    return [number["perplexity"] for number in comparable(published_numbers(), row, text)]


def test_a_number_is_compared_with_the_same_method_model_grid_and_protocol_only() -> None:
    assert numbers(ours()) == ["20.97"]
    assert numbers(ours(method="fp16", label="fp16", bits=None, grid="")) == ["14.63", "14.62"]
    bf16 = {"method": "fp16", "label": "bf16", "model_dtype": "bfloat16", "bits": None, "grid": ""}
    assert numbers(ours(**bf16)) == ["14.63", "14.62"]
    structured = {"method": "quantease_structured", "label": "quantease_structured"}
    assert numbers(ours(**structured, outlier_ratio=20 / 2048)) == ["18.51"]
    for change in (
        {"model": "opt-30m"},
        {"bits": 2},
        {"grid": "group 64"},
        {"grid": "per-channel act-order"},
        {"protocol/wikitext2": "gptq-new"},
        {"label": "gptq damping=0.1"},
        structured | {"outlier_ratio": 0.02},
    ):
        assert numbers(ours(**change)) == [], change
    assert numbers(ours(**{"protocol/c4": "gptq"}), "c4") == []


def test_a_file_without_a_column_is_refused(tmp_path: Path) -> None:
    assert published_numbers(tmp_path / "absent") == []
    (tmp_path / "x.csv").write_text("source,model\na,b\n")
    with pytest.raises(ValueError, match="has no column where, method"):
        published_numbers(tmp_path)
