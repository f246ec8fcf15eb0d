"""Tables from `results/`, and the README's own."""

import json
from pathlib import Path
from typing import Any

import pytest

from analysis.collect import collect
from analysis.tables import comparison, markdown
from tests.conftest import PROJECT


def put(study: Path, name: str, **metrics: object) -> None:
    folder = study / str(metrics["model"]) / name
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))


def run(method: str, bits: int | None = None, ppl: float = 10.0, **more: Any) -> dict[str, Any]:
    quantized = {} if bits is None else {"bits": bits}
    figures = {"ppl/a": ppl, "protocol/a": "gptq", "sha256/a": "1", "bits_per_weight": 3.0 if bits else 16.0}
    base = {"status": "done", "model": "m", "method": method, "layers/mean_relative_error": 0.1}
    return base | quantized | figures | more


def test_full_precision_comes_first_and_failures_are_left_out(tmp_path: Path) -> None:
    put(tmp_path, "a", **run("quantease", 3))
    put(tmp_path, "b", **run("rtn", 3, ppl=12.25))
    put(tmp_path, "c", **run("fp16"))
    put(tmp_path, "d", **run("rtn", 4))
    put(tmp_path, "e", status="failed", model="m", method="gptq", bits=3)
    table = comparison(collect(tmp_path))
    assert list(zip(table["method"], table["bits"], strict=True)) == [
        ("fp16", ""),
        ("rtn", "4"),
        ("rtn", "3"),
        ("quantease", "3"),
    ]
    assert table["a"].tolist() == ["10.00", "10.00", "12.25", "10.00"]
    assert markdown(table).splitlines()[0].startswith("| model")


@pytest.mark.parametrize(("key", "word"), [("protocol/a", "protocols"), ("sha256/a", "texts")])
def test_no_table_mixes_protocols_or_texts(tmp_path: Path, key: str, word: str) -> None:
    put(tmp_path, "a", **run("rtn", 3))
    put(tmp_path, "b", **(run("gptq", 3) | {key: "other"}))
    with pytest.raises(ValueError, match=f"on a mix {word}"):
        collect(tmp_path)


def test_damaged_and_empty_studies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no runs"):
        collect(tmp_path)
    put(tmp_path, "a", **run("rtn", 3))
    (tmp_path / "m" / "a" / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        collect(tmp_path)


def test_the_readmes_table_is_the_committed_studys() -> None:
    table = markdown(comparison(collect(PROJECT / "results" / "tiny")))
    assert table in (PROJECT / "README.md").read_text(encoding="utf-8")


def test_the_methods_separate_on_the_committed_study() -> None:
    rows = collect(PROJECT / "results" / "tiny").to_dict("records")
    for text in ("ppl/stdlib_docs", "ppl/stdlib_source"):
        value = {(row["method"], row["bits"]): row[text] for row in rows}
        for bits in (2, 3):
            assert value["gptq", bits] < value["rtn", bits]
            assert value["quantease", bits] < value["gptq", bits]
        assert value["rtn", 2] > 2 * value["gptq", 2]
        assert value["rtn", 3] > 1.1 * value["gptq", 3]
