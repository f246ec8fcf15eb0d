"""A process for each cell, so that whatever ends it, metrics are written and the sweep continues.

The process is forked from a server (`multiprocessing`'s fork server) that has imported all that a cell needs and done
nothing with it. So it starts in a fraction of a second instead of ten, and inherits neither CUDA, which does not survive a
fork, nor the locks of other threads, which would never be released in it.

Who stops whom: only the parent heeds Ctrl-C, and sends SIGTERM to the child; the child raises KeyboardInterrupt, writes its
metrics and leaves. If it does not leave within `GRACE_SECONDS`, the parent kills it and writes the metrics itself.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from hydra.core.utils import configure_log
from omegaconf import OmegaConf

from runners.config.settings import Settings
from runners.errors import InputError, NoRoom
from runners.results.metrics import Reason, Status
from runners.results.progress import progress_words, read_progress, remove_progress
from runners.results.run_folder import RunFolder
from runners.results.run_log import append
from runners.run.experiment import INTERRUPTED, failure_metrics, run_experiment
from runners.run.preflight import modules_of_texts
from runners.sweeps.gpus import lease
from runners.sweeps.signals import heeding_sigterm, signals_held

log = logging.getLogger(__name__)

GRACE_SECONDS = 15.0  # for a process to write its metrics after SIGTERM; schedulers often send SIGKILL after 30
START = "start"  # the stage of a process that has not written any progress
# What a cell imports, but only when it comes to it; that of a tracker by its name.
NEEDED = ("quantease.kernels.cpu", "transformers.modeling_utils", "transformers.tokenization_utils_tokenizers")
OF_TRACKER = {"wandb": ("wandb", "wandb.sdk.launch", "wandb.apis.public", "runners.tracking.weights_and_biases")}
OF_MODEL = "transformers.models."
START_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
OUT_OF_MEMORY = (
    "probably out of memory; try a smaller batch_size, fewer cells at a time (hydra.launcher.n_jobs), or more memory"
)


OnCell = Callable[[dict[str, Any]], None]  # see `run_experiment`


def run_isolated(
    settings: Settings, logs: dict[str, Any] | None = None, on_cell: OnCell | None = None
) -> list[dict[str, Any]]:
    """`run_experiment` in a process of its own, on a GPU of its own where there is one.

    Args:
        logs: the configuration of `logging` in that process; None: Python's default.
        on_cell: as for `run_experiment`; called in this process.

    Returns:
        The metrics that `run_experiment` returns; of a cell whose process died or was stopped, metrics with the `reason`
        `killed` or `timeout`.

    Raises:
        InputError: the run's folder cannot be read or written, so there is no place for metrics.
        KeyboardInterrupt: after the metrics of the cell are written.
    """
    if _has_ended(settings):
        return run_experiment(settings)
    with lease(settings.execution.device) as gpu:
        return _run_child(settings, os.environ | gpu, logs, on_cell)


def _has_ended(settings: Settings) -> bool:
    runs = [(RunFolder(cell.folder), cell.execution) for cell in _with_references([settings])]
    return all(folder.metrics_to_keep(execution.force, execution.retry_failed) for folder, execution in runs)


def _run_child(
    settings: Settings, environment: dict[str, str], logs: dict[str, Any] | None, on_cell: OnCell | None
) -> list[dict[str, Any]]:
    """Start the process and wait for its answer, its death or the time limit, whichever is first."""
    context: Any = multiprocessing.get_context(START_METHOD)
    answer, sender = context.Pipe(duplex=False)
    arguments = (settings, sender, environment, logs, torch.get_num_threads())
    process: BaseProcess = context.Process(target=_run_in_child, args=arguments, name=settings.run_name)
    minutes = settings.execution.timeout_minutes
    try:
        _start(process, _imports(settings))
        sender.close()  # the child now has the only writing end, so that reading ends with EOFError when it dies
        result = _wait_for(answer, process, None if minutes is None else time.monotonic() + 60 * minutes, on_cell)
    except _TimeIsUp:
        return _stop_and_record(settings, process, Reason.TIMEOUT, _timeout_words(settings))
    except BaseException:
        _stop_and_record(settings, process, Reason.INTERRUPTED, INTERRUPTED)
        raise
    _join_or_kill(process)  # it has answered or is dead, but may hang on leaving, and its GPU is handed on after this
    if isinstance(result, InputError):
        raise result
    if result is not None:
        return result
    # Somebody else has sent SIGTERM, to the process or through its handler (`_run_in_child`).
    if process.exitcode in (-signal.SIGTERM, 128 + signal.SIGTERM):
        return _stop_and_record(settings, process, Reason.INTERRUPTED, INTERRUPTED)
    return _stop_and_record(settings, process, Reason.KILLED, _death_words(process.exitcode))


def _imports(settings: Settings) -> list[str]:
    """The modules that the fork server imports for its cells. The classes of models are those that this process has needed.

    A cell whose model or tracker is another than the first cell's imports what is missing itself.
    """
    of_models = sorted(name for name in sys.modules if name.startswith(OF_MODEL))
    of_tracker = OF_TRACKER.get(settings.execution.tracker.name, ())
    return [__name__, *NEEDED, *of_tracker, *of_models, *modules_of_texts(settings)]


def _start(process: BaseProcess, imports: Sequence[str]) -> None:
    methods = multiprocessing.get_all_start_methods()
    if multiprocessing.get_start_method(allow_none=True) not in (None, *methods):
        multiprocessing.set_start_method(methods[0], force=True)  # joblib sets "loky", which a child does not know
    resource_tracker.ensure_running()  # it sees to signals itself, and changes the mask of this thread
    if START_METHOD != "forkserver":
        with signals_held():
            process.start()
        return
    forkserver.set_forkserver_preload(list(imports))
    with signals_held():
        forkserver.ensure_running()  # at once; but until it has imported all, which takes seconds, `start` waits
    try:
        process.start()
    except KeyboardInterrupt:
        _kill_fork_server()
        raise


def _kill_fork_server() -> None:
    """End the fork server, which would heed the end of this process only after its imports. The next cell starts another."""
    server: int | None = getattr(forkserver._forkserver, "_forkserver_pid", None)  # pyright: ignore[reportAttributeAccessIssue]
    if server is not None:
        os.kill(server, signal.SIGKILL)


class _TimeIsUp(Exception):
    """The time limit of a cell has passed."""


def _wait_for(
    answer: Connection, process: BaseProcess, deadline: float | None, on_cell: OnCell | None
) -> list[dict[str, Any]] | InputError | None:
    """What the process answers at its end; None if it dies without. Before that, it may send the metrics of its cell.

    Args:
        deadline: as `time.monotonic` counts; None: there is none.

    Raises:
        _TimeIsUp: the deadline has passed.
    """
    while wait([answer, process.sentinel], None if deadline is None else max(0.0, deadline - time.monotonic())):
        try:
            message = answer.recv()
        except EOFError:
            return None
        if not isinstance(message, dict):
            return message
        if on_cell is not None:
            on_cell(message)
    raise _TimeIsUp


def _run_in_child(
    settings: Settings, answer: Connection, environment: dict[str, str], logs: dict[str, Any] | None, threads: int
) -> None:
    os.environ.clear()  # inherited from the fork server, and as old as that
    os.environ.update(environment)
    try:
        with heeding_sigterm():
            threading.Thread(target=_end_with_parent, daemon=True).start()
            torch.set_num_threads(threads)
            logging.raiseExceptions = False  # an error of a log, as on a full disk, is not to fill the terminal
            if logs is not None:
                configure_log(OmegaConf.create(logs))
            answer.send(run_experiment(settings, on_cell=answer.send))
    except InputError as error:
        answer.send(error)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGTERM)  # the exit code by which shells tell a death by SIGTERM


def _end_with_parent() -> None:
    """Stop when the parent is gone: its lock on the GPU is released then, and another cell may be given the GPU."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
        os._exit(128 + signal.SIGTERM)


def _stop(process: BaseProcess) -> None:
    """End the process: by SIGTERM, and by SIGKILL after the grace period or a second Ctrl-C."""
    if process.pid is None:  # interrupted before it was started
        return
    deadline = time.monotonic() + GRACE_SECONDS
    try:
        while process.is_alive() and time.monotonic() < deadline:
            process.terminate()
            process.join(1.0)
    finally:
        process.kill()
        process.join()


def _join_or_kill(process: BaseProcess) -> None:
    try:
        process.join(GRACE_SECONDS)
    finally:  # also after a Ctrl-C while waiting
        process.kill()
        process.join()


def _stop_and_record(settings: Settings, process: BaseProcess, reason: Reason, error: str) -> list[dict[str, Any]]:
    """Stop the process, and write the metrics that it has not written, of the cell or of its reference.

    Args:
        error: with `{where}` for the progress of the run.

    Returns:
        The metrics of the cell, for `run_isolated`.
    """
    # Both before the process is stopped: when it leaves in order it removes its progress, and writes metrics of its own.
    cell, progress = _at_work(settings, process)
    folder = RunFolder(cell.folder)
    had_ended = (ended := folder.metrics()) is not None
    _stop(process)
    if ended is not None and folder.tasks_left(ended):  # its result stands
        log.error("error: %s: %s", cell.run_name, error.format(where=progress_words(progress)))
    written = None if had_ended else _record_death(cell, progress, reason, error)
    if written is not None and cell is not settings:  # the caller sees the cell's metrics, but not the reference's
        log.error("error: %s: %s", cell.run_name, written["error"])
    metrics = RunFolder(settings.folder).metrics()
    if metrics is None:  # another process has taken up the cell meanwhile, or it had not begun
        metrics = failure_metrics(settings, reason, START, error.format(where=f"during {START}"))
    return [metrics | {"folder": str(settings.folder), "tracker": None}]


def _at_work(settings: Settings, process: BaseProcess) -> tuple[Settings, dict[str, Any]]:
    """The cell or reference that the process is working on, with its progress; the cell if it has not begun."""
    for cell in _with_references([settings]):
        progress = read_progress(cell.folder)
        if progress is not None and progress["pid"] == process.pid:
            return cell, progress
    return settings, {"stage": START}


def record_dead_runs(cells: Sequence[Settings]) -> None:
    """Write the metrics of runs that died together with the parent that would have, as when a launcher kills its workers."""
    for cell in _with_references(cells):
        progress = read_progress(cell.folder)
        if progress is not None and RunFolder(cell.folder).metrics() is None:
            with suppress(NoRoom):  # its progress stays, and tells the same
                _record_death(cell, progress, Reason.INTERRUPTED, INTERRUPTED)


def _with_references(cells: Sequence[Settings]) -> list[Settings]:
    """The cells and the references that they need, each once."""
    references = [cell.reference() for cell in cells if cell.run.is_compared]
    return list({cell.folder: cell for cell in (*cells, *references)}.values())


def _record_death(cell: Settings, progress: dict[str, Any], reason: Reason, error: str) -> dict[str, Any] | None:
    """Write the metrics of a run whose process is gone.

    Metrics with the status `failed` are replaced: a process that was stopped for its time limit has recorded an interrupt.

    Returns:
        The metrics; None if the run has ended otherwise, or another process has taken it up.
    """
    folder = RunFolder(cell.folder)
    folder.path.mkdir(parents=True, exist_ok=True)
    with folder.lock(wait=False) as is_mine:
        ended = folder.metrics()
        if not is_mine or (ended is not None and ended["status"] != Status.FAILED):
            return None
        progress = read_progress(folder.path) or progress  # its last words, later than what the caller has read
        metrics = failure_metrics(cell, reason, progress["stage"], error.format(where=progress_words(progress)))
        append(folder.path, metrics["error"], "ERROR")
        folder.write_metrics(metrics)
        remove_progress(folder.path)
        return metrics


def _timeout_words(settings: Settings) -> str:
    minutes = settings.execution.timeout_minutes
    return f"stopped after timeout_minutes={minutes:g} {{where}}: raise that, with retry_failed=true"


def _death_words(exitcode: int | None) -> str:
    """What is known of a process that ended without an answer; `{where}` is for its progress."""
    if exitcode is None or exitcode >= 0:
        return f"its process left with exit code {exitcode} {{where}}"
    name = signal.Signals(-exitcode).name
    why = OUT_OF_MEMORY if name == "SIGKILL" else "a crash in compiled code; without -m it runs in the foreground"
    return f"killed by {name} {{where}}: {why}"
