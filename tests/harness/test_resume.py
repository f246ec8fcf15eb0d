"""Runs that are killed: they go on after the last finished block and end as if nothing had happened."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from runners.config.settings import Settings
from runners.errors import InputError
from runners.quantization import finished_blocks as resume
from runners.quantization.finished_blocks import FinishedBlocks
from runners.run.experiment import run_cell
from runners.storage import files
from tests.conftest import ToySettings, save_toy

KILLS = 25
LAYERS = 6
VOLATILE = ("seconds", "memory_gb", "cache/", "folder", "tracker", "seal")  # differ from run to run
LIVES = multiprocessing.get_context("forkserver")  # a clean process for each life, forked in milliseconds


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy with more blocks, so that there is something to go on with."""
    return save_toy(tmp_path_factory.mktemp("models") / "deep", LAYERS)


LIVES.set_forkserver_preload(["tests.harness.test_resume"])


def live(settings: Settings, dies_at_write: int | None) -> None:
    """One life of a run, in a process of its own; it may end in the middle of a write."""
    torch.set_num_threads(1)
    if dies_at_write is not None:
        writes = iter(range(10**9))
        fsync = os.fsync

        def dies(descriptor: int) -> None:
            if next(writes) == dies_at_write:  # the content is there in part, under its temporary name
                os.truncate(f"/proc/self/fd/{descriptor}", os.fstat(descriptor).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(descriptor)

        files.os.fsync = dies  # pyright: ignore[reportPrivateImportUsage]
    run_cell(settings)


def measured(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not any(word in key for word in VOLATILE)}


def undisturbed(settings: Settings) -> dict[str, Any]:
    process = LIVES.Process(target=live, args=(settings, None))
    process.start()
    process.join()
    return json.loads((settings.folder / "metrics.json").read_text())


def codes(settings: Settings) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (settings.folder / "checkpoint").glob("*.safetensors")}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="truncates files through /proc")
def test_a_run_killed_25_times_ends_as_if_nothing_had_happened(
    toy_settings: ToySettings, deep_model: Path, tmp_path: Path
) -> None:
    """At random moments, every third time in the middle of a random write."""

    def settings(name: str) -> Settings:
        model, where = f"model.path={deep_model}", f"results={tmp_path / name}"
        return toy_settings(model, where, "method=gptq_quantease", "keep_checkpoint=true", f"cache={tmp_path / 'none'}")

    undisturbed(settings("warm"))
    calm = settings("calm")
    start = time.monotonic()
    expected = undisturbed(calm)
    whole = time.monotonic() - start
    chance = random.Random(0)
    killed = resumed = finished = 0
    while killed < KILLS:
        run = settings(f"killed-{finished}")
        resumed += len(list((run.folder / "checkpoint").glob("block-*.json"))) > 0
        at_write = chance.randrange(6) if killed % 3 == 2 else None
        process = LIVES.Process(target=live, args=(run, at_write))
        process.start()
        process.join(None if at_write is not None else chance.uniform(0.1, 0.8) * whole)
        if process.is_alive():
            process.kill()
            process.join()
        if process.exitcode == -signal.SIGKILL:
            killed += 1
        else:  # it was faster: its result counts, and the next one begins anew
            assert process.exitcode == 0
            check(run, expected, calm)
            finished += 1
    last = settings(f"killed-{finished}")
    undisturbed(last)
    check(last, expected, calm)
    assert resumed >= 5


def check(run: Settings, expected: dict[str, Any], calm: Settings) -> None:
    row = json.loads((run.folder / "metrics.json").read_text())
    assert measured(row) == measured(expected)
    assert codes(run) == codes(calm)
    assert len(codes(run)) == LAYERS
    assert not list(run.folder.rglob("*.partial"))
    rows = [(settings.folder / "layers.csv").read_text().splitlines() for settings in (run, calm)]
    assert [line.split(",")[:4] for line in rows[0]] == [line.split(",")[:4] for line in rows[1]]


@pytest.fixture
def half_done(toy_settings: ToySettings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A run that was interrupted after its first block."""
    settings = toy_settings("method=rtn", "keep_checkpoint=true")
    save = FinishedBlocks.save

    def once(self: FinishedBlocks, index: int, *rest: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        save(self, index, *rest)

    monkeypatch.setattr(FinishedBlocks, "save", once)
    with pytest.raises(KeyboardInterrupt):
        run_cell(settings)
    monkeypatch.undo()
    assert [file.name for file in (settings.folder / "checkpoint").glob("block-*.json")] == ["block-00000.json"]
    return settings


def test_a_run_goes_on_after_the_last_finished_block(
    half_done: Settings, toy_settings: ToySettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved: list[int] = []
    monkeypatch.setattr(
        FinishedBlocks,
        "save",
        lambda self, index, *rest, save=FinishedBlocks.save: (solved.append(index), save(self, index, *rest)),
    )
    row = run_cell(half_done)
    assert solved == [1]
    fresh = run_cell(toy_settings("method=rtn", "keep_checkpoint=true", f"results={tmp_path / 'fresh'}"))
    assert measured(row) == measured(fresh)
    assert row["layers/count"] == 12


DIFFERENT = {
    "configuration": {"method": "another"},
    "code version": "0123456789abcdef",
    "library version": {"torch": "1.0"},
    "model": "another",
    "set of calibration sequences": ["another", None],
    "device": "NVIDIA H200",
    "batch_size": 7,
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_going_on_with_something_else_is_refused(half_done: Settings, name: str) -> None:
    file = half_done.folder / "checkpoint" / "identity.json"
    identity = json.loads(file.read_text())
    assert identity.keys() == DIFFERENT.keys()
    file.write_text(json.dumps(identity | {name: DIFFERENT[name]}))
    row = run_cell(half_done)
    assert (row["status"], row["stage"]) == ("failed", "quantize")
    assert f"an unfinished run with another {name} (" in row["error"]
    assert row["error"].endswith("start this run again with force=true")
    assert (half_done.folder / "checkpoint" / "block-00000.json").exists()


def test_the_versions_of_code_and_libraries_are_those_of_this_machine(half_done: Settings) -> None:
    identity = json.loads((half_done.folder / "checkpoint" / "identity.json").read_text())
    assert identity["library version"]["torch"].startswith(torch.__version__.split("+")[0])
    assert identity["code version"] == resume_code()
    assert identity["configuration"]["method"]["name"] == "rtn"


def resume_code() -> str:
    from runners.run.keys import OF_CODES
    from runners.storage.fingerprint import code_fingerprint

    return code_fingerprint(*OF_CODES)


def test_force_begins_anew(half_done: Settings) -> None:
    file = half_done.folder / "checkpoint" / "identity.json"
    file.write_text("{}")

    assert run_cell(half_done.replace(force=True))["status"] == "done"


@pytest.mark.parametrize("damage", ["flip", "truncate", "gone", "manifest", "wrong checksum"])
def test_a_damaged_block_is_done_again(
    half_done: Settings, toy_settings: ToySettings, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = half_done.folder / "checkpoint" / "block-00000.safetensors"
    content = bytearray(file.read_bytes())
    manifest = file.with_suffix(".json")
    if damage == "flip":
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "gone":
        file.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:40])
    else:
        sealed = json.loads(manifest.read_text())
        sealed["content"]["records"][0]["relative_error"] *= 2
        manifest.write_text(json.dumps(sealed))
    row = run_cell(half_done)
    fresh = run_cell(toy_settings("method=rtn", "keep_checkpoint=true", f"results={tmp_path / 'fresh'}"))
    assert measured(row) == measured(fresh)
    assert ("is damaged" in caplog.text) == (damage != "gone")


def exchange(one: Path, other: Path) -> None:
    for suffix in (".safetensors", ".json"):
        pair = one.with_suffix(suffix), other.with_suffix(suffix)
        contents = [file.read_bytes() for file in pair]
        for file, content in zip(pair, reversed(contents), strict=True):
            file.write_bytes(content)


@pytest.fixture
def two_runs(toy_settings: ToySettings) -> tuple[Path, Path]:
    """The finished blocks of two runs, two each."""
    settings = [toy_settings(f"method={name}", "keep_checkpoint=true") for name in ("rtn", "gptq")]
    for each in settings:
        assert run_cell(each)["status"] == "done"
    return settings[0].folder / resume.FOLDER, settings[1].folder / resume.FOLDER


def resumed_blocks(checkpoint: Path, **options: bool) -> int:
    identity = json.loads((checkpoint / "identity.json").read_text())
    return FinishedBlocks(checkpoint.parent, identity).resume(**options)


def test_blocks_that_were_exchanged_do_not_count(two_runs: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    mine, others = two_runs
    first, second = (mine / f"block-0000{index}" for index in (0, 1))
    assert resumed_blocks(mine) == resumed_blocks(others) == 2
    exchange(first, second)  # with their manifests: each file by itself is whole
    assert resumed_blocks(mine) == resumed_blocks(mine, any_version=True) == 0
    assert "(it is block 1, in the place of block 0)" in caplog.text
    exchange(first, second)
    exchange(second, others / second.name)
    assert resumed_blocks(mine) == resumed_blocks(others) == 1
    assert "(it is of another run)" in caplog.text


def test_blocks_of_an_older_version_count_only_where_their_digest_is_compared(two_runs: tuple[Path, Path]) -> None:
    mine, _ = two_runs
    for manifest in mine.glob("block-*.json"):
        content = json.loads(manifest.read_text())["content"]
        del content["block"], content["run"]
        manifest.write_text(json.dumps({"content": content, "checksum": resume._checksum(content)}))
    assert resumed_blocks(mine) == 0
    assert resumed_blocks(mine, any_version=True) == 2
    exchange(mine / "block-00000", mine / "block-00001")
    assert resumed_blocks(mine, any_version=True) == 0


def test_the_digest_of_the_codes_does_not_depend_on_whether_they_are_kept(
    toy_settings: ToySettings, tmp_path: Path
) -> None:
    kept = toy_settings("method=rtn", "keep_checkpoint=always", f"results={tmp_path / 'kept'}")
    gone = toy_settings("method=rtn", "keep_checkpoint=never", f"results={tmp_path / 'gone'}")
    rows = [run_cell(kept), run_cell(gone)]
    assert rows[0]["checkpoint/sha256"] == rows[1]["checkpoint/sha256"]
    assert (kept.folder / resume.FOLDER).is_dir()
    assert not (gone.folder / resume.FOLDER).exists()


def test_an_identity_that_cannot_be_read_is_a_sentence(half_done: Settings) -> None:
    (half_done.folder / "checkpoint" / "identity.json").write_text("[")
    with pytest.raises(InputError, match=r"identity\.json is damaged .* force=true"):
        FinishedBlocks(half_done.folder, {"model": "m"}).resume()


def test_the_peak_memory_is_that_of_all_parts(toy_settings: ToySettings, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = toy_settings("method=rtn", "device=cpu")
    save = FinishedBlocks.save

    def stop(self: FinishedBlocks, index: int, *rest: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        save(self, index, *rest)

    with monkeypatch.context() as first:
        first.setattr("runners.timing._peak", lambda: 7_000_000_000)
        first.setattr(FinishedBlocks, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            run_cell(settings)
    monkeypatch.setattr("runners.timing._peak", lambda: 2_000_000_000)
    row = run_cell(settings)
    assert (row["quantize/peak_memory_gb"], row["evaluate/peak_memory_gb"]) == (7, 2)
