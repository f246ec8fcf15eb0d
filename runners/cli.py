"""The command line: check it, let Hydra run it, and say how it ended."""

import logging
import math
import re
import sys
from collections.abc import Callable
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from runners.checking import check
from runners.console import console
from runners.errors import InputError
from runners.experiment import run_experiment
from runners.settings import Settings
from runners.store import RunFolder
from runners.summary import differences, failure_text, next_steps, results_table

log = logging.getLogger(__name__)

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
    try:
        cells = check(arguments.overrides, arguments.multirun)
        main()
        if arguments.multirun:
            _summarize(cells)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(WRONG_INPUT) from None
    except KeyboardInterrupt:
        print("interrupted: the same command again goes on with what is missing", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def job(cfg: DictConfig) -> float:
    """Run one cell. In a sweep a failing cell returns NaN and the others go on."""
    single = HydraConfig.get().mode == RunMode.RUN
    try:
        rows = run_experiment(Settings.from_config(cfg))
        row = rows[-1]
        failure = None if row["status"] == "done" else failure_text(row)
    except InputError as error:  # there is nowhere to put a row
        rows, row, failure = [], {}, str(error)
    if failure is not None:
        log.error("error: %s", failure)
        if single:
            raise SystemExit(FAILED)
        return math.nan
    if single:
        console.print(results_table(rows))
        console.print(next_steps(row), highlight=False, soft_wrap=True)
    return row["layers/mean_relative_error"]


def _summarize(cells: list[Settings]) -> None:
    """The table of a sweep, one row a run; exits non-zero if any of them has failed or is missing."""
    runs = {settings.run_name: settings for settings in cells}
    rows = []
    for settings, difference in zip(runs.values(), differences(list(runs.values())), strict=True):
        labels = {"method": settings.method.name, "model": settings.model.name, "bits": settings.bits}
        metrics = RunFolder(settings.folder).metrics() or labels | {"status": "missing", "error": "it did not run"}
        rows.append(metrics | {"setting": difference})
    console.print(results_table(rows))
    bad = [row for row in rows if row["status"] in ("failed", "missing")]
    for row in bad:
        name = " ".join(str(row[key]) for key in ("model", "method", "setting") if row[key])
        console.print(f"{name}: {row['error']}", highlight=False, soft_wrap=True)
    if bad:
        console.print(f"{len(bad)} of {len(rows)} cells failed; the same command again runs them again")
        raise SystemExit(FAILED)
