"""Codes that outlive their run: another evaluation takes them over; the oldest make room."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from runners.config.settings import Settings
from runners.quantization.finished_blocks import FinishedBlocks
from runners.results.metrics import CHECKPOINT_FROM, QUANTIZATION
from runners.run import kept_codes
from runners.run.experiment import run_cell
from runners.run.kept_codes import MAY_GO, alone_with
from tests.conftest import ToySettings

VOLATILE = ("seconds", "memory_gb", "cache/", "folder", "tracker", "seal", CHECKPOINT_FROM)
OTHER_TEXT = "evaluation=ptb"


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The decoder blocks that were quantized, in order."""
    blocks: list[int] = []
    save = FinishedBlocks.save
    monkeypatch.setattr(
        FinishedBlocks, "save", lambda self, index, *rest: (blocks.append(index), save(self, index, *rest))
    )
    return blocks


def numbers(row: dict[str, Any]) -> dict[str, float]:
    measured = {key: value for key, value in row.items() if not any(word in key for word in VOLATILE)}
    return {key: value for key, value in measured.items() if isinstance(value, int | float)}


def checkpoint(settings: Settings) -> Path:
    return settings.folder / "checkpoint"


def test_another_text_needs_no_other_quantization(toy_settings: ToySettings, tmp_path: Path, solved: list[int]) -> None:
    first, second = toy_settings("method=gptq"), toy_settings("method=gptq", OTHER_TEXT, "study=other")
    assert first.digest != second.digest
    row = run_cell(first)
    assert (row[QUANTIZATION], solved) == (second.quantization, [0, 1])
    assert CHECKPOINT_FROM not in row
    again = run_cell(second)
    assert solved == [0, 1]
    assert again[CHECKPOINT_FROM] == first.folder.relative_to(tmp_path / "results").as_posix()
    fresh = run_cell(toy_settings("method=gptq", OTHER_TEXT, "study=other", f"results={tmp_path / 'fresh'}"))
    assert solved == [0, 1, 0, 1]
    # Codes and what is measured on them are equal to the last bit; sums over errors depend on where arrays lie in memory.
    names = ("checkpoint/sha256", "ppl/ptb", "agreement/ptb/kl", "bits_per_weight")
    assert [again[name] for name in names] == [fresh[name] for name in names]
    assert numbers(again) == pytest.approx(numbers(fresh), rel=1e-6)
    assert (second.folder / "layers.csv").read_bytes() == (first.folder / "layers.csv").read_bytes()
    assert os.path.samefile(
        checkpoint(first) / "block-00001.safetensors", checkpoint(second) / "block-00001.safetensors"
    )


@pytest.mark.parametrize("change", ["seed=1", "calibration.num_sequences=5"])
def test_what_changes_the_codes_is_another_quantization(
    toy_settings: ToySettings, solved: list[int], change: str
) -> None:
    first = toy_settings("method=gptq")
    second = toy_settings(*(word for word in ("method=gptq",) if not change.startswith("method")), change, OTHER_TEXT)
    assert first.quantization != second.quantization
    run_cell(first)
    assert CHECKPOINT_FROM not in run_cell(second)
    assert solved == [0, 1, 0, 1]


def test_codes_of_another_version_are_not_taken_over(toy_settings: ToySettings, solved: list[int]) -> None:
    first = toy_settings("method=rtn")
    run_cell(first)
    file = checkpoint(first) / "identity.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"code version": "another"}))
    run_cell(toy_settings("method=rtn", OTHER_TEXT))
    assert solved == [0, 1, 0, 1]


def test_force_makes_the_codes_anew(toy_settings: ToySettings, solved: list[int]) -> None:
    run_cell(toy_settings("method=rtn"))
    run_cell(toy_settings("method=rtn", OTHER_TEXT, "force=true"))
    assert solved == [0, 1, 0, 1]


def test_damaged_codes_are_made_again(
    toy_settings: ToySettings, solved: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    first = toy_settings("method=rtn")
    run_cell(first)
    file = checkpoint(first) / "block-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    row = run_cell(toy_settings("method=rtn", OTHER_TEXT))
    assert (row["status"], solved) == ("done", [0, 1, 1])
    assert "block 1 in" in caplog.text


def test_codes_that_vanish_while_they_are_taken_over_are_made_again(
    toy_settings: ToySettings, solved: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = toy_settings("method=rtn"), toy_settings("method=rtn", OTHER_TEXT)
    run_cell(first)
    link = kept_codes._link

    def vanishes(file: Path, to: Path) -> None:
        if file.name == "block-00001.json":
            raise FileNotFoundError
        link(file, to)

    monkeypatch.setattr(kept_codes, "_link", vanishes)
    assert run_cell(second)["status"] == "done"
    assert solved == [0, 1, 0, 1]


def test_a_file_system_without_links_gets_copies(
    toy_settings: ToySettings, solved: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = toy_settings("method=rtn"), toy_settings("method=rtn", OTHER_TEXT)
    run_cell(first)

    def refuses(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuses)
    assert run_cell(second)[CHECKPOINT_FROM]
    assert solved == [0, 1]


def test_keep_checkpoint_says_what_stays(toy_settings: ToySettings, tmp_path: Path) -> None:
    names = {"auto": True, "always": True, "true": True, "never": False, "false": False}
    for name, stays in names.items():
        settings = toy_settings("method=rtn", f"keep_checkpoint={name}", f"results={tmp_path / name}")
        run_cell(settings)
        assert checkpoint(settings).exists() == stays
        assert (checkpoint(settings) / MAY_GO).exists() == (name == "auto")


def size(settings: Settings) -> float:
    return sum(file.stat().st_size for file in checkpoint(settings).iterdir()) / 1e9


def test_the_oldest_codes_make_room_but_not_those_to_keep(toy_settings: ToySettings) -> None:
    kept = toy_settings("method=rtn", "bits=2", "keep_checkpoint=always")
    run_cell(kept)
    first, second = toy_settings("method=rtn", "bits=3"), toy_settings("method=rtn", "bits=4")
    run_cell(first)
    run_cell(second)
    os.utime(checkpoint(first) / MAY_GO, (1, 1))
    third = toy_settings("method=rtn", "bits=5")
    run_cell(third.replace(checkpoints_gb=2.5 * size(second)))
    assert [checkpoint(each).exists() for each in (kept, first, second, third)] == [True, False, True, True]
    assert (first.folder / "metrics.json").exists()


def test_shared_files_count_once(toy_settings: ToySettings) -> None:
    first, second = toy_settings("method=rtn"), toy_settings("method=rtn", OTHER_TEXT)
    run_cell(first)
    run_cell(second.replace(checkpoints_gb=1.1 * size(first)))
    assert checkpoint(first).exists()
    assert checkpoint(second).exists()


def test_codes_above_the_limit_are_not_kept(toy_settings: ToySettings, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    settings = toy_settings("method=rtn", "checkpoints_gb=0")
    assert run_cell(settings)["status"] == "done"
    assert not checkpoint(settings).exists()
    assert "more than checkpoints_gb" in caplog.text


def test_of_two_runs_at_once_one_makes_the_codes(
    toy_settings: ToySettings, solved: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    first, second = toy_settings("method=rtn"), toy_settings("method=rtn", OTHER_TEXT)
    rows: list[dict[str, Any]] = []
    with alone_with(first):
        waits = threading.Thread(target=lambda: rows.append(run_cell(second)))
        waits.start()
        waits.join(3)
        assert waits.is_alive()
        assert not solved
    waits.join()
    assert rows[0]["status"] == "done"
    assert "waiting for another run that makes the same codes" in caplog.text
