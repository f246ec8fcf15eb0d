"""run.log: what a bug report needs, without secrets, and outside everything that a result depends on."""

import logging
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from runners.results.run_log import RUN_LOG, append, run_log, without_secrets
from runners.results.tables import failure_text
from runners.run import experiment
from runners.run.experiment import run_cell
from tests.conftest import PROJECT, ToySettings

STAMPED = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d{4} (INFO|WARNING|ERROR) ")


def test_a_run_logs_versions_machine_command_and_progress(
    toy_settings: ToySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTEASE_COMMAND", "python run.py method=rtn\x1b[2J")
    settings = toy_settings("method=rtn")
    assert run_cell(settings)["status"] == "done"
    text = (settings.folder / RUN_LOG).read_text()
    assert all(STAMPED.match(line) for line in text.splitlines())
    for fact in (
        "command   python run.py method=rtn\\x1b[2J",
        "python 3.",
        "torch 2.",
        "threads",
        "commit",
        "block 2 of 2",
    ):
        assert fact in text
    assert settings.run_name in text
    assert text.rstrip().endswith("ends      done")
    assert run_cell(settings.replace(force=True))["digest"] == settings.digest
    assert (settings.folder / RUN_LOG).read_text().startswith(text)  # appended


def test_a_failure_leaves_its_traceback_and_the_sentence_names_the_log(
    toy_settings: ToySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        warnings.warn("something looks odd", stacklevel=1)
        raise ZeroDivisionError("of the test")

    monkeypatch.setattr(experiment, "preflight", fail)
    settings = toy_settings("method=rtn")
    with pytest.warns(UserWarning, match="looks odd"):
        row = run_cell(settings)
    lines = (settings.folder / RUN_LOG).read_text().splitlines()
    assert all(STAMPED.match(line) for line in lines)
    assert any("UserWarning: something looks odd" in line and " WARNING " in line for line in lines)
    assert any("Traceback (most recent call last)" in line for line in lines)
    assert "during preflight: ZeroDivisionError: of the test" in lines[-1]
    assert f"details: {settings.folder / RUN_LOG}" in failure_text(row)


def test_secrets_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("SOME_KEY", "1")  # too short to be struck out of every number
    token = "hf_" + "a" * 30
    append(tmp_path, f"key 0123456789abcdef, {token}, http://me:word@proxy:8080/x, bits=11")
    text = (tmp_path / RUN_LOG).read_text()
    assert text.rstrip().endswith("key ***, ***, http://***@proxy:8080/x, bits=11")
    assert without_secrets("https://host/x?token=abcdefghij&a=1") == "https://host/x?token=***&a=1"


def test_messages_are_kept_as_long_as_the_run_lasts(tmp_path: Path) -> None:
    log = logging.getLogger("runners.test")
    with run_log(tmp_path):
        log.warning("two\nlines \x1b[31m")
    log.warning("afterwards")
    lines = (tmp_path / RUN_LOG).read_text().splitlines()
    assert [line.split(maxsplit=2)[2] for line in lines] == ["WARNING two", "WARNING lines \\x1b[31m"]


def test_a_log_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    with run_log(tmp_path / "gone") as add:
        add("lost")
    assert not (tmp_path / "gone").exists()


def test_the_command_is_logged_as_typed(toy_model: Path, data_root: Path, tmp_path: Path) -> None:
    words = [
        "method=rtn",
        "evaluation=wikitext2",
        "calibration.num_sequences=4",
        "bits=3,4",
        f"results={tmp_path}",
        "-m",
    ]
    model = ["model=local", f"model.path={toy_model}", f"data_root={data_root}", "tracker=none"]
    subprocess.run([sys.executable, "run.py", *model, *words], cwd=PROJECT, check=True, capture_output=True)
    logs = list(tmp_path.glob(f"runs/*/*/{RUN_LOG}"))
    assert len(logs) == 3  # both cells, and their reference
    for file in logs:
        text = file.read_text()
        assert "run.py model=local" in text
        assert "bits=3,4" in text
        assert all(STAMPED.match(line) for line in text.splitlines())
