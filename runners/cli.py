"""The command line: check it, let Hydra run it, and say how it ended."""

import logging
import math
import re
import sys
from collections.abc import Callable
from typing import Any, cast

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from runners.config.command_line import check
from runners.config.launchers import prepare_ray
from runners.config.settings import Settings
from runners.console import console
from runners.errors import InputError
from runners.results.tables import cells_table, failure_text, next_steps, results_table
from runners.run.experiment import run_experiment
from runners.sweeps.cells import describe, register, state
from runners.sweeps.isolation import interruptible, run_isolated, settle

log = logging.getLogger(__name__)

UNFINISHED = ("unfinished", "interrupted", "missing")  # states of cells that the same command goes on with
FAILED, WRONG_INPUT, INTERRUPTED = 1, 2, 130  # exit codes


def start(main: Callable[[], Any]) -> None:
    """Check the command line, run it, and leave with an exit code that says how it went."""
    # Hydra's habit is +experiment=..., which it refuses for a group that stands in the defaults list: take both.
    sys.argv[1:] = [re.sub(r"^\+(?=experiment=)", "", argument) for argument in sys.argv[1:]]
    arguments = get_args_parser().parse_args(sys.argv[1:])
    shows_something = arguments.help or arguments.hydra_help or arguments.cfg or arguments.info
    if shows_something or arguments.shell_completion or arguments.config_dir or arguments.experimental_rerun:
        main()
        return
    prepare_ray()
    try:
        with interruptible():
            _run(check(arguments.overrides, arguments.multirun), arguments.multirun, main)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(WRONG_INPUT) from None
    except KeyboardInterrupt:
        print("interrupted: the same command again goes on with what is missing", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def _run(cells: list[Settings], multirun: bool, main: Callable[[], Any]) -> None:
    if any(settings.execution.dry_run for settings in cells):
        console.print(cells_table(describe(cells)))
    elif multirun:
        register(cells)
        skipped = {cell.folder for cell in cells if not (cell.execution.force or cell.execution.retry_failed)}
        left_alone = sum(state(folder)["status"] == "failed" for folder in skipped)
        try:
            main()
        finally:
            settle(cells)
        _summarize(cells, left_alone)
    else:
        main()


def job(cfg: DictConfig) -> float:
    """Run one cell. In a sweep it has a process of its own, and where it fails the answer is NaN and others go on."""
    single = HydraConfig.get().mode == RunMode.RUN
    try:
        settings = Settings.from_config(cfg)
        if (
            settings.execution.dry_run
        ):  # where Hydra was called without a look at the command line, as with --config-dir
            console.print(cells_table(describe([settings])))
            return math.nan
        rows = _rows(settings, single)
    except InputError as error:  # there is nowhere to put a row
        return _failed(str(error), single)
    row = rows[-1]
    if row["status"] in ("failed", "unsupported"):
        is_news = single or not row.get("skipped")
        return _failed(failure_text(row), single) if is_news else math.nan
    if row["status"] == "running":
        log.info("%s: %s; this process leaves it alone", row["folder"], row["error"])
        return math.nan
    if single:
        console.print(results_table(rows))
        console.print(next_steps(row), highlight=False, soft_wrap=True)
    return row["layers/mean_relative_error"]


def _rows(settings: Settings, single: bool) -> list[dict[str, Any]]:
    with interruptible():
        if single and settings.execution.timeout_minutes is None:
            return run_experiment(settings.replace(retry_failed=True))
        return run_isolated(settings.replace(retry_failed=single or settings.execution.retry_failed), _logs())


def _failed(text: str, single: bool) -> float:
    log.error("error: %s", text)
    if single:
        raise SystemExit(FAILED)
    return math.nan


def _logs() -> dict[str, Any]:
    """How Hydra has configured this process's log, for a process that is to log to the same places."""
    return cast(dict[str, Any], OmegaConf.to_container(HydraConfig.get().job_logging, resolve=True))


def _summarize(cells: list[Settings], left_alone: int) -> None:
    """The table of a sweep, one row a run; exits non-zero if any of them has failed or is missing."""
    asked = {settings.folder for settings in cells}
    needed = [settings.reference() for settings in cells if settings.run.quantizes]
    rows = describe(cells)
    console.print(results_table(rows))
    others = describe([reference for reference in needed if reference.folder not in asked])
    rows += [row for row in others if row["status"] in ("failed", *UNFINISHED[:-1])]
    failed = [row for row in rows if row["status"] == "failed"]
    unfinished = [row for row in rows if row["status"] in UNFINISHED]
    for row in failed + unfinished:
        bits = f"{row['bits']} bits" if "bits" in row else ""
        name = " ".join(part for part in (row["model"], row["method"], bits, row["setting"]) if part)
        console.print(f"{name}: {row['error']}", highlight=False, soft_wrap=True)
    if failed:
        before = f", {left_alone} of them before, which were left alone" if left_alone else ""
        console.print(f"{len(failed)} of {len(rows)} cells failed{before}: retry_failed=true runs them again")
    if unfinished:
        console.print(
            f"{len(unfinished)} of {len(rows)} cells have not ended: the same command again goes on with them"
        )
    if failed or unfinished:
        raise SystemExit(FAILED)
