"""Audits side by side: on made-up audits whose sums, order and worst layers are known."""

from pathlib import Path

import pandas as pd
import pytest

from analysis import audit
from analysis.audit import compared, default_folder, error_correlations, read_audits, single_layers, whole_and_sum
from analysis.figures.audit_figures import against_base
from analysis.figures.points import LeftOut
from analysis.figures.style import png
from runners.errors import InputError

KINDS = ("attn.q_proj", "fc1")
BLOCKS = 3


def write_audit(file: Path, scale: float, worst: float, windows: int = 8) -> None:
    """An audit of two kinds of layers in three blocks: KL grows with the block, and `fc1` of the last costs `worst`."""
    kl = {(block, kind): scale * (1 + block + 10 * (kind == "fc1")) / 1000 for block in range(BLOCKS) for kind in KINDS}
    kl[BLOCKS - 1, "fc1"] = worst
    facts = {"text": "wikitext2", "windows": windows, "length": 2048}
    tokens = {"kl_p99": 0.1, "share_top_percent": 0.2, "kl_first_positions": 0.3, "kl_rest": 0.01}
    rows = [
        {"block": None, "layer": "none", "kl": 0.0, "ppl": 20.0},
        {"block": None, "layer": "all", "kl": 2 * sum(kl.values()), "ppl": 30.0},
        # A whole block, which is no layer.
        {"block": 0, "layer": "all", "kl": 5.0, "ppl": 99.0},
    ]
    for (block, kind), value in kl.items():
        errors = {"relative_error": 1 / (block + 1), "held_out_error": value, "energy_top_percent": block / BLOCKS}
        rows.append({"block": block, "layer": kind, "kl": value, "ppl": 20 + value} | errors)
    file.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame([row | tokens | facts for row in rows]).to_csv(file, index=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_audit(tmp_path / "gptq.csv", scale=0.5, worst=0.2)
    write_audit(tmp_path / "rtn.csv", scale=1.0, worst=0.013)
    return tmp_path


def test_rounding_comes_first_and_single_layers_are_told_from_blocks(folder: Path) -> None:
    frame = read_audits(folder)
    assert list(frame["run"].unique()) == ["rtn", "gptq"]
    layers = single_layers(frame)
    assert len(layers) == 2 * BLOCKS * len(KINDS)
    assert set(layers["layer"]) == set(KINDS)
    assert "int" in str(layers.dtypes["block"])


def test_the_sum_of_the_layers_beside_the_whole(folder: Path) -> None:
    table = whole_and_sum(read_audits(folder)).set_index("run")
    assert table.loc["gptq", "sum of layers alone"] == pytest.approx(0.5 * (1 + 2 + 3 + 11 + 12) / 1000 + 0.2)
    assert list(table["sum / whole"]) == pytest.approx([0.5, 0.5])
    assert list(table["ppl"]) == [30, 30]
    assert "layers restored" not in table
    frame = read_audits(folder)
    frame["kl_restored"] = 0.01  # of every layer, where the whole model has 0.434
    table = whole_and_sum(frame).set_index("run")
    assert table.loc["gptq", "layers restored"] == pytest.approx(6 * (2 * (0.0145 + 0.2) - 0.01))


def test_the_layers_that_cost_more_come_first(folder: Path) -> None:
    pairs = compared(read_audits(folder), "rtn", "gptq")
    first = pairs.iloc[0]
    assert (first["block"], first["layer"]) == (2, "fc1")
    assert first["difference"] == pytest.approx(0.2 - 0.013)
    assert [value > 0 for value in pairs["difference"]] == [True] + [False] * 5
    assert first["energy_top_percent"] == pytest.approx(2 / 3)


def test_correlation_of_errors_with_the_cost(folder: Path) -> None:
    table = error_correlations(read_audits(folder)).set_index("run")
    assert list(table["held-out error"]) == pytest.approx([1, 1])
    assert list(table["relative error, in its kind"]) == pytest.approx([-1, -1])  # made to fall where the cost grows
    # Over all layers too: RTN's costs have the ranks 1, 2, 3, 4, 5, 6 where the errors have 5.5, 3.5, 1.5, 5.5, 3.5, 1.5.
    assert table.loc["rtn", "relative error"] == pytest.approx(-0.478, abs=1e-3)
    assert "token error" not in table


def test_the_picture(folder: Path) -> None:
    figure = against_base(read_audits(folder), "rtn")
    (axis,) = figure.axes
    assert [text.get_text().strip() for text in axis.texts] == ["2 fc1"]
    assert png(figure)[:4] == b"\x89PNG"
    assert {"0.001", "0.01"} <= {label.get_text() for label in axis.get_yticklabels()}
    (folder / "gptq.csv").unlink()
    with pytest.raises(LeftOut, match="no run to compare with rtn"):
        against_base(read_audits(folder), "rtn")


def test_what_is_not_comparable_is_refused(folder: Path, tmp_path: Path) -> None:
    write_audit(folder / "quantease.csv", scale=0.4, worst=0.01, windows=4)
    with pytest.raises(InputError, match="one is of wikitext2 8 2048, one of wikitext2 4 2048"):
        read_audits(folder)
    (folder / "quantease.csv").write_text("block,layer\n0,fc1\n")
    with pytest.raises(InputError, match=r"quantease.csv is no audit, it has no column kl"):
        read_audits(folder)
    (folder / "quantease.csv").write_text("")
    with pytest.raises(InputError, match=r"quantease.csv is damaged"):
        read_audits(folder)
    with pytest.raises(InputError, match="there is no audit in"):
        read_audits(tmp_path / "nothing")


def test_the_folder_that_is_read(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUDIT_FOLDER", str(folder))
    assert default_folder() == folder
    monkeypatch.delenv("AUDIT_FOLDER")
    monkeypatch.setattr(audit, "ROOT", tmp_path)
    monkeypatch.setattr(audit, "FIRST", tmp_path / "results" / "smollm2" / "audit")
    with pytest.raises(InputError, match="there is no audit: write some with"):
        default_folder()
    write_audit(tmp_path / "results" / "tiny" / "audit" / "rtn.csv", 1, 1)
    assert default_folder().parent.name == "tiny"
    write_audit(tmp_path / "results" / "smollm2" / "audit" / "rtn.csv", 1, 1)
    assert default_folder().parent.name == "smollm2"
