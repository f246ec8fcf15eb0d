"""A cell in a process of its own, so that whatever ends it leaves a row, and the sweep goes on.

The process is forked from a server that has imported the heavy libraries and done nothing with them: it starts in a
fraction of a second, clean of CUDA and of threads.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from hydra.core.utils import configure_log
from omegaconf import OmegaConf

from runners.config.settings import Settings
from runners.errors import InputError
from runners.results.metrics import METRICS
from runners.results.progress import progress_words, read_progress, remove_progress
from runners.results.run_folder import RunFolder
from runners.run.experiment import INTERRUPTED, failure_metrics, run_experiment
from runners.sweeps.gpus import lease

log = logging.getLogger(__name__)

GRACE = 15.0  # seconds that a process gets to write its row when it is told to stop
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
OUT_OF_MEMORY = (
    "probably out of memory; try a smaller batch_size, fewer cells at a time (hydra.launcher.n_jobs), or more memory"
)


def run_isolated(settings: Settings, logs: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """`run_experiment` in a process of its own, on a GPU of its own where there is one.

    Args:
        logs: the configuration of `logging` there; None: Python's own.

    Returns:
        The rows of `run_experiment`; that of a cell whose process died or was stopped has the `reason` `killed` or
        `timeout`.

    Raises:
        InputError: there is nowhere to put a row.
        KeyboardInterrupt: after the cell has written its row.
    """
    if _nothing_to_do(settings):
        return run_experiment(settings)
    with lease(settings.execution.device) as gpu:
        return _run_child(settings, os.environ | gpu, logs)


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Take SIGTERM, as schedulers send it, for Ctrl-C, where nobody else has taken it."""
    is_free = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not is_free or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _nothing_to_do(settings: Settings) -> bool:
    runs = [(RunFolder(cell.folder), cell.execution) for cell in _cells([settings])]
    return all(folder.metrics_to_keep(execution.force, execution.retry_failed) for folder, execution in runs)


def _run_child(settings: Settings, environment: dict[str, str], logs: dict[str, Any] | None) -> list[dict[str, Any]]:
    process, answer = _start(settings, environment, logs)
    limit = None if settings.execution.timeout_minutes is None else 60 * settings.execution.timeout_minutes
    try:
        is_ready = bool(wait([answer, process.sentinel], limit))
        result = _receive(answer) if is_ready else None
    except BaseException:
        _leave_row(settings, process, "interrupted", INTERRUPTED)
        raise
    if not is_ready:
        return _leave_row(settings, process, "timeout", _too_long(settings))
    _let_end(process)
    if isinstance(result, InputError):
        raise result
    if result is not None:
        return result
    if process.exitcode == -signal.SIGTERM or process.exitcode == 128 + signal.SIGTERM:
        return _leave_row(settings, process, "interrupted", INTERRUPTED)
    return _leave_row(settings, process, "killed", _death(process.exitcode))


def _start(
    settings: Settings, environment: dict[str, str], logs: dict[str, Any] | None
) -> tuple[BaseProcess, Connection]:
    context: Any = multiprocessing.get_context(METHOD)
    context.set_forkserver_preload([__name__, "quantease.kernels.cpu"])  # and numba, which every run would load
    methods = multiprocessing.get_all_start_methods()
    if multiprocessing.get_start_method(allow_none=True) not in (None, *methods):
        multiprocessing.set_start_method(methods[0], force=True)  # joblib's own is unknown to the process that starts
    answer, sender = context.Pipe(duplex=False)
    arguments = (settings, sender, environment, logs, torch.get_num_threads())
    process: BaseProcess = context.Process(target=_child, args=arguments, name=settings.run_name)
    with _deaf_to_interrupts():
        process.start()
    sender.close()  # so that reading from it ends when the process does
    return process, answer


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """What is started here ignores Ctrl-C, from its first moment: it is for the parent to stop it, in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _receive(answer: Connection) -> list[dict[str, Any]] | InputError | None:
    try:
        return answer.recv()
    except EOFError:
        return None


def _child(
    settings: Settings, answer: Connection, environment: dict[str, str], logs: dict[str, Any] | None, threads: int
) -> None:
    os.environ.clear()  # the server's own is as old as the server
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _interrupt)
    threading.Thread(target=_follow_parent, daemon=True).start()
    torch.set_num_threads(threads)
    if logs is not None:
        configure_log(OmegaConf.create(logs))
    try:
        answer.send(run_experiment(settings))
    except InputError as error:
        answer.send(error)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGTERM)


def _interrupt(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: what follows is the row
    raise KeyboardInterrupt


def _follow_parent() -> None:
    """Stop when the parent is gone: nobody would hear of the result, or hand out the GPU."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(128 + signal.SIGTERM)


def _stop(process: BaseProcess) -> None:
    """End the process: politely, and after a while, or a second Ctrl-C, not."""
    process.terminate()
    _let_end(process)


def _let_end(process: BaseProcess) -> None:
    try:
        process.join(GRACE)
    finally:
        process.kill()
        process.join()


def _leave_row(settings: Settings, process: BaseProcess, reason: str, error: str) -> list[dict[str, Any]]:
    """Stop the process, and write the row that it did not: of the cell, or of the reference if that is where it was."""
    seen = ((cell, progress) for cell in _cells([settings]) if (progress := read_progress(cell.folder)) is not None)
    cell, progress = next((pair for pair in seen if pair[1]["pid"] == process.pid), (settings, {"stage": "start"}))
    had_ended = RunFolder(cell.folder).metrics() is not None
    _stop(process)
    row = None if had_ended else _write_row(cell, progress, reason, error)
    if row is not None and cell is not settings:
        log.error("error: %s: %s", cell.run_name, row["error"])
    metrics = RunFolder(settings.folder).metrics() or failure_metrics(settings, reason, "start", error)
    return [metrics | {"folder": str(settings.folder), "tracker": None}]


def record_dead_runs(cells: Sequence[Settings]) -> None:
    """Write the rows of runs whose processes died without anybody left to see it, as when a launcher kills its workers."""
    for cell in _cells(cells):
        progress = read_progress(cell.folder)
        if progress is not None and RunFolder(cell.folder).metrics() is None:
            _write_row(cell, progress, "interrupted", INTERRUPTED)


def _cells(cells: Sequence[Settings]) -> list[Settings]:
    """With the references that they need."""
    references = [cell.reference() for cell in cells if cell.run.quantizes]
    return list({cell.folder: cell for cell in (*cells, *references)}.values())


def _write_row(cell: Settings, progress: dict[str, Any], reason: str, error: str) -> dict[str, Any] | None:
    """The row of a run whose process is gone, unless it is done or another process has taken it up."""
    folder = RunFolder(cell.folder)
    folder.path.mkdir(parents=True, exist_ok=True)
    with folder.lock(wait=False) as mine:
        ended = folder.metrics()
        if not mine or (ended is not None and ended["status"] != "failed"):
            return None
        progress = read_progress(folder.path) or progress
        row = failure_metrics(cell, reason, progress["stage"], error.format(where=progress_words(progress)))
        folder.write_json(METRICS, row)
        remove_progress(folder.path)
        return row


def _too_long(settings: Settings) -> str:
    minutes = settings.execution.timeout_minutes
    return f"stopped after timeout_minutes={minutes:g} {{where}}: raise that, with retry_failed=true"


def _death(exitcode: int | None) -> str:
    """What is known of a process that ended without an answer."""
    if exitcode is None or exitcode >= 0:
        return f"its process left with exit code {exitcode} {{where}}"
    name = signal.Signals(-exitcode).name
    why = OUT_OF_MEMORY if name == "SIGKILL" else "a crash in compiled code; without -m it runs in the foreground"
    return f"killed by {name} {{where}}: {why}"
