"""The schema of results: its words, and the validator, which refuses what either of its two predecessors refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from runners.results import metrics

DONE = {"status": "done", "method": "rtn", "model": "toy", "bits": 3}
DONE |= {"bits_per_weight": 3.5, "layers/mean_relative_error": 0.1, "group_size": None}
FAILED = {"status": "failed", "method": "rtn", "model": "toy", "stage": "load", "error": "killed"}


@pytest.mark.parametrize("whole", [DONE, FAILED])
def test_a_sound_result_is_read_as_it_was_written(whole: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps(whole))
    assert metrics.read(tmp_path / "metrics.json") == whole


@pytest.mark.parametrize("key", ["status", "method", "model", "bits", "bits_per_weight", "layers/mean_relative_error"])
def test_what_a_table_shows_must_be_there(key: str) -> None:
    with pytest.raises(ValueError, match=key):
        metrics.parse(json.dumps({name: value for name, value in DONE.items() if name != key}))


@pytest.mark.parametrize("key", ["stage", "error"])
def test_a_failure_has_a_stage_and_an_error(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} is missing"):
        metrics.parse(json.dumps(FAILED | {key: None}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("status", "running"),
        ("method", 3),
        ("bits", 3.5),
        ("parameters", None),
        ("seed", 2**63),
        ("outlier_ratio", "1"),
        ("ppl/wikitext2", None),
        ("ppl/wikitext2", True),
        ("zero_shot/piqa/acc", "0.5"),
        ("agreement/wikitext2/kl", []),
        ("warnings/dead_columns", None),
        ("symmetric", 1),
        ("digest", 12),
        ("sha256/wikitext2", 12),
        ("other", {}),
    ],
)
def test_a_value_that_does_not_fit_its_key_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=key):
        metrics.parse(json.dumps(DONE | {key: value}))


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_constants_that_json_lacks_are_refused(constant: str) -> None:
    with pytest.raises(ValueError, match="is not a number of JSON"):
        metrics.parse(json.dumps(DONE)[:-1] + f', "ppl/wikitext2": {constant}}}')


def test_a_protocol_needs_its_number_of_windows() -> None:
    with pytest.raises(ValueError, match="protocol/ptb is there without windows/ptb"):
        metrics.parse(json.dumps(DONE | {"protocol/ptb": "gptq"}))


def test_a_damaged_file_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match=r"metrics.json is damaged .*: restore it, .* or run it again with force=true"):
        metrics.read(tmp_path / "metrics.json")
    with pytest.raises(FileNotFoundError):
        metrics.read(tmp_path / "none" / "metrics.json")


def test_a_grid_has_one_wording() -> None:
    assert metrics.grid_words({"method": "fp16"}) == ""
    assert metrics.grid_words(DONE) == "per-channel"
    assert metrics.grid_words({"method": "spqr", "group_size": float("nan")}) == "its own"
    every = {"group_size": 64.0, "symmetric": True, "grid_range": "mse", "act_order": True}
    assert metrics.grid_words({"method": "rtn"} | every) == "group 64 symmetric mse act-order"


def test_keys_of_a_family_and_their_names() -> None:
    keys = [metrics.ppl("c4"), metrics.windows("c4"), metrics.zero_shot("piqa", "acc"), 3]
    assert metrics.keys_of(keys, "ppl") == ["ppl/c4"]
    assert metrics.names(keys, "ppl") == ["c4"]
    assert [metrics.zero_shot_parts(key) for key in keys] == [None, None, ("piqa", "acc"), None]
