"""What is to run and how far it has come: dry runs, the list of a study's cells, and `python -m runners.status`."""

import json
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from runners import cli, status
from runners.arguments import start
from runners.config.command_line import check
from runners.errors import WRONG_INPUT
from runners.results.metrics import METRICS
from runners.results.progress import Progress
from runners.results.run_folder import RunFolder
from runners.results.studies import LAST, chosen_study, remember
from runners.sweeps.cells import CELLS, read_status, register_cells, registered_cells
from tests.conftest import ToySettings

MEASURED = {"bits_per_weight": 3.5, "layers/mean_relative_error": 0.0}


def end(folder: Path, **metrics: Any) -> None:
    RunFolder(folder).write_json(METRICS, {"method": "rtn", "model": "toy", "bits": 3} | MEASURED | metrics)


def test_the_states_of_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "rtn-3b-0123456789"
    assert read_status(folder)["status"] == "missing"
    folder.mkdir()
    progress = Progress(folder)
    progress.stage = "evaluate"
    with RunFolder(folder).lock(wait=False):
        assert read_status(folder)["status"] == "running"
        assert read_status(folder)["error"].startswith("evaluate; process ")
    assert read_status(folder) == {"status": "interrupted", "error": "its process died during evaluate"}
    for block in range(3):
        (folder / "checkpoint").mkdir(exist_ok=True)
        (folder / "checkpoint" / f"block-{block:05}.json").touch()
    assert read_status(folder)["status"] == "unfinished"
    assert read_status(folder)["error"] == "3 blocks are on disk; its process died during evaluate"
    end(folder, status="failed", reason="interrupted", stage="quantize", error="interrupted during quantize")
    assert read_status(folder)["error"] == "3 blocks are on disk; interrupted during quantize"
    end(folder, status="done")
    assert read_status(folder)["status"] == "done"
    (folder / METRICS).write_text("{")
    assert read_status(folder)["status"] == "failed"
    assert "is damaged" in read_status(folder)["error"]


def test_looking_does_not_keep_a_run_from_starting(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            run.is_running()
            time.sleep(0.001)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for _ in range(20):
            with RunFolder(tmp_path).lock(wait=False) as mine:
                assert mine
    finally:
        over.set()
        watcher.join()


@pytest.mark.parametrize("sweep", [[], ["-m"]], ids=["single", "sweep"])
def test_a_dry_run_lists_the_cells_and_starts_nothing(
    sweep: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bits = "bits=2,3,4,5" if sweep else "bits=2"
    arguments = [*sweep, "method=rtn", "group_size=16", bits, f"results={tmp_path / 'new'}", "dry_run=true"]
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    for starts_something in ("launch", "run_here"):
        monkeypatch.setattr(cli, starts_something, lambda *_: pytest.fail("nothing may run"))
    cli.start(lambda: pytest.fail("nothing may run"))
    first = capsys.readouterr().out
    assert f"{4 if sweep else 1} missing" in first
    assert not (tmp_path / "new").exists()
    if not sweep:
        return
    cells = check(arguments[1:], multirun=True)
    end(cells[0].folder, status="done", bits=2)
    end(cells[1].folder, status="failed", reason="killed", stage="load", error="killed by SIGKILL", bits=3)
    end(cells[2].folder, status="unsupported", stage="load", error="not at this width", bits=4)
    cli.start(lambda: pytest.fail("nothing may run"))
    lines = capsys.readouterr().out.splitlines()
    found = {line.split()[2]: " ".join(line.split()[3:]) for line in lines if line.split()[1:2] == ["rtn"]}
    assert found == {
        "2": "done",
        "3": "failed killed by SIGKILL",
        "4": "unsupported not at this width",
        "5": "missing 2.0 MB not measured on this machine yet",
    }
    assert lines[-1].strip() == "1 done, 1 unsupported, 1 failed, 1 missing"


def test_sweeps_of_a_study_share_a_list_of_their_cells(toy_settings: ToySettings) -> None:
    sweeps = [[toy_settings("method=rtn", f"bits={bits}")] for bits in (2, 3, 4, 5, 6)]
    threads = [threading.Thread(target=register_cells, args=(cells,)) for cells in sweeps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (study,) = {cells[0].study_folder for cells in sweeps}
    listed = registered_cells(study)
    assert sorted(row.get("bits", 16) for row in listed.values()) == [2, 3, 4, 5, 6, 16]
    assert listed[f"toy/{sweeps[0][0].run_name}"]["method"] == "rtn"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Of four cells of rtn, 60 s each, and two of gptq: two are done, one failed, one runs, one died, one is missing."""
    study = tmp_path / "night"
    listed = {
        f"toy/rtn-{bits}b-0": {"method": "rtn", "model": "toy", "bits": bits, "setting": ""} for bits in (2, 3, 4, 5)
    }
    listed |= {
        f"toy/gptq-{bits}b-0": {"method": "gptq", "model": "toy", "bits": bits, "setting": ""} for bits in (2, 3)
    }
    for name in listed:
        (study / name).mkdir(parents=True)
    (study / CELLS).write_text(json.dumps(listed))
    end(study / "toy/rtn-2b-0", status="done", bits=2, **{"quantize/seconds": 50.0, "evaluate/seconds": 10.0})
    end(study / "toy/gptq-2b-0", method="gptq", status="done", bits=2, **{"quantize/seconds": 600.0})
    end(study / "toy/rtn-3b-0", status="failed", reason="killed", stage="quantize", error="killed by SIGKILL", bits=3)
    Progress(study / "toy/rtn-4b-0").stage = "quantize"
    Progress(study / "toy/gptq-3b-0").stage = "evaluate"
    return study


def test_the_status_of_a_study(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunFolder(study / "toy/rtn-4b-0").lock(wait=False):
        start(status.main, words=[f"results={study.parent}", "study=night"])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith("toy rtn 4 running quantize; process ") for line in lines)
    assert "toy rtn 3 failed killed by SIGKILL" in lines
    assert "toy gptq 3 interrupted its process died during evaluate" in lines
    assert "toy rtn 5 missing" in lines
    # 60 s for the missing one, as many for the running one, and 600 s for the one that died.
    expected = "2 done, 1 running, 1 interrupted, 1 failed, 1 missing; about 12 min left with 1 worker"
    assert lines[-1] == f"{study}: {expected}"


def test_the_study_that_was_run_last_needs_no_name(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = study.parent
    words = [f"results={results}"]
    with pytest.raises(SystemExit):
        start(status.main, words=words)
    assert f"no study was run in {results} yet: name one, of which there are night" in capsys.readouterr().err
    (results / "tiny").mkdir()
    start(status.main, words=words)
    assert capsys.readouterr().out.startswith(f"study: tiny (nothing was run in {results} yet)\n")
    remember(results / "tiny")
    remember(study)
    start(status.main, words=words)
    assert capsys.readouterr().out.startswith(f"study: night (the last that was run in {results})\n")
    for note in ("../outside", "", "gone", "a\x00b"):  # damaged notes count as none
        (results / LAST).write_text(note)
        assert chosen_study(None, results) == "tiny"


def test_a_study_says_which_command_goes_on_with_it(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = registered_cells(study)
    sweep = ["-m", "method=rtn", "bits=2,3,4,5", "model.path=/a (b)"]
    commands = {name: sweep if "rtn" in name else ["method=gptq", "study=night"] for name in listed}
    labels = {name: label | {"command": commands[name]} for name, label in listed.items()}
    (study / CELLS).write_text(json.dumps(labels))
    start(status.main, words=[f"results={study.parent}", "study=night"])
    *_, first, second = capsys.readouterr().out.splitlines()
    assert first == "next      python run.py -m retry_failed=true method=rtn bits=2,3,4,5 'model.path=/a (b)'"
    assert second == "          python run.py method=gptq study=night"


def test_a_command_is_kept_with_its_cells(toy_settings: ToySettings) -> None:
    cells = [toy_settings("method=rtn", f"seed={seed}") for seed in (0, 1)]
    register_cells(cells, ["method=rtn", "seed=0,1"], multirun=True)
    register_cells(cells[:1], ["method=rtn"], multirun=False)
    listed = registered_cells(cells[0].study_folder)
    rows = {row["setting"]: row for row in listed.values()}
    assert rows["seed=0"]["command"] == ["method=rtn"]  # it was asked for alone since, and is still told apart
    assert rows["seed=1"]["command"] == ["-m", "method=rtn", "seed=0,1"]
    assert rows["seed=0"]["series"] == rows["seed=1"]["series"] == cells[0].series


def test_where_bos_was_is_told_where_runs_differ(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"results={study.parent}", "study=night"]
    end(study / "toy/rtn-2b-0", status="done", bits=2, **{"calibration/bos": "text"})
    start(status.main, words=words)
    assert "calibration.bos" not in capsys.readouterr().out
    end(study / "toy/gptq-2b-0", method="gptq", status="done", bits=2, **{"calibration/bos": "window"})
    start(status.main, words=words)
    assert "toy: calibration.bos differs: text in rtn 2 bits; window in gptq 2 bits\n" in capsys.readouterr().out


def test_a_study_without_a_list_shows_what_has_run(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (study / CELLS).unlink()
    start(status.main, words=[f"results={study.parent}", "study=night"])
    assert "2 done, 2 interrupted, 1 failed; " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["study=nigt"], "there is no study {results}/nigt: did you mean night? There are night"),
        (["night"], "night is not understood: usage: python -m runners.status"),
        (["studi=night"], "studi is not a setting: did you mean study? There are study, results"),
    ],
)
def test_mistakes_get_a_sentence(
    study: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        start(status.main, words=[f"results={study.parent}", *arguments])
    assert leaving.value.code == WRONG_INPUT
    assert capsys.readouterr().err.startswith("error: " + sentence.format(results=study.parent))


def test_a_damaged_list_gets_a_sentence(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (study / CELLS).write_text("[")
    with pytest.raises(SystemExit):
        start(status.main, words=[f"results={study.parent}", "study=night"])
    sentence = r"error: .*cells.json cannot be read .*: delete it, and start the sweep again"
    assert re.match(sentence, capsys.readouterr().err)


def test_a_sweep_leaves_failed_cells_alone_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["method=rtn", "bits=2,3,4", f"results={tmp_path}"]
    cells = check(arguments, multirun=True)
    for cell in cells[:2]:
        end(cell.folder, status="failed", reason="killed", stage="load", error="killed by SIGKILL", bits=cell.run.bits)
    end(cells[2].folder, status="failed", reason="interrupted", stage="load", error="interrupted", bits=4)
    for extra, sentence in (
        ([], "2 of 3 cells failed, 2 of them before, which were left alone: retry_failed=true runs them again"),
        (["retry_failed=true"], "2 of 3 cells failed: retry_failed=true runs them again"),
    ):
        monkeypatch.setattr(sys, "argv", ["run.py", "-m", *arguments, *extra])
        monkeypatch.setattr(cli, "launch", lambda _cfg, _job: None)
        with pytest.raises(SystemExit) as leaving:
            cli.start(lambda: pytest.fail("Hydra's main is not for runs"))
        assert leaving.value.code == cli.FAILED
        printed = capsys.readouterr().out
        assert sentence in printed
        assert "1 of 3 cells have not ended: the same command again goes on with them" in printed
        assert "rtn 2 bits: killed by SIGKILL" in printed
    assert len(registered_cells(cells[0].study_folder)) == 4
