"""All uses of Hydra beyond its documented interface, in one place, because a new version of Hydra may change them.

`@hydra.main` would compose a command line that has already been composed to be checked. So a run and a sweep are started
from the composition that was checked, as `Hydra.run` and `Hydra.multirun` do after theirs.
"""

import itertools
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, cast

from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.grammar import grammar_functions
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.core.utils import configure_log, run_job
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf

from runners.errors import InputError

Task = Callable[[DictConfig], Any]

MAX_VALUES = 10_000  # that one setting may sweep over: range(0,1e9) is a mistake, and would fill the memory


def parse_arguments(arguments: Sequence[str]) -> tuple[Namespace, list[str]]:
    """Hydra's own options (`-m`, `--cfg` and so on), wherever they are, with the settings in `overrides`.

    Returns:
        The options, and the arguments in an order that Hydra's own parser understands: options first.

    Raises:
        InputError: an option does not exist, or has a value that it cannot have.
    """
    parser = get_args_parser()
    parser.allow_abbrev = False
    parser.error = _refuse  # argparse would print its usage, of options that nobody has asked for
    # Intermixed: otherwise argparse takes the settings before an option for all that there are.
    options, unknown = parser.parse_known_intermixed_args(list(arguments))
    if unknown:
        name, _, value = unknown[0].lstrip("-").partition("=")
        after = [*arguments, ""][arguments.index(unknown[0]) + 1]  # `--method gptq`: a setting in the manner of options
        value = value or ("" if "=" in after or after.startswith("-") else after)
        raise InputError(
            f"there is no option {unknown[0]}: settings are written without dashes, as {name or 'name'}="
            f"{value or 'VALUE'}; the options are -m, --help, --cfg job and those of python run.py --hydra-help"
        )
    settings = Counter(options.overrides)
    flags = []
    for word in arguments:
        if settings[word] > 0:
            settings[word] -= 1
        else:
            flags.append(word)
    return options, [*flags, *options.overrides]


def also_compose_from(folder: Path) -> None:
    """Let Hydra find conf groups in another folder, too, as its --config-dir does; within `initialize_config_dir`."""
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None, "initialize_config_dir comes first"
    search = hydra.config_loader.get_search_path()
    search.prepend("command-line", f"file://{folder}", anchor="schema")  # which has to stay last
    hydra.config_loader = ConfigLoaderImpl(config_search_path=search)  # which lists its sources when it is made


def _refuse(message: str) -> NoReturn:
    raise InputError(f"{message}; see python run.py --help")


def overrides_parser() -> OverridesParser:
    """Hydra's parser of settings, with a `sort` that is right for ranges."""
    parser = OverridesParser.create()
    parser.functions.functions["sort"] = _sort
    return parser


def _sort(*args: Any, sweep: Any = None, list: Any = None, reverse: bool = False) -> Any:
    """Hydra's `sort`, except for ranges: Hydra makes 3, 1, -1 of range(0,5,2) in reverse, where 4, 2, 0 is right."""
    only = args[0] if len(args) == 1 else sweep
    if isinstance(only, RangeSweep):
        values = itertools.islice(only.range(), MAX_VALUES + 1)
        return ChoiceSweep(tags=only.tags, list=sorted(values, reverse=reverse))
    return grammar_functions.sort(*args, sweep=sweep, list=list, reverse=reverse)


def glob_of(override: Override) -> Glob | None:
    """The pattern of `name=glob(...)`; None for any other setting."""
    value: Any = override.value()
    return value if isinstance(value, Glob) else None


def overrides_of_cells(overrides: list[Override]) -> list[list[str]]:
    """The overrides of every cell of a sweep, in the order in which Hydra's sweeper starts them."""
    return [cell for batch in BasicSweeper.split_arguments(overrides, None) for cell in batch]


def options_of_group(group: str) -> list[str]:
    """The names of a conf group's files, wherever Hydra composes, in this process or in that of a launcher."""
    return _entries(group, ObjectType.CONFIG)


def groups_inside(group: str) -> list[str]:
    """The conf groups inside another; inside "", those of conf/ itself."""
    return _entries(group, ObjectType.GROUP)


def _entries(group: str, kind: ObjectType) -> list[str]:
    # The loader's own `get_group_options` copies all that it knows before it lists a folder.
    loader = cast(ConfigLoaderImpl, GlobalHydra.instance().config_loader())
    return [str(name) for name in loader.repository.get_group_options(group, kind)]


@lru_cache
def option_of_group(group: str, name: str) -> dict[str, Any]:
    """What a file of a conf group sets, with its defaults; not to be changed, as every caller gets the same."""
    loader = GlobalHydra.instance().config_loader()
    composed = loader.load_configuration("config", [f"{group}={name}"], run_mode=RunMode.RUN, from_shell=False)
    return cast(dict[str, Any], OmegaConf.to_container(composed[group], resolve=True))


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
