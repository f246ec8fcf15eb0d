"""trackio as the tracker: what its store holds, several processes at once, and its page in a browser."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from runners.config import execution
from runners.errors import InputError
from runners.run.experiment import run_cell
from runners.tracking import content
from runners.tracking.tracker import track
from tests.conftest import PROJECT, ToySettings, missing

# It must not be imported here: it looks for its store when it is.
pytestmark = pytest.mark.skipif(find_spec("trackio") is None, reason=missing("trackio"))

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"


def rows(results: Path, study: str, sql: str) -> list[dict[str, Any]]:
    """What trackio's own command reads from the store."""
    command = ["trackio", "query", "project", "--project", study, "--json", "--sql", sql]
    answer = subprocess.run(command, env=environment(results), capture_output=True, check=True, timeout=300)
    return json.loads(answer.stdout)["rows"]


def environment(results: Path, **more: str) -> dict[str, str]:
    return os.environ | {"TRACKIO_DIR": str(results / "trackio"), "HF_HUB_OFFLINE": "1"} | more


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of the tests in this process: trackio has one store a process."""
    return tmp_path_factory.mktemp("tracked")


@pytest.fixture(scope="module")
def swept(toy_model: Path, data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of two jobs of one study that ran at the same time."""
    folder = tmp_path_factory.mktemp("swept")
    shared = ["model=local", f"model.path={toy_model}", "calibration=c4", "calibration.num_sequences=4", "method=rtn"]
    shared += ["evaluation=wikitext2", f"data_root={data_root}", f"results={folder}", "study=both", "tracker=trackio"]
    command = [sys.executable, str(PROJECT / "run.py"), *shared]
    jobs = [subprocess.Popen([*command, f"bits={bits}"], stdout=-1, stderr=-2) for bits in (3, 4)]
    for job in jobs:
        output, _ = job.communicate(timeout=900)
        assert job.returncode == 0, output.decode()
        assert b"Trackio" not in output  # it says nothing on the console
        assert b"tracker:" not in output  # and nothing goes wrong
    return folder


def test_processes_can_write_at_once(swept: Path) -> None:
    counts = rows(swept, "both", "SELECT run_name, COUNT(*) AS points FROM metrics GROUP BY run_name ORDER BY run_name")
    found = {
        re.sub(r" \S+ · \S+$", "", row["run_name"]): row["points"] for row in counts if "fp16" not in row["run_name"]
    }
    assert found == {f"rtn {bits} bits per-channel s0": 13 for bits in (3, 4)}


def test_the_store_holds_what_the_files_do(toy_settings: ToySettings, results: Path) -> None:
    settings = toy_settings("method=rtn", "tracker=trackio", "study=files", f"results={results}")
    row = run_cell(settings)
    assert row["status"] == "done"
    assert row["tracker"] == f"TRACKIO_DIR={results / 'trackio'} trackio show --project files"
    points = [json.loads(r["metrics"]) for r in rows(results, "files", "SELECT metrics FROM metrics ORDER BY step")]
    layers = pd.read_csv(settings.folder / "layers.csv")
    fc1 = layers[layers["layer"] == "fc1"]
    errors = [point["layer_error/fc1"] for point in points if "layer_error/fc1" in point]
    assert errors == pytest.approx(list(fc1["relative_error"]))
    last = points[-1]
    assert last["perplexity/wikitext2"] == pytest.approx(row["ppl/wikitext2"])
    assert last["summary/bits_per_weight"] == row["bits_per_weight"]
    numbers = {key for point in points for key, value in point.items() if isinstance(value, int | float)}
    sections = sorted({key.partition("/")[0] for key in numbers})  # as the page has them; before all: keys without "/"
    assert sections == ["layer_error", "layer_error_held_out", "perplexity", "summary"]
    assert all("/" in key for key in numbers)
    assert len(last["tables/layers"]["_value"]) == 12
    assert {"name": "protocol/wikitext2", "value": "gptq"} in last["tables/labels"]["_value"]
    assert (results / "trackio" / "media" / last[content.LAYER_ERROR_FIGURE]["file_path"]).is_file()
    assert not {"seed", "summary/seed"} & set(last)  # a setting, not a measurement
    (config,) = rows(results, "files", "SELECT config FROM configs")
    assert json.loads(config["config"])["method"]["name"] == "rtn"


def test_a_run_that_is_made_again_replaces_what_it_was(toy_settings: ToySettings, results: Path) -> None:
    settings = toy_settings("method=rtn", "tracker=trackio", "study=again", "force=true", f"results={results}")
    for _ in range(2):
        run_cell(settings)
    (count,) = rows(results, "again", "SELECT COUNT(*) AS points, COUNT(DISTINCT run_id) AS runs FROM metrics")
    assert count == {"points": 13, "runs": 1}


def test_studies_that_trackio_would_take_for_one_have_projects_of_their_own(
    toy_settings: ToySettings, results: Path
) -> None:
    shown = []
    for study in ("my.study", "mystudy", "my study"):
        settings = toy_settings("method=fp16", "tracker=trackio", f"results={results}").replace(study=study)
        with track(settings, settings.folder) as tracker:
            assert tracker.where is not None
            shown.append(tracker.where.split()[-1])
            tracker.finish({"status": "done"}, [])
        (count,) = rows(results, shown[-1], "SELECT COUNT(DISTINCT run_id) AS runs FROM metrics")
        assert count == {"runs": 1}
    assert len(set(shown)) == 3
    assert shown[1] == "mystudy"


def test_no_server_is_asked(toy_settings: ToySettings, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        pytest.fail("trackio has asked a server")

    monkeypatch.setenv("HF_TOKEN", "hf_not_a_token")  # with which trackio.init asks the hub for the user's name
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    settings = toy_settings("method=rtn", "tracker=trackio", "study=quiet", f"results={results}")
    assert run_cell(settings)["tracker"] is not None


def test_one_process_has_one_store(
    toy_settings: ToySettings, results: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with track(toy_settings("method=rtn", "tracker=trackio", f"results={results}"), tmp_path) as tracker:
        assert tracker.where is not None
    with track(toy_settings("method=rtn", "tracker=trackio", f"results={tmp_path}"), tmp_path) as tracker:
        assert tracker.where is None
    assert "a process can have one results folder" in caplog.text


def test_without_the_extra_the_command_line_says_what_to_install(
    toy_settings: ToySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install -e "\.\[dashboard\]"'):
        toy_settings("method=rtn", "tracker=trackio")


@pytest.fixture
def page(swept: Path) -> Iterator[str]:
    """The address of the dashboard of the swept study."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}/"
    command = ["trackio", "show", "--project", "both", "--host", "127.0.0.1"]
    settings = environment(swept, GRADIO_SERVER_PORT=str(port), BROWSER="true")
    with subprocess.Popen(command, env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _wait_for(address, server)
            yield f"{address}?project=both"
        finally:
            server.kill()


def _wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(120):
        assert server.poll() is None, "trackio show has ended"
        try:
            urllib.request.urlopen(address, timeout=5).close()
        except OSError:
            time.sleep(0.5)
        else:
            return
    pytest.fail("trackio show does not answer")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the PATH")
def test_its_page_shows_the_runs_and_their_curves(page: str, tmp_path: Path) -> None:
    command = [str(BROWSER), *QUIET.split(), f"--user-data-dir={tmp_path}", "--virtual-time-budget=20000", "--dump-dom"]
    shown = subprocess.run([*command, page], capture_output=True, timeout=600, check=True).stdout.decode()
    for name in ("rtn 3 bits per-channel s0", "rtn 4 bits per-channel s0", "fp16 "):
        assert name in shown
    for metric in ("layer_error/fc1", "perplexity/wikitext2"):
        assert metric in shown
