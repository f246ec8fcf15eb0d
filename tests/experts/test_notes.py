"""Tables say which rows have layers that the method was not given."""

from pathlib import Path

import pytest

from analysis.collect import collect
from analysis.series import summarize
from analysis.tables.comparison import comparison, notes
from analysis.tables.notes import fallback_notes
from runners.results.metrics import fallback_note
from tests.studies import write_run


def _run(study: Path, method: str, **metrics: object) -> None:
    known = {"series": method, "digest": method, "status": "done", "parameters": 10**6, "layers/count": 12}
    measured = {
        "ppl/text": 9.0,
        "protocol/text": "gptq",
        "sha256/text": "ab",
        "windows/text": 4,
        "bits_per_weight": 3.1,
    }
    write_run(study, f"{method}-3b-0", model="toy", method=method, bits=3, seed=0, **known | measured | metrics)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    _run(tmp_path, "gptq", **{"warnings/fallback": 2, "warnings/left_alone": 0, "fallback": "rtn"})
    _run(tmp_path, "awq", **{"warnings/fallback": 3, "warnings/left_alone": 5, "fallback": "keep"})
    _run(tmp_path, "spqr", **{"warnings/left_alone": 4, "calibration": "c4"})  # as older versions wrote it
    _run(tmp_path, "rtn", **{"warnings/fallback": 0, "warnings/left_alone": 4, "fallback": "rtn"})
    return tmp_path


def test_each_row_with_such_layers_is_named(study: Path) -> None:
    found = {note.split(",")[0]: note for note in fallback_notes(summarize(collect(study)))}
    assert found.keys() == {"gptq", "awq", "spqr"}
    assert "2 of 12 layers are rounded to nearest, as calibration reached them too little" in found["gptq"]
    assert "3 of 12 layers keep the weights of the unquantized model" in found["awq"]
    assert "4 of 12 matrices keep" in found["spqr"]
    assert "results of this age" in found["spqr"]
    below = notes(comparison(collect(study)))
    assert [note for note in below if "layers are rounded" in note]


def test_a_run_without_calibration_has_none() -> None:
    assert fallback_note({"method": "rtn", "warnings/left_alone": 4, "layers/count": 9, "calibration": "none"}) is None
    assert fallback_note({"method": "fp16"}) is None
