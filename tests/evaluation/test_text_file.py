"""Texts of one's own: known by their content, read exactly, and refused in a sentence before anything is loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from runners.config.command_line import check
from runners.data.text_file import TextFile
from runners.errors import InputError
from runners.results.metrics import CALIBRATION_NOTE, Status, ppl, sha256
from runners.results.tables import results_table
from runners.run.experiment import run_cell
from tests.conftest import ToySettings, write_rows

SENTENCE = "the model reads a weight and its column before it rounds every row to the grid of four bits"
WORDS = SENTENCE.split()
PROSE = " ".join(WORDS[(place * place + place // 7) % len(WORDS)] for place in range(6000))


def own_text(folder: Path, content: str | bytes = PROSE, name: str = "my.txt") -> Path:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def test_a_text_is_one_document_as_it_is(tmp_path: Path) -> None:
    assert TextFile(str(own_text(tmp_path, "\ufeffone\n\ntwo\r\n"))).rows(None) == ["one\n\ntwo\r\n"]


def test_json_lines_are_documents(tmp_path: Path) -> None:
    write_rows(tmp_path / "my.jsonl", [{"text": "one", "body": "1"}, {"text": "two", "body": "2"}])
    assert TextFile(str(tmp_path / "my.jsonl")).rows(None) == ["one", "two"]
    assert TextFile(str(tmp_path / "my.jsonl"), column="body").rows(None) == ["1", "2"]


def test_empty_lines_between_json_lines_are_no_documents(tmp_path: Path) -> None:
    file = own_text(tmp_path, '\ufeff{"text": "one"}\r\n\n  \n{"text": "two"}\n\n', "my own texts.jsonl")
    assert TextFile(str(file)).rows(None) == ["one", "two"]


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty.txt": (b"", "is empty: there is no text in it"),
    "blank.txt": (b" \n\n", "is empty"),
    "binary.txt": (b"PK\x03\x04\x00\x00", "is binary, not a text"),
    "utf16.txt": ("text".encode("utf-16"), "is binary, not a text"),
    "latin.txt": ("fine\nna\xefve".encode("latin-1"), "line 2 of .* is not UTF-8: convert it"),
    "my.csv": (b"text", "is neither .txt nor .jsonl"),
    "none.jsonl": (b"", "is empty"),
    "blank.jsonl": (b'{"text": " "}\n', "is empty"),
    "broken.jsonl": (b'{"text": "fine"}\n{"text"', "line 2 of .* is not a JSON object with a text in 'text'"),
    "other.jsonl": (b'{"body": "fine"}\n', "line 1 of .* is not a JSON object with a text in 'text'"),
    "latin.jsonl": (b'{"text": "na\xefve"}\n', "line 1 of .* is not UTF-8: convert it"),
    "list.jsonl": (b"[1]\n", "line 1 of .* is not a JSON object with a text in 'text'$"),
    "number.jsonl": (
        b'{"text": 1, "body": "a", "n": 2}\n',
        "with a text in 'text' .it has texts in 'body'; .* column=NAME chooses.$",
    ),
}


@pytest.mark.parametrize("group", ["calibration", "evaluation"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_text_that_cannot_be_right_is_refused_with_the_command_line(tmp_path: Path, name: str, group: str) -> None:
    content, sentence = BROKEN[name]
    file = own_text(tmp_path, content, name)
    with pytest.raises(InputError, match=sentence) as error:
        check([f"{group}=file", f"{group}.path={file}"], multirun=False)
    assert "\n" not in str(error.value)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("group", ["calibration", "evaluation"])
def test_a_text_must_be_named_and_be_there(tmp_path: Path, group: str) -> None:
    with pytest.raises(InputError, match=rf"{group}.path is missing: set {group}.path="):
        check([f"{group}=file"], multirun=False)
    with pytest.raises(InputError, match=r"nowhere\.txt does not exist"):
        check([f"{group}=file", f"{group}.path={tmp_path / 'nowhere.txt'}"], multirun=False)
    (tmp_path / "a.txt").mkdir()
    for folder in (tmp_path / "a.txt", tmp_path):
        with pytest.raises(InputError, match="is a folder, not a file"):
            check([f"{group}=file", f"{group}.path={folder}"], multirun=False)


def test_the_content_is_in_the_digest_and_the_place_is_not(toy_settings: ToySettings, tmp_path: Path) -> None:
    def digest(file: Path, *more: str) -> str:
        texts = ["calibration=file", "evaluation=file"]
        paths = [f"{group}.path={file}" for group in ("calibration", "evaluation")]
        return toy_settings("method=gptq", *texts, *paths, *more).digest

    first = own_text(tmp_path)
    (tmp_path / "moved").mkdir()
    moved = Path(shutil.copy(first, tmp_path / "moved" / "renamed.txt"))
    assert digest(first) == digest(moved)
    assert digest(first) == digest(first, "calibration.column=body")  # which a .txt does not have
    assert digest(first) != digest(first, "evaluation.name=mine")
    before = digest(first)
    own_text(tmp_path, PROSE + " more")
    assert digest(first) != before
    lines = tmp_path / "my.jsonl"
    write_rows(lines, [{"text": PROSE, "body": PROSE}])
    assert digest(lines) != digest(lines, "calibration.column=body")
    as_text = Path(shutil.copy(lines, tmp_path / "lines.txt"))
    assert digest(lines) != digest(as_text)  # the same bytes, but not the same documents


def run_on(toy_settings: ToySettings, calibration: Path, evaluation: Path) -> dict[str, Any]:
    texts = ["calibration=file", f"calibration.path={calibration}", "calibration.held_out=2"]
    texts += ["evaluation=file", f"evaluation.path={evaluation}", "evaluation.name=mine"]
    row = run_cell(toy_settings("method=rtn", *texts))
    assert row["status"] == Status.DONE, row
    return row


def test_a_text_that_was_calibrated_on_is_not_passed_off_as_new(toy_settings: ToySettings, tmp_path: Path) -> None:
    first = own_text(tmp_path)
    copied = Path(shutil.copy(first, tmp_path / "other name.txt"))
    row = run_on(toy_settings, first, copied)
    assert row[CALIBRATION_NOTE].startswith("mine is what was calibrated on")
    below = str(results_table([row]).renderables[-1])
    assert row[CALIBRATION_NOTE] in below
    stored = json.loads((Path(row["folder"]) / "metrics.json").read_text())
    assert stored[CALIBRATION_NOTE] == row[CALIBRATION_NOTE]
    assert "my.txt" not in (Path(row["folder"]) / "config.yaml").read_text()
    other = run_on(toy_settings, first, own_text(tmp_path, PROSE[::-1], "new.txt"))
    assert CALIBRATION_NOTE not in other
    assert other[ppl("mine")] > 0
    assert other[sha256("mine")] != row[sha256("mine")]
