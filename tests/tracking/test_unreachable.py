"""W&B with a user who is logged in and a server that is not there: the run is kept, offline, and soon."""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest
import wandb

from runners import sync
from runners.config.settings import Settings
from runners.run.experiment import run_cell
from runners.tracking import wandb_server, weights_and_biases
from runners.tracking.tracker import track
from runners.tracking.weights_and_biases import start
from tests.conftest import ToySettings

Answer = Callable[[BaseHTTPRequestHandler], None]


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], str]]:
    """Starts a server on this machine that answers every request as it is told; returns its address."""
    servers: list[ThreadingHTTPServer] = []

    def run(answer: Answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        servers.append(server)
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield run
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def logged_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Logs the user in to a server, in a process that has not spoken to W&B before."""

    def log_in(address: str) -> None:
        wandb.teardown()
        wandb_server.answers.cache_clear()
        monkeypatch.delenv("WANDB_MODE", raising=False)
        monkeypatch.setenv("WANDB_BASE_URL", address)
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)

    monkeypatch.setattr(wandb_server, "SECONDS", 1.0)
    yield log_in
    wandb.teardown()
    wandb_server.answers.cache_clear()


def nobody() -> str:
    """An address at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def status(code: int, text: str) -> Answer:
    """Answers with a status and a text."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(code)
        request.end_headers()
        request.wfile.write(text.encode())

    return answer


def never(_: BaseHTTPRequestHandler) -> None:
    Event().wait(60)


def recorded(settings: Settings) -> list[Path]:
    """The offline runs of a study that hold something."""
    return [folder for folder in (settings.study_folder / "wandb").glob("offline-run-*") if not sync.is_empty(folder)]


def test_the_waiting_times_leave_the_promised_twenty_seconds_and_room_to_start() -> None:
    assert wandb_server.SECONDS + weights_and_biases.INIT_TIMEOUT <= 12


@pytest.mark.parametrize("address", [lambda serve: nobody(), lambda serve: serve(never)], ids=["refuses", "is silent"])
def test_a_server_that_is_not_there_leaves_the_run_offline(
    address: Callable[..., str],
    serve: Callable[[Answer], str],
    logged_in: Callable[[str], None],
    toy_settings: ToySettings,
    caplog: pytest.LogCaptureFixture,
) -> None:
    logged_in(address(serve))
    settings = toy_settings("method=rtn", "tracker=wandb")
    row = run_cell(settings)
    assert row["tracker"] == f"wandb leet {settings.study_folder / 'wandb'}"
    assert "W&B does not answer (no answer from its server): tracking offline" in caplog.text
    (folder,) = recorded(settings)
    assert sync.pending(settings.study_folder)[0] == [folder]


def test_a_server_that_answers_and_then_takes_no_run_leaves_it_offline_under_another_id(
    serve: Callable[[Answer], str],
    logged_in: Callable[[str], None],
    toy_settings: ToySettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requests: list[float] = []

    def once(request: BaseHTTPRequestHandler) -> None:
        requests.append(time.monotonic())
        (status(200, '{"data": {"viewer": null}}') if len(requests) == 1 else never)(request)

    logged_in(serve(once))
    monkeypatch.setattr(weights_and_biases, "INIT_TIMEOUT", 1.0)
    monkeypatch.setattr(weights_and_biases, "FINISH_TIMEOUT", 1.0)
    settings = toy_settings("method=rtn", "tracker=wandb")
    assert run_cell(settings)["status"] == "done"
    assert len(requests) > 1
    (folder,) = recorded(settings)
    assert folder.name.endswith(f"-{settings.run_name}-runs-attempt-1")
    assert sync.pending(settings.study_folder)[0] == [folder]  # known as the run of its cell


def test_an_id_that_is_in_use_is_not_asked_for_again(
    toy_settings: ToySettings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    held: set[str] = set()

    def init(**options: Any) -> object:
        if options["id"] in held:
            pytest.fail(f"run ID {options['id']} is in use")
        held.add(options["id"])
        if len(held) < 3:
            raise RuntimeError("too busy")  # of no class that W&B documents
        return options["mode"]

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(weights_and_biases, "answers", lambda: True)
    monkeypatch.setattr(wandb, "init", init)
    assert start(toy_settings("method=rtn", "tracker=wandb", "tracker.mode=online")) == "offline"
    assert len(held) == 3
    assert "W&B does not answer (too busy): tracking offline" in caplog.text


@pytest.mark.parametrize(
    ("answer", "is_there"),
    [
        (status(200, json.dumps({"data": {"viewer": None}})), True),
        (status(401, "who are you?"), True),
        (status(200, "<html>Welcome to the hotel</html>"), False),
        (status(502, "Bad gateway"), False),
    ],
    ids=["answers", "refuses", "page of a hotel", "proxy"],
)
def test_what_counts_as_an_answer(
    answer: Answer, is_there: bool, serve: Callable[[Answer], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SimpleNamespace(settings=SimpleNamespace(base_url=serve(answer)))
    monkeypatch.setattr(wandb, "setup", lambda: settings)
    wandb_server.answers.cache_clear()
    assert wandb_server.answers() is is_there
    wandb_server.answers.cache_clear()


def test_a_name_that_is_looked_up_for_long_does_not_keep_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_server, "_asked", lambda address: Event().wait(60))
    monkeypatch.setattr(wandb_server, "SECONDS", 0.1)
    wandb_server.answers.cache_clear()
    begin = time.monotonic()
    assert not wandb_server.answers()
    assert time.monotonic() - begin < 30
    wandb_server.answers.cache_clear()


def test_a_run_is_on_disk_when_it_is_closed(toy_settings: ToySettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B's own process, which writes the file, has ended: before, one run in about ten was 7 bytes for a while yet."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for study in "abcd":
        settings = toy_settings("method=rtn", "tracker=wandb", f"study={study}")
        with track(settings, settings.folder):
            pass
        assert len(recorded(settings)) == 1
        assert "WANDB_SERVICE" not in os.environ  # that process's address


@pytest.mark.parametrize(("name", "value"), [("WANDB_MODE", "disabled"), ("WANDB_DISABLED", "true")])
def test_who_has_disabled_wandb_gets_no_files_of_it(
    name: str, value: str, toy_settings: ToySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv(name, value)
    settings = toy_settings("method=fp16", "tracker=wandb", "tracker.mode=offline")
    row = run_cell(settings)
    assert (row["status"], row.get("tracker")) == ("done", None)
    assert not (settings.study_folder / "wandb").exists()


def test_a_mode_that_wandb_does_not_know_loses_no_run(
    toy_settings: ToySettings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "ofline")
    monkeypatch.setattr(weights_and_biases, "logged_in", lambda: False)
    settings = toy_settings("method=rtn", "tracker=wandb")
    with track(settings, settings.folder) as tracker:
        assert tracker.where is not None
    assert "WANDB_MODE=ofline is ignored: it must be one of online, " in caplog.text
    assert "WANDB_MODE" not in os.environ
    assert recorded(settings)
