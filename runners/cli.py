"""The command line: check all of it, run its cells, and report the outcome by an exit code."""

import logging
import math
import os
import re
import shlex
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from runners.config.command_line import CommandLine, check_names, configuration, read
from runners.config.from_config import settings_from
from runners.config.hydra_internals import launch, parse_arguments, run_here
from runners.config.settings import Settings
from runners.console import console
from runners.errors import FAILED, INTERRUPTED, WRONG_INPUT, InputError
from runners.results.metrics import BITS_PER_WEIGHT, OPEN, RELATIVE_ERROR, TASKS_LEFT, Reason, Status
from runners.results.run_log import RUN_LOG
from runners.results.studies import remember
from runners.results.tables import cells_table, command_text, failure_text, next_steps, results_table
from runners.run.dry_run import forecasts
from runners.run.environment import COMMAND
from runners.run.experiment import run_experiment
from runners.sweeps.cells import cell_name, describe_cells, read_status, register_cells
from runners.sweeps.engines import prepared, runs_elsewhere
from runners.sweeps.isolation import record_dead_runs, run_isolated
from runners.sweeps.refusal import refuse_impossible
from runners.sweeps.signals import end_in_time, interrupts_end_it, sigterm_as_interrupt

log = logging.getLogger(__name__)

ONLY_SHOW = ("hydra_help", "cfg", "info")  # Hydra's options that run nothing
OTHER_CONFIGURATION = ("config_name", "config_path")  # that read another than conf/config.yaml
SUBMITIT = "SUBMITIT_FOLDER"  # in the environment of a job that submitit has started
REFERENCE_FOLLOWS = (
    "This result is stored ({folder}). Next comes the unquantized model, which it is compared with: "
    "a table of both follows."
)
SIGPIPE = 128 + 13  # the exit code of a process whose reader, such as `head`, has closed the pipe


def start(main: Callable[[], Any]) -> None:
    """Check the command line, run it, and leave with an exit code that tells how it went.

    Args:
        main: Hydra's entry point, for options that only show something (`--help`, `--cfg`), and for other configurations.
    """
    os.environ[COMMAND] = shlex.join(sys.orig_argv)
    logging.raiseExceptions = False  # a log that cannot be written, as on a full disk, is not to fill the terminal
    try:
        with interrupts_end_it():
            _start(main)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(WRONG_INPUT) from None
    except KeyboardInterrupt:
        print("interrupted: the same command again goes on with what is missing", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its exit
        raise SystemExit(SIGPIPE) from None


def _start(main: Callable[[], Any]) -> None:
    # Hydra asks for experiment=... without a plus, because the group is in the defaults list; people type both.
    words = [re.sub(r"^\+(?=experiment=)", "", word) for word in sys.argv[1:]]
    options, words = parse_arguments(words)
    if options.experimental_rerun:
        raise InputError("--experimental-rerun reads a pickle, which can run any code: give the settings themselves")
    # The help page shows no values, so a wrong setting must not keep anyone from it.
    more = [f"--config-dir={options.config_dir}"] if options.config_dir is not None else []
    sys.argv[1:] = ["--help", *more] if options.help else words
    if options.shell_completion and not re.match(r"(install|uninstall|query)=", " ".join(options.overrides)):
        raise InputError("--shell-completion needs install=bash (or fish, zsh), uninstall=bash or query=bash")
    if options.help and more:
        with configuration(options.config_dir):  # refuses a folder that is not there, which Hydra's help page does not
            pass
    if options.help or options.shell_completion or any(getattr(options, name) for name in OTHER_CONFIGURATION):
        main()
    elif any(getattr(options, name) for name in ONLY_SHOW):
        with configuration(options.config_dir):
            check_names(options.overrides, options.multirun)
        main()
    else:
        with sigterm_as_interrupt(then=end_in_time), configuration(options.config_dir):
            command = read(options.overrides, options.multirun)
            # The next command, and that which goes on, need the folder as well.
            _run(replace(command, words=(*more, *command.words)), options.multirun)


def _run(command: CommandLine, multirun: bool) -> None:
    is_dry = any(cell.execution.dry_run for cell in command.cells)
    is_here = not (multirun and runs_elsewhere(command.composed.hydra.launcher))
    is_run_here = is_here and not is_dry
    # A single run runs again what has failed, so what has failed does not keep it from being checked.
    cells = command.cells if multirun else [cell.replace(retry_failed=True) for cell in command.cells]
    refuse_impossible(cells, is_run_here)
    if is_dry:
        _list(cells, is_here)
        return
    remember(command.cells[0].study_folder)
    with nullcontext() if multirun else suppress(InputError, OSError):  # what is done needs no place for a list
        register_cells(command.cells, command.words, multirun)
    if multirun:
        _run_sweep(command)
    else:
        run_here(command.composed, lambda _: _run_cell(command.cells[0], single=True, words=command.words))


def job(cfg: DictConfig) -> float:
    """Run one cell from its composed configuration, in the process that the launcher chose; returns its layer error."""
    single = HydraConfig.get().mode == RunMode.RUN
    try:
        _enter(Path(HydraConfig.get().runtime.cwd))
        settings = settings_from(cfg)
    except InputError as error:
        return _failed(str(error), single)
    if settings.execution.dry_run:  # only where `start` left the command line to Hydra, as with --config-name
        _list([settings.replace(retry_failed=True)], is_here=True)
        return math.nan
    return _run_cell(settings, single)


def _list(cells: Sequence[Settings], is_here: bool) -> None:
    """Show the cells, and what is expected of those that are still to be run."""
    words, lines = forecasts(cells, is_here)
    console.print(cells_table([row | words.get(row["folder"], {}) for row in describe_cells(cells)], lines))


def _enter(folder: Path) -> None:
    """Go where the command was given: a process of a launcher may start elsewhere, and relative paths must not change."""
    try:
        os.chdir(folder)
    except OSError as error:
        host = socket.gethostname()
        raise InputError(
            f"{folder}, where the command was given, cannot be entered on {host} ({error.strerror}): the machines of "
            "a sweep must share it"
        ) from error


def _run_sweep(command: CommandLine) -> None:
    cells = command.cells
    skipped = {cell.folder for cell in cells if not (cell.execution.force or cell.execution.retry_failed)}
    failed_before = sum(_has_failed(read_status(folder)) for folder in skipped)
    try:
        with prepared(command.composed.hydra.launcher):
            launch(command.composed, job)
    finally:
        record_dead_runs(cells)
    _summarize(cells, failed_before, command.words)


def _run_cell(settings: Settings, single: bool, words: Sequence[str] = ()) -> float:
    """Run one cell. In a sweep it has a process of its own; where it fails, NaN is returned and the other cells run.

    Args:
        words: of a single run, the settings as they were typed.
    """
    try:
        rows = _rows(settings, single)
    except InputError as error:  # the run's folder cannot be read or written, so there is no row
        return _failed(str(error), single)
    row = rows[-1]
    if row.get("reason") == Reason.INTERRUPTED and SUBMITIT in os.environ:
        from runners.sweeps.slurm import wait_while_preempted  # an extra

        wait_while_preempted()
        # Without a result: the command then finds out whether the job is over or will begin again, as after a preemption.
        raise SystemExit(INTERRUPTED)
    if row["status"] in (Status.FAILED, Status.UNSUPPORTED):
        is_news = single or not row.get("skipped")
        return _failed(failure_text(row), single) if is_news else math.nan
    if row["status"] == Status.RUNNING:
        log.info("%s: %s; this process leaves it alone", row["folder"], row["error"])
        return math.nan
    if single:
        console.print(results_table(rows))
        if (reference := rows[0])["status"] == Status.FAILED:
            log.error("error: %s", failure_text(reference))
        console.print(next_steps(row, words), highlight=False, soft_wrap=True)
    return row.get(RELATIVE_ERROR, math.nan)  # without calibration there is none


def _show_cell(row: dict[str, Any]) -> None:
    """The table of a single run that is done: whoever waits for it need not wait for the reference as well."""
    console.print(results_table([row]))
    console.print(REFERENCE_FOLLOWS.format(folder=row["folder"]), highlight=False, soft_wrap=True)


def _rows(settings: Settings, single: bool) -> list[dict[str, Any]]:
    """The rows of a run and its reference. A single run stays in this process, unless a timeout has to be able to end it."""
    with sigterm_as_interrupt():
        if not single:
            return run_isolated(settings, _logs())
        settings = settings.replace(retry_failed=True)
        if settings.execution.timeout_minutes is None:
            return run_experiment(settings, _show_cell)
        return run_isolated(settings, _logs(), _show_cell)


def _failed(text: str, single: bool) -> float:
    """Report a failed cell: a single run ends the process, a cell of a sweep returns NaN."""
    log.error("error: %s", text)
    if single:
        raise SystemExit(FAILED)
    return math.nan


def _logs() -> dict[str, Any]:
    """Hydra's configuration of this process's log, so that a child process writes to the same log."""
    return cast(dict[str, Any], OmegaConf.to_container(HydraConfig.get().job_logging, resolve=True))


def _has_failed(row: Mapping[str, Any]) -> bool:
    """Whether a run has failed by itself: one that is damaged on disk is not made again by retry_failed=true."""
    return row["status"] == Status.FAILED and row.get("reason") != Reason.DAMAGED


def _summarize(cells: list[Settings], left_alone: int, words: Sequence[str]) -> None:
    """Print the table of a sweep, one row per run, and what to do next; exit with 1 if any has failed or has not ended."""
    asked = {settings.folder for settings in cells}
    needed = [settings.reference() for settings in cells if settings.run.is_compared]
    references = {reference.folder: reference for reference in needed if reference.folder not in asked}
    described = describe_cells([*references.values(), *cells])  # at once, so that models of one name are told apart
    others, rows = described[: len(references)], described[len(references) :]
    console.print(results_table([*(row for row in others if BITS_PER_WEIGHT in row), *rows]))
    rows += [row for row in others if row["status"] in (Status.FAILED, Status.UNFINISHED, Status.INTERRUPTED)]
    failed = [row for row in rows if _has_failed(row)]
    damaged = [row for row in rows if row.get("reason") == Reason.DAMAGED]
    unfinished = [row for row in rows if row["status"] in OPEN]
    for row in damaged + failed + unfinished:
        log_file = row["folder"] / RUN_LOG
        details = f" (details: {log_file})" if row in failed and log_file.exists() else ""
        console.print(f"{cell_name(row)}: {row['error']}{details}", highlight=False, soft_wrap=True)
    if failed:
        before = f", {left_alone} of them before, which were left alone" if left_alone else ""
        console.print(f"{len(failed)} of {len(rows)} cells failed{before}: retry_failed=true runs them again")
    if damaged:
        console.print(f"{len(damaged)} of {len(rows)} cells are damaged, and neither believed nor run again")
    if unfinished:
        console.print(
            f"{len(unfinished)} of {len(rows)} cells have not ended: the same command again goes on with them"
        )
    if left := [row for row in described if TASKS_LEFT in row]:
        console.print(
            f"{len(left)} cells lack zero-shot tasks that memory ran out for: the same command tries these again"
        )
    studies = sorted({cell.study_folder for cell in cells})
    again = [f"python -m analysis {shlex.quote(str(folder))}" for folder in studies]
    if failed or unfinished or left:
        again = [command_text(words, *["retry_failed=true"] * bool(failed), sweep=True)]
    console.print("\nnext      " + "\n          ".join(again), highlight=False, soft_wrap=True)
    if failed or unfinished or damaged:
        raise SystemExit(FAILED)
