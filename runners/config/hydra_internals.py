"""All uses of Hydra beyond its documented interface, in one place, because a new version of Hydra may change them.

`@hydra.main` would compose a command line that has already been composed to be checked. So a run and a sweep are started
from the composition that was checked, as `Hydra.run` and `Hydra.multirun` do after theirs.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import configure_log, run_job
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig

Task = Callable[[DictConfig], Any]


def parse_arguments(arguments: Sequence[str]) -> Namespace:
    """Hydra's own options (`-m`, `--cfg` and so on), with the settings in `overrides`."""
    return get_args_parser().parse_args(list(arguments))


def overrides_of_cells(overrides: list[Override]) -> list[list[str]]:
    """The overrides of every cell of a sweep, in the order in which Hydra's sweeper starts them."""
    return [cell for batch in BasicSweeper.split_arguments(overrides, None) for cell in batch]


def run_here(cfg: DictConfig, task: Task) -> None:
    """Run one job in this process: set up its folder and its log, and call the task.

    Args:
        cfg: composed with Hydra's own part. `initialize_config_dir` must be in effect, as for `launch`.
        task: called with `cfg` without that part; what it raises is raised.
    """
    cfg.hydra.mode = RunMode.RUN
    # `return_value` raises what the task has raised.
    _ = run_job(task, cfg, "hydra.run.dir", None, _context(cfg), configure_logging=True).return_value


def launch(cfg: DictConfig, task: Task) -> None:
    """Hand a sweep to its launcher, which composes each cell where it runs, in this process or in another.

    Args:
        cfg: what the cells share, composed with Hydra's own part; `hydra.overrides.task` says what is swept.
        task: called once per cell. Launchers pickle it: it has to be a function at the top of a module.
    """
    configure_log(cfg.hydra.hydra_logging, cfg.hydra.verbose)
    sweeper = Plugins.instance().instantiate_sweeper(config=cfg, hydra_context=_context(cfg), task_function=task)
    sweeper.sweep(arguments=list(cfg.hydra.overrides.task))


def _context(cfg: DictConfig) -> HydraContext:
    return HydraContext(config_loader=GlobalHydra.instance().config_loader(), callbacks=Callbacks(cfg))
