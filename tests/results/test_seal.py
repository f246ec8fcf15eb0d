"""The seal: no flipped bit, cut or exchanged file of a run that has ended is believed, by whoever reads it.

Before there was a seal, half of the flipped bits were: `pytest -m slow tests/results/test_seal.py` counts all of them.
"""

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from analysis.__main__ import main as analyze
from analysis.collect import collect
from runners.arguments import invoke
from runners.errors import InputError
from runners.results.metrics import METRICS
from runners.results.run_folder import RunFolder
from runners.results.seal import SEALED, read_run
from runners.run import experiment
from runners.run.experiment import run_cell, run_experiment
from runners.status import main as status
from runners.sweeps.cells import read_status
from tests.conftest import PROJECT, ToySettings

COMMITTED = PROJECT / "results"
FILES = (METRICS, *(name for name in SEALED if name != "sweeps.csv"))  # of the runs here
Damage = Callable[[Path], None]


def sealed_copy(pattern: str, study: Path) -> Path:
    """A committed run, copied into a study and sealed."""
    source = min(COMMITTED.glob(pattern))
    folder = study / "tiny" / source.name
    shutil.copytree(source, folder)
    RunFolder(folder).write_metrics(json.loads((folder / METRICS).read_text(encoding="utf-8")))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return sealed_copy("tiny/tiny/rtn-3b-653f161fd9", tmp_path / "study")


def is_believed(folder: Path) -> bool:
    try:
        read_run(folder)
    except ValueError:
        return False
    return True


def believed_flips(file: Path, step: int) -> tuple[int, int]:
    """How many of the bits that flip, one at random in every `step`th byte, are believed, and how many have flipped."""
    whole, chance, believed = file.read_bytes(), random.Random(0), 0
    places = range(chance.randrange(step), len(whole), step)
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << chance.randrange(8)
        file.write_bytes(flipped)
        believed += is_believed(file.parent)
    file.write_bytes(whole)
    return believed, len(places)


@pytest.mark.parametrize("name", FILES)
def test_no_flipped_bit_is_believed(run: Path, name: str) -> None:
    believed, flipped = believed_flips(run / name, step=23)
    assert believed == 0
    assert flipped > 40
    assert is_believed(run)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_none_of_all_flipped_bits_is_believed(run: Path, name: str) -> None:
    believed, flipped = believed_flips(run / name, step=1)
    assert (believed, flipped) == (0, (run / name).stat().st_size)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
def test_a_file_that_was_cut_off_is_named(run: Path, name: str, part: float) -> None:
    whole = (run / name).read_bytes()
    (run / name).write_bytes(whole[: int(part * len(whole)) - (part == 1)])
    with pytest.raises(ValueError, match=rf"{name} is damaged \(.*\): restore it, .*force=true"):
        read_run(run)


@pytest.mark.parametrize("name", FILES)
def test_files_that_two_runs_have_exchanged_are_named(run: Path, name: str, tmp_path: Path) -> None:
    other = sealed_copy("smollm2/*/gptq-3b-*", tmp_path / "study")
    mine, others = (run / name).read_bytes(), (other / name).read_bytes()
    assert mine != others
    (run / name).write_bytes(others)
    (other / name).write_bytes(mine)
    for folder in (run, other):
        with pytest.raises(ValueError, match="is damaged"):
            read_run(folder)


def test_a_file_that_is_gone_or_new_is_named(run: Path) -> None:
    (run / "sweeps.csv").write_text("block,layer,sweep,relative_error\n")
    with pytest.raises(ValueError, match=r"sweeps\.csv is damaged \(it was not there when the run ended\)"):
        read_run(run)
    (run / "sweeps.csv").unlink()
    (run / "layers.csv").unlink()
    with pytest.raises(ValueError, match=r"layers\.csv is damaged \(it is gone\)"):
        read_run(run)


def test_how_much_is_left_is_said(run: Path) -> None:
    lines = (run / "windows.csv").read_text().splitlines(keepends=True)
    (run / "windows.csv").write_text("".join(lines[:11]))
    with pytest.raises(ValueError, match=r"it has \d+ bytes and 10 rows, and had \d+ and 128 when the run ended"):
        read_run(run)


def test_line_ends_and_what_comes_after_the_end_do_not_count(run: Path) -> None:
    before = read_run(run)
    for name in FILES:
        (run / name).write_bytes((run / name).read_bytes().replace(b"\n", b"\r\n"))
    (run / "audit.csv").write_text("block,layer\n")
    (run / "checkpoint").mkdir()
    (run / ".lock").touch()
    assert read_run(run) == before


def test_a_run_is_read_without_its_seal(run: Path) -> None:
    assert "seal" not in read_run(run)
    assert "seal" not in collect(run.parents[1])
    assert list(json.loads((run / METRICS).read_text()))[-1] == "seal"


def test_a_seal_under_another_key_is_none(run: Path) -> None:
    text = (run / METRICS).read_text()
    (run / METRICS).write_text(text.replace('"seal"', '"seam"'))
    assert not is_believed(run)


def test_a_run_that_is_forced_again_meanwhile_is_not_damaged(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It removes its metrics first: who has read them before finds other files, and then no metrics."""
    content = Path.read_bytes

    def forced(file: Path) -> bytes:
        (run / METRICS).unlink(missing_ok=True)
        return b"" if file.parent == run else content(file)

    monkeypatch.setattr(Path, "read_bytes", forced)
    with pytest.raises(FileNotFoundError):
        read_run(run)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
def test_status_and_analysis_name_a_damaged_file(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    flip(run / name)
    invoke(["study=study", f"results={run.parents[2]}"], status)
    shown = capsys.readouterr().out
    assert f"\n{run / name} is damaged (" in shown
    assert "1 failed" in shown
    with pytest.raises(SystemExit) as raised:
        analyze([str(run.parents[1])])
    assert f"{run / name} is damaged (" in f"{raised.value}{capsys.readouterr()}"


def test_a_damaged_run_is_neither_believed_nor_run_again_unless_it_is_forced(
    toy_settings: ToySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = toy_settings("method=rtn")
    first = run_cell(settings)
    flip(settings.folder / "windows.csv")
    with monkeypatch.context() as patched:
        patched.setattr(experiment, "preflight", lambda _settings: pytest.fail("nothing may be loaded"))
        for retry in (False, True):
            with pytest.raises(InputError, match=r"windows\.csv is damaged .*force=true"):
                run_cell(settings.replace(retry_failed=retry))
    assert read_status(settings.folder)["reason"] == "damaged"
    again = run_cell(settings.replace(force=True))
    assert again["ppl/wikitext2"] == first["ppl/wikitext2"]
    assert is_believed(settings.folder)


def test_a_damaged_reference_is_refused_before_the_run_that_needs_it(
    toy_settings: ToySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = toy_settings("method=fp16")
    run_cell(reference)
    flip(reference.folder / "environment.json")
    monkeypatch.setattr(experiment, "preflight", lambda _settings: pytest.fail("nothing may be loaded"))
    with pytest.raises(InputError, match=r"environment\.json is damaged"):
        run_experiment(toy_settings("method=rtn"))


def test_a_run_that_failed_has_no_tables_of_the_result_before_it(toy_settings: ToySettings, toy_model: Path) -> None:
    settings = toy_settings("method=rtn")
    run_cell(settings)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(experiment, "walk_rounding", lambda *_: 1 / 0)
        assert run_cell(settings.replace(force=True))["status"] == "failed"
    assert not (settings.folder / "windows.csv").exists()
    assert read_status(settings.folder)["reason"] == "exception"


def test_looking_costs_about_a_millisecond(run: Path) -> None:
    read_run(run)
    start = time.perf_counter()
    for _ in range(20):
        read_run(run)
    assert (time.perf_counter() - start) / 20 < 0.02  # on a busy machine
